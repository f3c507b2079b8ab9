"""The command line in a process of its own, and a folder of files as a user has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests import tiny
from tests.settings import nested

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SETTINGS: dict[str, Any] = {
    "retriever.question_encoder": "encoder",
    "retriever.index": "idx",
    "retriever.n_docs": 3,
    "reader.generator": "generator",
    "data.train_questions": "questions.jsonl",
    "data.eval_questions": "questions.jsonl",
    "data.max_context": 64,
    "evaluation.max_new_tokens": 3,
    "training.output_dir": "run",
    "training.max_steps": 6,
    "training.eval_strategy": "steps",
    "training.eval_steps": 3,
    "training.save_strategy": "steps",
    "training.save_steps": 3,
    "training.logging_steps": 1,
    "training.use_cpu": True,
}
BUILD = ("index", "build", "--encoder", "encoder", "--generator", "generator", "--out", "new")


def fastrag(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastrag.cli", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run arguments behind torchrun in two processes, at a port of their own."""
    launcher = (sys.executable, "-m", "torch.distributed.run")
    return subprocess.run(
        [*launcher, "--standalone", "--nproc-per-node", "2", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def write_files(folder: Path) -> None:
    """Model parts, corpus, questions and config, as a user has them."""
    tiny.save_parts(folder)
    passages = [{"id": p.id, "title": p.title, "text": p.text} for p in tiny.passages()]
    questions = [
        {"id": q.id, "question": q.question, "answers": list(q.answers), "positive": q.positive}
        for q in tiny.questions()
    ]
    for name, rows in (("corpus", passages), ("questions", questions)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "train.yaml").write_text(yaml.safe_dump(nested(SETTINGS)))

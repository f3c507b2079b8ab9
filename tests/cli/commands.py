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

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SETTINGS: dict[str, Any] = {
    "question_encoder": "encoder",
    "generator": "generator",
    "index": "idx",
    "train_questions": "questions.jsonl",
    "eval_questions": "questions.jsonl",
    "output_dir": "run",
    "n_docs": 3,
    "max_context": 64,
    "steps": 6,
    "eval_steps": 3,
    "save_steps": 3,
    "log_steps": 1,
    "eval_max_new_tokens": 3,
    "device": "cpu",
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
    (folder / "train.yaml").write_text(yaml.safe_dump(SETTINGS))

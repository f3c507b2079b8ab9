"""The demo, cut down: it runs end to end, its loss falls, its parts do what they say."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.demo import ablation, report
from examples.demo.models import MASK, SEPARATOR, tiny_encoders, tiny_generator, train_tokenizers
from examples.demo.questions import draw_six, read_six, six_questions
from examples.demo.run import main, run
from examples.demo.system import Settings, build_model, measure_without_gold
from examples.demo.warmup import make_cloze, salient_spans, warm_up
from fastrag.data import DefaultDataset, Passage, default_dataset
from fastrag.train.callbacks import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SUMMARY_KEYS = {
    "recall@1_before",
    "recall@1_after",
    "recall@5_before",
    "recall@5_after",
    "em_before",
    "em_after",
    "em_unseen_wording",
    "em_gold_removed",
    "train_seconds",
    "seed",
    "steps",
    "commit",
}


def subset(n_passages: int = 80, n_questions: int = 24) -> DefaultDataset:
    """A corner of the embedded set: its first passages, and questions with the demo's six."""
    data = default_dataset()
    six = six_questions(data.questions["test"]).asked
    ids = {passage.id for passage in data.passages[:n_passages]}
    ids |= {question.positive for question in six if question.positive}
    questions = {
        split: [question for question in members if question.positive in ids][:n_questions]
        for split, members in data.questions.items()
    }
    questions["test"] = six + [each for each in questions["test"] if each not in six]
    return DefaultDataset([each for each in data.passages if each.id in ids], questions)


@pytest.fixture(scope="module")
def data() -> DefaultDataset:
    return subset()


@pytest.fixture(scope="module")
def small() -> Settings:
    return Settings(
        seed=3, steps=24, warmup_steps=6, batch_size=8, refresh=8, eval_steps=12, eval_limit=4
    )


def test_runs_end_to_end(data: DefaultDataset, small: Settings, tmp_path: Path) -> None:
    summary = run(small, tmp_path, data=data, progress=False)
    assert set(summary) >= SUMMARY_KEYS
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (summary["seed"], summary["steps"]) == (3, 24)
    for key in SUMMARY_KEYS - {"train_seconds", "seed", "steps", "commit"}:
        assert 0.0 <= summary[key] <= 1.0, key
    entries = read_metrics(tmp_path / "metrics.jsonl")
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert "gold passage deleted" in report.table(summary)
    assert len(report.curve(entries).splitlines()) == 4  # header, at the start, two evaluations
    asked = [question.question for question in six_questions(data.questions["test"]).asked]
    assert [entry["question"] for entry in summary["six_questions"]] == asked
    removed = data.questions["test"][3]
    assert summary["without_passage"]["question"] == removed.question
    gold = next(each.text for each in data.passages if each.id == removed.positive)
    assert gold not in summary["without_passage"]["after"]


def test_six_questions_are_those_that_the_rule_draws() -> None:
    test = default_dataset().questions["test"]
    chosen = read_six()
    assert draw_six(test) == {name: chosen[name] for name in ("questions", "passage_removed")}
    six = six_questions(test)
    assert [question.id for question in six.asked] == chosen["questions"]
    assert six.without_passage in six.asked
    assert six_questions(test[:0]) == ([], None)


def test_answers_fit_a_terminal() -> None:
    entry = {
        "question": "Which city is the capital of Peru?",
        "expected": "Lima",
        "answer": "Lima",
        "correct": True,
        "before": "Peru: Peru covers 1,285,220 square kilometres" + " and more" * 9,
        "after": "Peru: Peru is governed from Lima.",
    }
    wrong = entry | {"answer": "Quito", "correct": False}
    text = report.answers([entry, wrong], wrong)
    assert max(map(len, text.splitlines())) <= 80
    assert "   answer  ✓ Lima   (expected: Lima)" in text
    assert text.count("✗ Quito   (expected: Lima)") == 2
    assert text.count("   before  Peru") == 2 and text.count("   now     Peru") == 1
    assert "removed from the index" in text and "removed" not in report.answers([entry], None)


def test_retriever_learns_without_labels(data: DefaultDataset, small: Settings) -> None:
    """The loss reaches both encoders, and never reads `positive`."""
    model = build_model(data, small)
    questions = data.questions["train"][:8]
    batch = model.processor.collate(questions)
    assert set(batch) == {
        "input_ids",
        "attention_mask",
        "prompt_ids",
        "prompt_mask",
        "labels",
    }
    model.train()
    model(**batch).loss.backward()
    for part in (model.question_encoder, model.passage_encoder, model.generator):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert model.log_tau.grad is not None


def test_copying_start(data: DefaultDataset) -> None:
    tokenizers = train_tokenizers(data.passages, data.questions["train"], vocab_size=800)
    torch.manual_seed(0)
    generator = tiny_generator(tokenizers.generator)
    first, second = (block.layer[1].EncDecAttention for block in generator.decoder.block)
    torch.testing.assert_close(second.q.weight, second.k.weight)
    for attention in (first, second):
        copied = attention.o.weight @ attention.v.weight
        torch.testing.assert_close(copied, torch.eye(len(copied)), atol=1e-5, rtol=0)
    # The first layer's query of a token meets the key of the place behind it.
    neighbours = generator.encoder.block[0].layer[0].SelfAttention
    token, others = torch.randn(128), torch.randn(128, 100)
    d_head = generator.config.d_kv
    written = neighbours.o.weight[:, :d_head] @ neighbours.v.weight[:d_head]
    match = first.q.weight[:d_head].T @ first.k.weight[:d_head] @ written
    assert token @ match @ token > (token @ match @ others).max() > 0
    plain = tiny_generator(tokenizers.generator, copying=False)
    attention = plain.decoder.block[1].layer[1].EncDecAttention
    assert not torch.allclose(attention.o.weight, attention.v.weight.T)

    question_encoder, passage_encoder = tiny_encoders(len(tokenizers.retriever))
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(question_encoder(ids), passage_encoder(ids))
    assert question_encoder.model is not passage_encoder.model


def test_tokenizers_keep_answers_whole(data: DefaultDataset) -> None:
    """The pieces of an answer are those it has inside its passage, also before a full stop."""
    tokenizers = train_tokenizers(data.passages, data.questions["train"], vocab_size=800)
    encode = lambda text: tokenizers.generator(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    text = {passage.id: passage.text for passage in data.passages}
    for question in data.questions["train"]:
        answer, passage = encode(question.answers[0]), encode(text[question.positive])
        assert any(passage[i : i + len(answer)] == answer for i in range(len(passage)))
    words = tokenizers.retriever
    assert words.tokenize("ÁNDORRA, of 1,001.5") == ["andorra", ",", "of", "0"]


def test_salient_spans() -> None:
    passages = default_dataset().passages
    spans = dict(zip([each.id for each in passages], salient_spans(passages), strict=True))
    assert spans["country/PE/capital"] == ["Lima"]
    assert spans["country/AE/capital"] == ["Abu Dhabi"]
    assert spans["country/PE/area"] == ["1,285,220"]


def test_cloze() -> None:
    draw = random.Random(0)
    passage = Passage("AE", "United Arab Emirates", "The UAE is governed from Abu Dhabi.")
    n_salient = 0
    for _ in range(60):
        source, target = make_cloze(passage, ["Abu Dhabi"], draw)
        text, _, gap = source.partition(SEPARATOR)
        assert text == "United Arab Emirates: The UAE is governed from Abu Dhabi."
        if gap == f"United Arab Emirates{MASK}":
            assert target == "Abu Dhabi"
            n_salient += 1
        else:
            assert " ".join(gap.replace(MASK, f" {target} ").split()) in passage.text
            assert 1 <= len(target.split()) <= 4
    assert 20 < n_salient < 50


def test_warm_up_lowers_the_loss(data: DefaultDataset) -> None:
    tokenizers = train_tokenizers(data.passages, data.questions["train"], vocab_size=800)
    torch.manual_seed(0)
    generator = tiny_generator(tokenizers.generator)
    losses = [
        warm_up(
            generator, tokenizers.generator, data.passages, steps=n, batch_size=16, progress=False
        )
        for n in (1, 30)
    ]
    assert losses[1] < losses[0] - 1.0


def test_without_gold_restores_the_index(data: DefaultDataset, small: Settings) -> None:
    model = build_model(data, small)
    index, test = model.index, data.questions["test"][:4]
    result = measure_without_gold(model, test, progress=False)
    assert result.metrics["recall@5"] == 0.0
    assert model.index is index and index.n_live == len(data.passages)


def test_bm25_vectors_give_bm25_scores() -> None:
    bm25s = pytest.importorskip("bm25s")
    data = subset()
    model = build_model(data, Settings())
    size = len(model.processor.question_tokenizer)
    vectors = ablation.bm25_vectors(model.passages, size)
    ids, lengths = model.passages.gather(torch.arange(len(data.passages)), "encoder")
    corpus = [
        [str(i) for i in row[:n]] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)
    ]
    bm25 = bm25s.BM25()
    bm25.index(corpus, show_progress=False)
    query = model.processor.collate(data.questions["train"][:1])["input_ids"]
    counts = ablation.WordCounts(size)(query, torch.ones_like(query))
    known = [str(i) for i in query[0].tolist() if str(i) in {w for words in corpus for w in words}]
    expected = torch.from_numpy(bm25.get_scores(known))
    torch.testing.assert_close((counts @ vectors.T)[0], expected, atol=1e-4, rtol=1e-4)


def test_permuted_labels_keep_the_questions(data: DefaultDataset) -> None:
    plain = ablation.training_questions(data, "joint", 0)
    permuted = ablation.training_questions(data, "permuted labels", 0)
    assert [q.question for q in plain] == [q.question for q in permuted]
    assert sorted(q.answers for q in plain) == sorted(q.answers for q in permuted)
    assert sum(a.answers != b.answers for a, b in zip(plain, permuted, strict=True)) > 5


@pytest.mark.parametrize(("table", "row"), [("retrievers", "joint"), ("freshness", "rolling:32")])
def test_ablation_table(table: str, row: str) -> None:
    one = dict.fromkeys(ablation.FIGURES[table], 0.5) | {"row": row, "seed": 0}
    other = dict.fromkeys(ablation.FIGURES[table], 0.7) | {"row": row, "seed": 1}
    (entry,) = ablation.summarise([one, other], table)
    assert entry["em_after"] == {"mean": pytest.approx(0.6), "min": 0.5, "max": 0.7}
    assert "0.600 (0.500 to 0.700) |" in ablation.markdown([entry], 10, table)
    (entry,) = ablation.summarise([one], table)
    assert f"| {row} | 0.500 |" in ablation.markdown([entry], 10, table)


def test_the_curve_of_rebuilds(tmp_path: Path) -> None:
    figures = ablation.FIGURES["freshness"]
    rows = [
        dict.fromkeys(figures, value) | {"row": row, "seed": 0}
        for row, value in (("every:10", 0.9), ("frozen", 0.5), ("rolling:32", 0.3))
    ]
    entries = ablation.summarise(rows, "freshness")
    ablation.plot_intervals(entries, 200, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for tick in ("10", "200"):
        assert f"<!-- {tick} -->" in text
    assert "<!-- 0 -->" not in text and text.count("<!-- EM -->") == 1


@pytest.mark.slow
@pytest.mark.parametrize("row", ["frozen", "rolling:32+map"])
def test_a_row_of_the_freshness_table(
    row: str, data: DefaultDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "default_dataset", lambda: data)
    monkeypatch.setattr(ablation, "PROBE_STEPS", 2)
    settings = Settings(steps=3, warmup_steps=1, batch_size=4)
    ablation.make_start(tmp_path / "start", settings)
    made = ablation.make_row(row, tmp_path / "start", settings)
    assert set(ablation.FIGURES["freshness"]) <= set(made)
    assert [step for step, _, _ in made["staleness"]] == [2]
    if row == "frozen":
        assert made["encoded"] == made["encode_share"] == made["refresh_share"] == 0
        assert made["drift_end"] > made["drift"] > 0
    else:
        assert made["encoded"] >= 32 and 0 < made["encode_share"] < made["refresh_share"] < 1
        assert made["drift_end"] < 1e-2


def test_finished_rows_of_other_settings_do_not_count(tmp_path: Path) -> None:
    path = ablation.row_file(tmp_path, "joint, token", 1)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"settings": dataclasses.asdict(Settings(seed=1))}))
    assert ablation.finished(path, Settings(seed=1)) is not None
    assert ablation.finished(path, Settings(seed=1, steps=7)) is None


def test_nothing_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", "--out", str(tmp_path)]) == 2
    assert "to resume" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_that_resumes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.demo.run", "--steps", "40", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not read_metrics(metrics):
        try:
            process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            continue
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "to go on: python -m examples.demo.run --resume" in output
    assert "Traceback" not in output
    resumed = subprocess.run(
        [*command, "--resume"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 40
    steps = [entry["step"] for entry in read_metrics(metrics) if "loss" in entry]
    assert steps == sorted(set(steps)) and steps[-1] == 40

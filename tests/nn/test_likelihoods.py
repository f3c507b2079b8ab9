"""Stored log-likelihoods are those that the generator gives, whatever happens to the store."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrag.nn.likelihoods import LikelihoodCache
from fastrag.nn.pair_store import PairStore
from fastrag.train import RagTrainer, build_collator, build_model
from tests import tiny
from tests.settings import rag_config
from tests.tiny import batch, rag_model


def key(i: int) -> bytes:
    return struct.pack("<QQ", i, 7)


def numbers(i: int) -> Any:
    return np.arange(i % 5, dtype=np.float32) + i


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["marginal", "emdr2", "pdist", "replug", "topk:2"])
def test_losses_and_gradients_are_those_without_it(
    tmp_path: Path, kind: Any, marginal: str, objective: str
) -> None:
    model = rag_model(kind, objective=objective, marginal=marginal).train()
    model.generator.requires_grad_(False).eval()
    loss, expected = gradients_of(model, kind)
    with LikelihoodCache(tmp_path / "logp") as cache:
        model.reader.likelihoods = cache
        n_read = []
        for _ in range(2):
            found, got = gradients_of(model, kind)
            torch.testing.assert_close(found, loss)
            assert got.keys() == expected.keys() and got
            for name, grad in got.items():
                torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
            n_read.append(cache.misses)
        assert cache.store is not None and n_read == [len(cache.store)] * 2
        assert cache.hits + cache.misses == 2 * 4 * 3 and cache.hits >= cache.misses


def gradients_of(model: Any, kind: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)
    found = model(**batch(kind))
    found.loss.backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found.loss.detach(), named


def test_a_warm_step_reads_nothing_in_another_process_either(tmp_path: Path) -> None:
    model = rag_model(objective="replug")
    with LikelihoodCache(tmp_path) as cache:
        model.reader.likelihoods = cache
        model(**batch())
        assert cache.summary()["likelihood_saved_s"] == cache.hits * cache.seconds / cache.misses
    other = rag_model(objective="replug")
    with LikelihoodCache(tmp_path) as cache:
        other.reader.likelihoods = cache
        other.reader.forward = None  # type: ignore[assignment]
        loss = other(**batch()).loss
        assert (cache.hits, cache.misses, cache.seconds) == (12, 0, 0.0)
        assert cache.summary() == {"likelihood_hits": 1.0, "likelihood_saved_s": 0.0}
    model.reader.likelihoods = None
    torch.testing.assert_close(loss, model(**batch()).loss)


def test_another_answer_is_another_key(tmp_path: Path) -> None:
    model, labels = rag_model(objective="replug"), batch()["labels"]
    other = labels.roll(1, 0)
    expected = model(**batch() | {"labels": other}).loss
    with LikelihoodCache(tmp_path) as cache:
        model.reader.likelihoods = cache
        assert model(**batch()).loss != expected
        torch.testing.assert_close(model(**batch() | {"labels": other}).loss, expected)


def test_what_is_read_ahead_need_not_be_read_in_training(tmp_path: Path) -> None:
    model = rag_model(objective="replug")
    questions, rows = tiny.questions(7), torch.arange(12).expand(7, 12)
    with LikelihoodCache(tmp_path) as cache:
        cache.fill(model, questions, rows, batch_size=3)
        assert cache.misses == len(cache.store) == 7 * 12  # type: ignore[arg-type]
        model.reader.likelihoods = cache
        model(**model.processor.collate(questions))
        assert (cache.misses, cache.hits) == (7 * 12, 7 * 3)
        with pytest.raises(ValueError, match=r"^rows: expected \[7, K\]"):
            cache.fill(model, questions, rows[:6])


def test_another_generator_is_refused(tmp_path: Path) -> None:
    model, other = (rag_model(objective="replug", seed=seed) for seed in (0, 1))
    with LikelihoodCache(tmp_path) as cache:
        model.reader.likelihoods = cache
        model(**batch())
    other.reader.likelihoods = LikelihoodCache(tmp_path)
    with pytest.raises(ValueError, match=r"expected numbers made by '[0-9a-f]{32}', got those of"):
        other(**batch())
    with LikelihoodCache(tmp_path, rebuild=True) as cache:
        other.reader.likelihoods = cache
        other(**batch())
        with torch.no_grad():
            next(other.generator.parameters()).mul_(1.5)
        with pytest.raises(ValueError, match=r"^likelihoods: expected the generator [0-9a-f]{32}"):
            other(**batch())
    trained = rag_model()
    with LikelihoodCache(tmp_path / "trained") as cache:
        trained.reader.likelihoods = cache
        with pytest.raises(ValueError, match="expected a generator that does not train"):
            trained(**batch())


def test_a_store_that_is_cut_anywhere_keeps_its_whole_records(tmp_path: Path) -> None:
    """As after a kill in the middle of a write, at each byte of it."""
    with PairStore(tmp_path, "a") as store:
        store.put([key(i) for i in range(3)], [numbers(i) for i in range(3)])
    [path] = tmp_path.glob("*.pairs")
    whole = path.read_bytes()
    ends = np.cumsum([24 + 4 * (i % 5) for i in range(3)])
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        n = int((ends <= cut).sum())
        said = pytest.warns(UserWarning, match="behind the last whole")
        with contextlib.nullcontext() if cut in (0, *ends) else said:
            store = PairStore(tmp_path, "a")
        with store:
            assert len(store) == n and path.stat().st_size == (ends[n - 1] if n else 0)
            for i in range(n):
                assert np.array_equal(store.get(key(i)), numbers(i))  # type: ignore[arg-type]
            store.put([key(9)], [numbers(9)])
            assert np.array_equal(store.get(key(9)), numbers(9))  # type: ignore[arg-type]
    spoilt = bytearray(whole)
    spoilt[ends[0] + 25] ^= 1
    path.write_bytes(spoilt)
    with pytest.warns(UserWarning), PairStore(tmp_path, "a") as store:
        assert len(store) == 1 or store.get(key(1)) is None


def test_the_oldest_are_dropped_and_the_limit_holds(tmp_path: Path) -> None:
    limit = 4000
    with PairStore(tmp_path, "a", max_bytes=limit) as store:
        for i in range(400):
            store.put([key(i)], [numbers(i)])
            assert store.n_bytes <= limit + limit // 8
        assert key(399) in store and key(0) not in store and len(store) > 50
        kept = {i for i in range(400) if key(i) in store}
        assert kept == set(range(min(kept), 400))
    with PairStore(tmp_path, "a", max_bytes=limit) as store:
        assert {i for i in range(400) if key(i) in store} == kept
        for i in kept:
            assert np.array_equal(store.get(key(i)), numbers(i))  # type: ignore[arg-type]


def test_a_full_disk_is_said_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rag_model(objective="replug")
    expected = model(**batch()).loss
    real = os.pwrite

    def full(descriptor: int, data: Any, offset: int) -> int:
        real(descriptor, bytes(data)[:5], offset)
        raise OSError(28, "No space left on device")

    with LikelihoodCache(tmp_path) as cache:
        model.reader.likelihoods = cache
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.warns(UserWarning, match="takes no more.*No space left on device") as said:
            for _ in range(2):
                torch.testing.assert_close(model(**batch()).loss, expected)
        assert cache.store is not None and len(said) == 1
        assert len(cache.store) == cache.store.n_bytes == 0
        monkeypatch.setattr(os, "pwrite", real)
        model(**batch())
        assert len(cache.store) > 0


def test_mistakes(tmp_path: Path) -> None:
    with PairStore(tmp_path / "a", "x"), pytest.raises(ValueError, match="no other process"):
        PairStore(tmp_path / "a", "x")
    PairStore(tmp_path / "a", "x").close()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected an empty folder or a store, got .'notes"):
        PairStore(tmp_path / "b", "x")
    assert (tmp_path / "b" / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="max_bytes: expected at least"):
        PairStore(tmp_path / "c", "x", max_bytes=3)
    model = rag_model(objective="replug", label_smoothing=0.1)
    with LikelihoodCache(tmp_path / "d") as cache:
        model.reader.likelihoods = cache
        with pytest.raises(ValueError, match="label_smoothing: expected 0"):
            model(**batch())


def test_training_from_a_config_fills_it_and_logs_it(tmp_path: Path) -> None:
    """The second run reads no context; its losses are those of the first."""
    tiny.save_parts(tmp_path)
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"id": p.id, "text": p.text}) + "\n" for p in tiny.passages())
    )
    settings = {
        "retriever.question_encoder": str(tmp_path / "encoder"),
        "reader.generator": str(tmp_path / "generator"),
        "reader.train": False,
        "reader.likelihoods": str(tmp_path / "logp"),
        "data.corpus": str(tmp_path / "corpus.jsonl"),
        "loss.objective": "emdr2",
        "training.max_steps": 3,
        "training.logging_steps": 1,
        "training.save_strategy": "no",
    }
    logged = []
    for name in ("first", "second"):
        config = rag_config(settings | {"training.output_dir": str(tmp_path / name)})
        model = build_model(config)
        assert not any(p.requires_grad for p in model.generator.parameters())
        trainer = RagTrainer(model, config, build_collator(model, config), tiny.questions())
        trainer.train()
        assert model.reader.likelihoods is not None
        model.reader.likelihoods.close()
        logged.append([each for each in trainer.state.log_history if "loss" in each])
    first, second = logged
    assert [each["loss"] for each in first] == [each["loss"] for each in second]
    assert first[0]["likelihood_hits"] < 1.0 == second[-1]["likelihood_hits"]
    assert second[-1]["likelihood_saved_s"] == 0.0


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"reader.likelihoods": "x"}, r"^reader\.likelihoods: expected null unless the generator"),
        (
            {"reader.train": False, "reader.lora.rank": 2},
            r"^reader\.lora\.rank: expected null with",
        ),
        ({"reader.train": False, "loss.prune": 0.1}, r"^loss\.prune: expected null with reader\.t"),
        (
            {"reader.train": False, "reader.likelihoods": "x", "loss.label_smoothing": 0.1},
            r"^loss\.label_smoothing: expected 0 with reader\.likelihoods",
        ),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        rag_config(settings)

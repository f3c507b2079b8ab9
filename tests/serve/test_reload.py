"""An index or a model that is replaced on disk while it is served."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrag.serve.service import Service
from fastrag.serve.source import Served, Source
from tests import tiny
from tests.serve.live import save_index, serving
from tests.threads import repeated, until


@pytest.fixture
def folder(parts: Path, tmp_path: Path) -> Path:
    """A copy of `parts` that a test may change."""
    return shutil.copytree(parts, tmp_path / "own")


def identity(n: int = 12) -> torch.Tensor:
    """Vectors of which row i is nearest to the i-th unit vector."""
    return torch.eye(16)[:n].contiguous()


def test_no_request_is_dropped_while_an_index_is_swapped(folder: Path) -> None:
    """Every answer is that of the old index or of the new one, and in the end of the new one."""
    save_index(folder / "idx", identity())
    backwards = identity().flip(0)
    query = torch.eye(16)[0].tolist()
    seen: list[Any] = []

    with serving(Source(index=str(folder / "idx")), reload_every=0.02, max_wait=0.001) as live:

        def ask() -> None:
            status, answer = live.post("/retrieve", queries=[query] * 3, topk=1, return_scores=True)
            seen.append((status, [found[0]["document"]["id"] for found in answer["result"]]))

        with repeated(ask, threads=4):
            for vectors, first in ((backwards, "p11"), (identity(), "p0")):
                n = len(seen) + 8
                until(lambda n=n: len(seen) >= n)
                save_index(folder / "idx", vectors)
                until(lambda first=first: seen[-1][1] == [first] * 3)
        assert {status for status, _ in seen} == {200}
        assert {tuple(ids) for _, ids in seen} == {("p0",) * 3, ("p11",) * 3}
        assert live.metric('fastrag_index_reloads_total{result="ok"}') >= 2


def test_an_index_of_another_length_goes_with_its_passages(folder: Path) -> None:
    source = Source(encoder=str(folder / "encoder"), index=str(folder / "idx"))
    with serving(source) as live:
        assert not live.reload()
        encoder = live.service.served.retriever
        shutil.rmtree(folder / "idx")
        assert not live.reload()  # nothing is there to be read
        save_index(folder / "idx", n=5)
        assert live.reload() and not live.reload()
        assert live.request("GET", "/health")[1]["passages"] == 5
        assert live.service.served.retriever is encoder
        status, answer = live.post("/retrieve", queries=["ada"], topk=5)
        assert status == 200 and answer["result"][0][0]["id"] == "p0"
        assert live.post("/retrieve", queries=["ada"], topk=6)[0] == 422


def test_what_cannot_be_served_leaves_the_old_index(folder: Path) -> None:
    with serving(Source(index=str(folder / "idx"))) as live:
        before = live.request("GET", "/health")[1]
        save_index(folder / "idx", torch.eye(12, 8))
        with pytest.warns(
            UserWarning,
            match="index and passages cannot be served, so the old content is: index: ex",
        ):
            assert not live.reload()
        assert not live.reload()  # tried again, said once
        now = live.request("GET", "/health")[1]
        error = "index: expected vectors of width 16 as before, got 8"
        assert now == before | {"reload_error": error}
        assert live.metric('fastrag_index_reloads_total{result="failed"}') == 1
        assert live.post("/retrieve", queries=[[0.0] * 16])[0] == 200
        save_index(folder / "idx")
        assert live.reload() and live.request("GET", "/health")[1]["reload_error"] is None


def test_an_answer_reads_the_index_that_is_served(folder: Path) -> None:
    """A model whose index lies elsewhere keeps its generator."""
    shutil.rmtree(folder / "model" / "index")
    shutil.rmtree(folder / "model" / "passages")
    source = Source(model=str(folder / "model"), index=str(folder / "idx"))
    with serving(source) as live:
        model = live.service.served.model
        save_index(folder / "idx", n=2)
        assert live.reload() and live.service.served.model is model
        status, answer = live.post("/answer", question="ada", max_new_tokens=2)
        assert status == 200
        assert sorted(each["document"]["id"] for each in answer["citations"]) == ["p0", "p1"]


def test_a_model_that_is_saved_again_is_read_again(folder: Path) -> None:
    """A run that trains the encoder saves it with the index: both are taken together."""
    with serving(Source(model=str(folder / "model"), retrieval_only=True)) as live:
        before = live.post("/retrieve", queries=["ada"], topk=3, return_scores=True)[1]
        assert live.post("/answer", question="ada")[0] == 404
        model = tiny.rag_model(seed=1).eval()
        model.save_pretrained(folder / "model", include_index=True)
        assert live.reload() and not live.reload()
        batch = model.processor.collate([{"question": "ada"}])
        hits = model.retrieve(batch["input_ids"], batch["attention_mask"], 3)
        after = live.post("/retrieve", queries=["ada"], topk=3, return_scores=True)[1]
        scores = [[item["score"] for item in answer["result"][0]] for answer in (before, after)]
        assert scores[1] == hits.scores[0].tolist() != scores[0]


def test_an_index_of_another_encoder_is_refused(folder: Path) -> None:
    source = Source(encoder=str(folder / "encoder"), index=str(folder / "idx"))
    service = Service(source)
    other = tiny.processor(passage_tokenizer=tiny.tokenizer("causal"))
    passages = type(service.served.passages).build(tiny.passages(), other)
    service.served.index.passages_checksum = passages.checksum()
    passages.save(folder / "idx" / "passages")
    service.served.index.save(folder / "idx" / "index")
    with pytest.warns(UserWarning, match="was built with another tokenizer"):
        assert not asyncio.run(service.reload_if_changed())


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(Source(index=str(folder / "idx")))
    read = Source.reload

    def replaced_meanwhile(source: Source, served: Served, changed: set[str]) -> Served:
        fresh = read(source, served, changed)
        save_index(folder / "idx", n=5)
        return fresh

    save_index(folder / "idx", n=7)
    with monkeypatch.context() as patch:
        patch.setattr(Source, "reload", replaced_meanwhile)
        assert asyncio.run(service.reload_if_changed()) and service.served.index.n_live == 7
    assert asyncio.run(service.reload_if_changed()) and service.served.index.n_live == 5

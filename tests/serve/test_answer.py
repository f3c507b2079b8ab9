"""POST /answer: answers with citations, whole and streamed, and clients that hang up."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from fastrag.generation.answers import answer_questions
from fastrag.nn import RagModel
from fastrag.serve.service import Abandoned
from fastrag.serve.source import Served
from tests import tiny
from tests.serve.live import Live
from tests.threads import until


def model_of(live: Live) -> RagModel:
    model = live.service.served.model
    assert model is not None
    return model


def events(text: str) -> list[tuple[str, Any]]:
    """The events of a stream, as a browser's EventSource reads them."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields.get("event", "message"), json.loads(fields["data"])))
    return found


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_an_answer_is_that_of_generate(
    answers: Live, marginal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(answers)
    monkeypatch.setattr(model.retriever, "_tau", 100.0)  # so that the first passage has no lead
    places = set()  # of the passage that an answer comes from
    for question in tiny.NAMES[:4]:
        batch = model.processor.collate([{"question": question}])
        expected: Any = model.generate(**batch, marginal=marginal, max_new_tokens=5, n_docs=4)
        fields = {"question": question, "marginal": marginal, "max_new_tokens": 5, "n_docs": 4}
        status, found = answers.post("/answer", **fields)
        assert status == 200
        assert found["answer"] == model.processor.decode(expected.sequences)[0] != ""
        assert found["log_prob"] == float(expected.scores[0])
        cited = found["citations"]
        rows = expected.rows[0].tolist()
        assert [each["document"]["id"] for each in cited] == [f"p{row}" for row in rows]
        posterior = expected.log_posterior[0].exp()
        shares = {"prior": expected.log_prior[0].exp()}
        shares["posterior"] = posterior.mean(dim=1) if marginal == "token" else posterior
        for name, values in shares.items():
            torch.testing.assert_close(torch.tensor([each[name] for each in cited]), values)
        place = rows.index(int(expected.supporting_rows[0]))
        assert [each["supports"] for each in cited] == [i == place for i in range(len(rows))]
        places.add(place)
    assert places != {0}


def test_a_streamed_answer_is_the_whole_one(answers: Live) -> None:
    fields = {"question": "bob", "max_new_tokens": 6}
    _, whole = answers.post("/answer", **fields)
    status, text = answers.post("/answer", **fields, stream=True)
    assert status == 200
    *pieces, (name, last) = events(text)
    assert len(pieces) > 1 and {kind for kind, _ in pieces} == {"message"}
    assert "".join(piece["text"] for _, piece in pieces).strip() == whole["answer"]
    assert name == "answer" and last == whole


def test_questions_that_come_together_are_answered_together(answers: Live) -> None:
    names = tiny.NAMES[:6]
    alone = [answers.post("/answer", question=name, max_new_tokens=4)[1] for name in names]
    before = answers.metric("fastrag_answer_batch_size_count")
    with ThreadPoolExecutor(6) as threads:
        found = threads.map(
            lambda name: answers.post("/answer", question=name, max_new_tokens=4)[1], names
        )
    for mine, other in zip(found, alone, strict=True):
        assert mine["answer"] == other["answer"]
        assert mine["log_prob"] == pytest.approx(other["log_prob"], abs=1e-4)
    assert answers.metric("fastrag_answer_batch_size_count") - before < 6


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"question": " "}, "question: expected a text, got an empty one"),
        ({"question": "ada " * 40}, "leave room for a passage in max_context = 32 tokens"),
        ({"question": "ada", "n_docs": 13}, "n_docs: expected 1 to 12, the passages there are"),
        ({"question": "ada", "max_new_tokens": 257}, "max_new_tokens: expected at most 256"),
        ({"question": "ada", "marginal": "words"}, "marginal: expected one of token, sequence"),
        (
            {"question": "ada", "marginal": "sequence", "stream": True},
            "stream: expected false, because RAG-Sequence chooses between finished answers",
        ),
        ({"question": "ada", "temperature": 1}, "temperature: expected no field of this name"),
    ],
)
def test_a_wrong_field_is_named(answers: Live, fields: dict[str, Any], error: str) -> None:
    status, found = answers.post("/answer", **fields)
    assert status == 422 and error in found["error"]


class Slow:
    """Holds the generator back at its first token, until told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go_on, self.outcomes = threading.Event(), threading.Event(), []
        generate = RagModel.generate

        def slow(model: RagModel, *args: Any, on_progress: Any, **settings: Any) -> Any:
            def progress(share: float) -> None:
                self.reached.set()
                assert self.go_on.wait(60)
                on_progress(share)

            try:
                found = generate(model, *args, on_progress=progress, **settings)
            except Abandoned:
                self.outcomes.append("abandoned")
                raise
            self.outcomes.append("answered")
            return found

        self.outcomes: list[str]
        monkeypatch.setattr(RagModel, "generate", slow)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up(
    answers: Live, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Its answer is given up at the next token; the others get theirs."""
    slow = Slow(monkeypatch)
    before = answers.metric('fastrag_requests_total{path="/answer",status="499"}')
    body = json.dumps({"question": "ada", "max_new_tokens": 20, "stream": stream}).encode()
    head = f"POST /answer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    head += "content-type: application/json\r\n\r\n"
    with contextlib.closing(socket.create_connection(("127.0.0.1", answers.port))) as client:
        client.sendall(head.encode() + body)
        assert slow.reached.wait(60)
    until(
        lambda: answers.metric('fastrag_requests_total{path="/answer",status="499"}') == before + 1
    )
    slow.go_on.set()
    until(lambda: slow.outcomes)
    assert slow.outcomes == ["abandoned"]
    status, found = answers.post("/answer", question="ada", max_new_tokens=2)
    assert status == 200 and found["n_tokens"] == 2
    assert answers.metric("fastrag_requests_in_flight") == 1  # that of /metrics


def test_a_long_answer_delays_no_search(answers: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    with ThreadPoolExecutor(1) as thread:
        answering = thread.submit(answers.post, "/answer", question="ada")
        assert slow.reached.wait(60)
        assert answers.post("/retrieve", queries=["ada"])[0] == 200
        assert not answering.done()
        slow.go_on.set()
        assert answering.result()[0] == 200


def test_a_fault_of_the_server_is_no_fault_of_the_others(
    answers: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = Served.search

    def failing(served: Served, queries: list[str], k: int) -> Any:
        if "bob" in queries:
            raise RuntimeError("a fault")
        return search(served, queries, k)

    monkeypatch.setattr(Served, "search", failing)
    with ThreadPoolExecutor(6) as threads:
        found = list(
            threads.map(lambda name: answers.post("/retrieve", queries=[name]), tiny.NAMES[:6])
        )
    assert [status for status, _ in found] == [200, 500, 200, 200, 200, 200]
    assert found[1][1] == {"error": "internal error: the server's log says more"}


def test_the_window_of_the_encoder_cuts_a_question_with_a_warning() -> None:
    """The generator reads all of it."""
    model = tiny.rag_model("seq2seq", max_context=64).eval()
    processor = tiny.processor("seq2seq", max_context=64, max_question=8)
    model.processor = processor
    [answer] = answer_questions(model, ["ada " * 20], max_new_tokens=2)
    assert answer.warnings == (
        "question: cut to the encoder's 8 tokens; the rest took no part in the search",
    )
    [answer] = answer_questions(model, ["ada"], max_new_tokens=2)
    assert answer.warnings == ()

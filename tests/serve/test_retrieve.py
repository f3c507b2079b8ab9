"""POST /retrieve: what its clients send and read, and what is wrong with a request."""

from __future__ import annotations

import copy
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from fastrag.freshness.maps import VectorMap
from fastrag.serve.limits import Limits
from fastrag.serve.source import Source
from tests import tiny
from tests.serve.live import Live, serving

ADA = {"id": "p0", "title": "ada", "text": "likes red", "contents": '"ada"\nlikes red'}


def test_search_r1_reads_the_answer(texts: Live) -> None:
    """One request for all searches of a rollout batch, as Search-R1 sends it."""
    payload = {"queries": ["ada", "bob", "ada"], "topk": 2, "return_scores": True}
    answer = requests.post(f"{texts.url}/retrieve", json=payload, timeout=60).json()
    blocks = []
    for retrieved in answer["result"]:
        block = ""
        for i, item in enumerate(retrieved):
            contents = item["document"]["contents"]
            title, _, text = contents.partition("\n")
            block += f"Doc {i + 1}(Title: {title}) {text}\n"
            assert isinstance(item["score"], float)
        blocks.append(block)
    assert blocks[0] == blocks[2] and blocks[0].count("Doc ") == 2
    assert blocks[0].startswith('Doc 1(Title: "ada") likes red\n')
    assert [item["document"]["id"] for item in answer["result"][0]][0] == ADA["id"]
    # its rollouts also ask when no answer of the batch wants a search
    empty = requests.post(f"{texts.url}/retrieve", json=payload | {"queries": []}, timeout=60)
    assert empty.status_code == 200 and empty.json() == {"result": []}


def test_torchtitan_reads_the_answer(texts: Live) -> None:
    """One query a request, without scores: bare documents."""
    payload = {"queries": ["ada"], "topk": 3, "return_scores": False}
    response = requests.post(f"{texts.url}/retrieve", json=payload, timeout=60)
    response.raise_for_status()
    documents = (response.json().get("result") or [[]])[0]
    assert len(documents) == 3 and documents[0] == ADA
    titles = [document.get("contents", "").split("\n")[0] for document in documents]
    assert titles[0] == '"ada"'


def test_rllm_reads_the_answer(texts: Live) -> None:
    """GET /health first; then one `query` with `top_k`, answered with flat `results`."""
    assert requests.get(f"{texts.url}/health", timeout=60).status_code == 200
    payload: dict[str, Any] = {"query": "ada", "top_k": 2}
    response = requests.post(f"{texts.url}/retrieve", json=payload, timeout=60)
    results = response.json().get("results", [])
    assert len(results) == 2 and results[0]["document"] == ADA
    assert f"{results[0].get('score', 0.0):.3f}" == "0.717"
    wrong = requests.post(f"{texts.url}/retrieve", json={"query": "ada", "top_k": 50}, timeout=60)
    assert wrong.status_code == 422 and "topk" in wrong.json().get("error", "Unknown error")


def test_the_default_of_topk(texts: Live) -> None:
    status, answer = texts.post("/retrieve", queries=["ada"], topk=None)
    assert status == 200 and len(answer["result"][0]) == 3


def test_scores_are_those_of_the_index(texts: Live) -> None:
    served = texts.service.served
    assert served.retriever is not None and served.question_batch is not None
    batch = served.question_batch(tiny.questions(1))
    hits = served.retriever.search(**batch, k=12)
    _, answer = texts.post("/retrieve", queries=["ada"], topk=12, return_scores=True)
    found = answer["result"][0]
    assert [item["score"] for item in found] == hits.scores[0].tolist()
    assert [item["document"]["id"] for item in found] == [
        f"p{row}" for row in hits.rows[0].tolist()
    ]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({}, "queries: expected one of queries, query, got none"),
        ({"queries": "ada"}, "queries: expected a valid list, got 'ada'"),
        ({"queries": ["ada", " "]}, "queries[1]: expected a text, got an empty one"),
        ({"queries": ["ada", 1]}, "queries[1]: expected a valid string, got 1"),
        (
            {"queries": ["\ud800"]},
            "queries[0]: expected a text in Unicode, got half of a surrogate",
        ),
        ({"query": ""}, "query: expected a text, got an empty one"),
        ({"queries": ["a"], "query": "a"}, "query, got queries and query"),
        ({"queries": ["a"], "topk": 0}, "topk: expected greater than or equal to 1, got 0"),
        ({"queries": ["a"], "topk": True}, "topk: expected a valid integer, got True"),
        ({"queries": ["a"], "topk": 10**30}, "topk: expected 1 to 12, the passages there are"),
        ({"queries": ["a"], "topk": 1, "k": 2}, "expected one of topk, top_k, k, got topk and k"),
        ({"queries": ["a"], "top-k": 2}, "top-k: expected no field of this name, got 2"),
        ({"queries": ["a" * 10_001]}, "queries[0]: expected at most 10000 characters, got 10001"),
        ({"queries": ["a"] * 4097}, "queries: expected at most 4096 queries, got 4097"),
    ],
)
def test_a_wrong_field_is_named(texts: Live, fields: dict[str, Any], error: str) -> None:
    status, answer = texts.request("POST", "/retrieve", json.dumps(fields).encode())
    assert status == 422 and error in answer["error"]
    assert answer.keys() == {"error"} and len(answer["error"]) < 700


def test_a_body_that_is_no_request(texts: Live) -> None:
    for body in (b'{"queries": [', b"", b"[" * 100_000, b"\xff", b'{"queries": ["a"], "topk": NaN'):
        status, answer = texts.request("POST", "/retrieve", body)
        assert status in (400, 422) and answer["error"]
    status, answer = texts.request("POST", "/retrieve", b'{"queries": [')
    assert status == 400 and answer["error"].startswith("body: expected JSON, got a mistake at")
    form = {"content-type": "application/x-www-form-urlencoded"}
    status, answer = texts.request("POST", "/retrieve", b'{"queries": ["a"]}', **form)
    assert status == 422 and "content-type application/json" in answer["error"]
    status, answer = texts.request("GET", "/retrieve")
    assert status == 405 and "POST /retrieve, GET /health, GET /metrics" in answer["error"]
    status, answer = texts.post("/answer", question="ada")
    assert status == 404 and "got POST /answer" in answer["error"]


def test_an_oversized_body_is_refused_early(parts: Path) -> None:
    limits = Limits(max_body=1000)
    with serving(Source(index=str(parts / "idx")), limits) as live:
        status, answer = live.request("POST", "/retrieve", b" " * 1001)
        assert (status, answer["error"]) == (413, "body: expected at most 1000 bytes, got more")
        with socket.create_connection(("127.0.0.1", live.port), timeout=60) as client:
            # no length is stated, and the end never comes
            head = b"POST /retrieve HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            client.sendall(head + b"400\r\n" + b" " * 1024 + b"\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 413 ")
        assert live.request("GET", "/health")[0] == 200


def test_a_question_over_the_window_is_cut_with_a_warning(texts: Live) -> None:
    long = "ada " * 100
    status, answer = texts.post("/retrieve", queries=["bob", long], topk=1)
    assert status == 200 and len(answer["result"]) == 2
    assert answer["warnings"] == [
        "queries[1]: cut to the encoder's 64 tokens; the rest took no part in the search"
    ]
    # exactly at the window nothing is lost: [CLS] and [SEP] are the other two tokens
    assert "warnings" not in texts.post("/retrieve", queries=["ada " * 62], topk=1)[1]
    assert texts.post("/retrieve", query="ada " * 63)[1]["warnings"][0].startswith("query: cut")


def test_vectors_are_served_without_an_encoder(vectors: Live) -> None:
    index = vectors.service.served.index
    query = torch.randn(3, 16)
    hits = index.search(query, 2)
    status, answer = vectors.post("/retrieve", queries=query.tolist(), topk=2, return_scores=True)
    assert status == 200
    assert [[item["score"] for item in each] for each in answer["result"]] == hits.scores.tolist()
    for fields, error in (
        ({"queries": [[0.0] * 15]}, "queries[0]: expected 16 numbers, got 15"),
        ({"queries": [[0.0] * 16, [1e300] * 16]}, "queries[1]: expected finite float32 numbers"),
        ({"query": [float("nan")] * 16}, "query: expected finite float32 numbers"),
        ({"queries": ["ada"]}, "queries[0]: expected a valid list, got 'ada'"),
    ):
        status, answer = vectors.post("/retrieve", **fields)
        assert status == 422 and error in answer["error"]
    assert vectors.request("GET", "/health")[1]["queries"] == "vectors"


def test_vectors_have_the_same_bits_however_they_are_batched(vectors: Live) -> None:
    """Alone, in one request, or in requests that arrive together."""
    queries = torch.randn(40, 16).tolist()

    def ask(asked: list[list[float]]) -> list[Any]:
        _, answer = vectors.post("/retrieve", queries=asked, topk=5, return_scores=True)
        found: list[Any] = answer["result"]
        return found

    together = ask(queries)
    with ThreadPoolExecutor(16) as threads:
        crowd = list(threads.map(lambda query: ask([query])[0], queries))
    assert crowd == together == [ask([query])[0] for query in queries]
    assert vectors.metric('fastrag_search_batch_size_bucket{le="1.0"}') < vectors.metric(
        "fastrag_search_batch_size_count"
    )


def test_texts_agree_however_they_are_batched(texts: Live) -> None:
    """The encoder's matrix products round by batch, so the same passages and nearly the scores."""
    names = [*tiny.NAMES, "ada likes red", "bob asked question", " ".join(tiny.NAMES)]
    fields = {"topk": 3, "return_scores": True}
    _, together = texts.post("/retrieve", queries=names, **fields)
    for name, found in zip(names, together["result"], strict=True):
        _, alone = texts.post("/retrieve", queries=[name], **fields)
        for mine, other in zip(found, alone["result"][0], strict=True):
            assert mine["document"] == other["document"]
            assert mine["score"] == pytest.approx(other["score"], abs=1e-5)


def test_an_index_is_searched_through_the_map_of_its_run(parts: Path) -> None:
    """With d -> -d the order of the passages is the opposite one."""
    served = Source(model=str(parts / "model")).load()
    assert served.retriever is not None
    n, dim = len(served.index), served.index.dim
    before = [each.id for each in served.search(["ada"], n)[0].passages]
    served.retriever.vector_map = VectorMap(-torch.eye(dim), torch.zeros(dim))
    after = [each.id for each in served.search(["ada"], n)[0].passages]
    assert before == after[::-1] and before[0] != after[0]
    served.retriever.index = served.index  # the same, as for each answer
    assert served.retriever.vector_map is not None
    served.retriever.index = copy.deepcopy(served.index)
    assert served.retriever.vector_map is None

"""The routes with their fields, errors and OpenAPI document."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from fastrag import __version__
from fastrag.generation import DECODERS
from fastrag.generation.answers import can_stream, cut_warning
from fastrag.messages import clipped, shown
from fastrag.serve.limits import Limits, LimitsMiddleware
from fastrag.serve.records import answer_record, passage_record
from fastrag.serve.service import Service
from fastrag.serve.source import Found, Served


def _has_words(text: str) -> str:
    if not text.strip():
        raise ValueError("expected a text, got an empty one")
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("expected a text in Unicode, got half of a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_has_words), Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Retrieve(_Fields):
    """Fields of /retrieve other than the queries.

    Search-R1's clients say `topk`; rLLM's say `top_k` or `k` and may ask one `query`.
    """

    topk: Positive | None = None
    top_k: Positive | None = None
    k: Positive | None = None
    return_scores: bool | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> _Retrieve:
        for names in (("queries", "query"), ("topk", "top_k", "k")):
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) > 1 or (names[0] == "queries" and not given):
                got = " and ".join(given) or "none"
                raise ValueError(f"{names[0]}: expected one of {', '.join(names)}, got {got}")
        return self


class TextQueries(_Retrieve):
    """Questions to find passages for."""

    queries: list[Text] | None = None
    query: Text | None = None


class VectorQueries(_Retrieve):
    """Vectors to find passages for."""

    queries: list[list[float]] | None = None
    query: list[float] | None = None


class Question(_Fields):
    """A question to answer."""

    question: Text
    n_docs: Positive | None = None
    max_new_tokens: Positive | None = None
    marginal: str | None = None
    stream: bool = False


class Document(BaseModel):
    """A passage; `contents` is its title in quotation marks, and its text on the lines after it."""

    id: str
    title: str
    text: str
    contents: str


class ScoredDocument(BaseModel):
    """A passage and its inner product with the query."""

    document: Document
    score: float


class Results(BaseModel):
    """Passages of each query, best first; with scores if they were asked for."""

    result: list[list[ScoredDocument] | list[Document]]
    warnings: list[str] = []


class SingleResults(BaseModel):
    """Passages of one `query`, best first; with scores unless `return_scores` is false."""

    query: Any
    results: list[ScoredDocument] | list[Document]
    num_results: int
    warnings: list[str] = []


class CitedDocument(BaseModel):
    """A passage with p(z|x) and p(z|x,y); one of them has the largest share in the answer."""

    document: Document
    prior: float
    posterior: float
    supports: bool


class Answered(BaseModel):
    """An answer and the passages that it was read from, best first."""

    question: str
    answer: str
    log_prob: float
    probability: float
    probability_per_token: float
    n_tokens: int
    citations: list[CitedDocument]
    warnings: list[str] = []


class Health(BaseModel):
    """Answer of `GET /health`: state of the server and of its index."""

    status: str
    version: str
    passages: int
    dim: int
    queries: str
    answers: str | None
    index_checksum: str | None
    reload_error: str | None


class Error(BaseModel):
    """Answer to a refused request: the error message."""

    error: str


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Error, "description": "The body is no JSON"},
    408: {"model": Error, "description": "The body took too long"},
    413: {"model": Error, "description": "The body is too large"},
    422: {"model": Error, "description": "A field is wrong"},
    503: {"model": Error, "description": "Too many requests at once"},
    504: {"model": Error, "description": "The answer took too long"},
}


_NEW_TOKENS = 32  # of an answer, where a request does not say


def create_app(service: Service, limits: Limits | None = None, *, topk: int = 3) -> FastAPI:
    """Make the ASGI application that serves an index, and a model if there is one.

    Args:
        service: searches and answers; it is started and closed with the application.
        limits: bounds on requests; None: the defaults.
        topk: passages per query where a request does not say.

    Returns:
        The application.
    """
    limits = limits or Limits()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    # the pages of FastAPI that show the document load scripts from elsewhere
    app = FastAPI(
        title="fastrag", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.service, app.state.limits, app.state.topk = service, limits, topk
    app.add_middleware(
        LimitsMiddleware,
        limits=limits,
        observe=service.metrics.request,
        in_flight=service.metrics.in_flight,
    )
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _failed)
    served = service.served
    retrieve = _retrieve_vectors if served.retriever is None else _retrieve_texts
    kinds: dict[int | str, dict[str, Any]] = {200: {"model": Results | SingleResults}}
    app.post("/retrieve", responses=kinds | _ERRORS, summary="Find passages")(retrieve)
    if served.model is not None:
        streamed: dict[str, Any] = {"text/event-stream": {}}
        answered: dict[int | str, dict[str, Any]] = {200: {"model": Answered, "content": streamed}}
        app.post("/answer", responses=answered | _ERRORS, summary="Answer a question")(_answer)
    busy: dict[int | str, dict[str, Any]] = {code: _ERRORS[code] for code in (408, 413, 504)}
    app.get("/health", response_model=Health, responses=busy, summary="What is served")(_health)
    app.get("/metrics", response_class=_Metrics, responses=busy, summary="Counters")(_metrics)
    return app


class _Metrics(Response):
    media_type = CONTENT_TYPE_LATEST


async def _retrieve_texts(request: Request, fields: TextQueries) -> Response:
    return await _retrieve(request, fields, fields.queries, fields.query)


async def _retrieve_vectors(request: Request, fields: VectorQueries) -> Response:
    return await _retrieve(request, fields, fields.queries, fields.query)


async def _retrieve(
    request: Request, fields: _Retrieve, queries: Sequence[Any] | None, query: Any
) -> Response:
    service: Service = request.app.state.service
    limits: Limits = request.app.state.limits
    served = service.served
    default = max(1, min(request.app.state.topk, served.index.n_live))
    k = fields.topk or fields.top_k or fields.k or default
    asked = [query] if queries is None else queries
    _check_queries(served, limits, asked, k, "queries" if query is None else "query")
    found = await service.search(served, asked, k)
    batch = served.question_batch
    longest = None if batch is None else batch.max_question
    if queries is None:
        documents = _documents(found[0], fields.return_scores is not False)
        answer = {"query": query, "results": documents, "num_results": len(documents)}
        names = ["query"]
    else:
        answer = {"result": [_documents(each, bool(fields.return_scores)) for each in found]}
        names = [f"queries[{i}]" for i in range(len(found))]
    cut = [cut_warning(name, longest) for name, each in zip(names, found, strict=True) if each.cut]
    return _json(answer | ({"warnings": cut} if cut else {}))


def _check_queries(
    served: Served, limits: Limits, queries: Sequence[Any], k: int, name: str
) -> None:
    """Raise HTTPException unless the queries are within the limits and fit the index."""
    if len(queries) > limits.max_queries:
        raise _wrong(f"queries: expected at most {limits.max_queries} queries, got {len(queries)}")
    if k > served.index.n_live:
        raise _wrong(f"topk: expected 1 to {served.index.n_live}, the passages there are, got {k}")
    if len(queries) * k > limits.max_passages:
        raise _wrong(
            f"topk: expected at most {limits.max_passages} passages in an answer, got "
            f"{len(queries)} queries x {k}"
        )
    for i, query in enumerate(queries):
        place = name if name == "query" else f"queries[{i}]"
        if served.retriever is not None:
            _check_length(place, query, limits)
        elif len(query) != served.index.dim:
            raise _wrong(f"{place}: expected {served.index.dim} numbers, got {len(query)}")
    if served.retriever is None and len(queries):
        with np.errstate(over="ignore"):
            finite = np.isfinite(np.asarray(queries, dtype=np.float32)).all(axis=1)
        if not finite.all():
            place = name if name == "query" else f"queries[{int(finite.argmin())}]"
            raise _wrong(f"{place}: expected finite float32 numbers, got NaN or infinity")


def _check_length(name: str, text: str, limits: Limits) -> None:
    if len(text) > limits.max_length:
        raise _wrong(f"{name}: expected at most {limits.max_length} characters, got {len(text)}")


def _documents(found: Found, scores: bool) -> list[dict[str, Any]]:
    documents: list[dict[str, Any]] = [passage_record(passage) for passage in found.passages]
    if not scores:
        return documents
    pairs = zip(documents, found.scores, strict=True)
    return [{"document": document, "score": score} for document, score in pairs]


async def _answer(request: Request, fields: Question) -> Response:
    service: Service = request.app.state.service
    limits: Limits = request.app.state.limits
    served = service.served
    settings = _answer_settings(served, limits, fields)
    if not fields.stream:
        return _json(answer_record(await service.answer(served, fields.question, **settings)))

    async def events() -> AsyncIterator[str]:
        try:
            stream = service.stream(served, fields.question, **settings)
            async with contextlib.aclosing(stream):
                async for piece in stream:
                    if isinstance(piece, str):
                        yield f"data: {json.dumps({'text': piece})}\n\n"
                    else:
                        yield f"event: answer\ndata: {json.dumps(answer_record(piece))}\n\n"
        except Exception:
            yield f"event: error\ndata: {json.dumps({'error': _INTERNAL})}\n\n"
            raise

    return StreamingResponse(events(), media_type="text/event-stream")


def _answer_settings(served: Served, limits: Limits, fields: Question) -> dict[str, Any]:
    """Return the settings of an answer; raise HTTPException if the question cannot be answered."""
    model = served.model
    if model is None:
        raise HTTPException(404)
    _check_length("question", fields.question, limits)
    if fields.marginal is not None and fields.marginal not in DECODERS:
        raise _wrong(
            f"marginal: expected one of {', '.join(DECODERS)}, got {shown(fields.marginal)}"
        )
    if fields.stream and not can_stream(model, fields.marginal):
        raise _wrong(
            "stream: expected false, because RAG-Sequence chooses between finished answers, got "
            'true; marginal "token" can stream'
        )
    n_docs = model.n_docs if fields.n_docs is None else fields.n_docs
    if n_docs > served.index.n_live and fields.n_docs is not None:
        n_live = served.index.n_live
        raise _wrong(f"n_docs: expected 1 to {n_live}, the passages there are, got {n_docs}")
    if n_docs > limits.max_passages:
        raise _wrong(f"n_docs: expected at most {limits.max_passages}, got {n_docs}")
    longest = fields.max_new_tokens or min(_NEW_TOKENS, limits.max_new_tokens)
    if longest > limits.max_new_tokens:
        raise _wrong(f"max_new_tokens: expected at most {limits.max_new_tokens}, got {longest}")
    try:  # alone, so that a question too long for the generator fails no other of its batch
        model.processor.collate([{"question": fields.question}])
    except ValueError as error:
        raise _wrong(f"question: {clipped(error, 400)}") from error
    return {"n_docs": n_docs, "max_new_tokens": longest, "marginal": fields.marginal}


async def _health(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    served = service.served
    return {
        "status": "ok",
        "version": __version__,
        "passages": served.index.n_live,
        "dim": served.index.dim,
        "queries": "vectors" if served.retriever is None else "texts",
        "answers": None if served.model is None else served.model.marginal,
        "index_checksum": served.index.checksum() if served.index.source else None,
        "reload_error": service.reload_error,
    }


async def _metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    return _Metrics(service.metrics.text())


_INTERNAL = "internal error: the server's log says more"


def _wrong(reason: str) -> HTTPException:
    return HTTPException(422, reason)


def _json(answer: dict[str, Any], status: int = 200, headers: Any = None) -> Response:
    body = json.dumps(answer)
    return Response(body, status, headers=headers, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    reason = error.detail
    if error.status_code in (404, 405):
        routes = [
            f"{method} {path}"
            for path, methods in request.app.openapi()["paths"].items()
            for method in map(str.upper, methods)
        ]
        got = f"{request.method} {clipped(request.url.path)}"
        reason = f"path: expected one of {', '.join(routes)}, got {got}"
    return _json({"error": reason}, error.status_code, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    """Say what is wrong with the first field that is."""
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = f"body: expected JSON, got a mistake at character {first['loc'][-1]}"
        return _json({"error": f"{reason}: {first['ctx']['error']}"}, 400)
    place = [part for part in first["loc"][1:] if not str(part).endswith("]")]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    name = name.lstrip(".") or "body"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and place:
        reason = f"{name}: {message}"
    elif first["type"] == "value_error":
        reason = message
    elif first["type"] == "extra_forbidden":
        reason = f"{name}: expected no field of this name, got {shown(first['input'])}"
    elif not place:
        reason = "body: expected a JSON object, sent as content-type application/json"
    elif first["type"] == "missing":
        reason = f"{name}: expected this field, got none"
    else:
        message = message.replace("Input should be", "expected")
        reason = f"{name}: {message[:1].lower()}{message[1:]}, got {shown(first['input'])}"
    return _json({"error": clipped(reason, 600)}, 422)


async def _failed(request: Request, error: Exception) -> Response:
    return _json({"error": _INTERNAL}, 500)

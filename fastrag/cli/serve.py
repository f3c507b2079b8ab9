"""`fastrag serve`: retrieval and answers over HTTP."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from typing import Any

from fastrag.cli.options import add_device, add_prefix_cache, device_of, positive
from fastrag.cli.output import quiet
from fastrag.messages import shown

_LOOPBACK = ("127.", "localhost", "::1")


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    serve = commands.add_parser(
        "serve",
        help="retrieval and answers over HTTP",
        description="Serve POST /retrieve, POST /answer (with --model), GET /health and GET "
        "/metrics. With --model or --encoder queries are texts, with --index alone vectors.",
    )
    serve.add_argument("--model", help="model folder, run folder or checkpoint")
    serve.add_argument("--encoder", metavar="DIR", help="question encoder, in place of --model")
    serve.add_argument("--index", help="folder from `fastrag index build`")
    serve.add_argument(
        "--retrieval-only", action="store_true", help="do not load the generator of --model"
    )
    add_device(serve)
    add_prefix_cache(serve)
    serve.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine alone")
    serve.add_argument("--port", type=_port, default=8000, help="default 8000; 0: a free one")
    serve.add_argument(
        "--topk", type=positive, default=3, metavar="K", help="where a request has none (3)"
    )
    batches = serve.add_argument_group("batches")
    batches.add_argument(
        "--max-batch",
        type=positive,
        default=64,
        metavar="N",
        help="queries that are searched together (64); 1: each request alone",
    )
    batches.add_argument(
        "--max-wait-ms",
        type=_number,
        default=2.0,
        metavar="MS",
        help="how long a request waits for others (2)",
    )
    batches.add_argument(
        "--reload-every",
        type=_number,
        default=2.0,
        metavar="S",
        help="look for a replaced index (2); 0: never",
    )
    limits = serve.add_argument_group("limits")
    for name, default, unit, text in (
        ("body-mib", 16, "MIB", "body of a request"),
        ("queries", 4096, "N", "queries of a request"),
        ("length", 10_000, "N", "characters of a query"),
        ("passages", 65_536, "N", "passages of an answer, queries times topk"),
        ("new-tokens", 256, "N", "tokens of an answer of the generator"),
        ("in-flight", 1024, "N", "requests at once"),
    ):
        limits.add_argument(
            f"--max-{name}",
            type=positive,
            default=default,
            metavar=unit,
            help=f"{text} ({default})",
        )
    limits.add_argument(
        "--timeout", type=_seconds, default=30.0, metavar="S", help="of a request (30)"
    )
    limits.add_argument(
        "--grace",
        type=_seconds,
        default=10.0,
        metavar="S",
        help="for running requests after SIGTERM or Ctrl-C (10)",
    )
    serve.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Take the port, load everything, and serve until a signal comes."""
    missing = [
        name
        for name in ("fastapi", "uvicorn", "prometheus_client")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ValueError(
            f"serve: expected the extra `serve` (pip install 'fastrag-torch[serve]'), "
            f"{', '.join(missing)} not found"
        )
    quiet()
    from fastrag.serve import server
    from fastrag.serve.app import create_app
    from fastrag.serve.limits import Limits
    from fastrag.serve.service import Service
    from fastrag.serve.source import Source

    source = Source(
        model=arguments.model,
        encoder=arguments.encoder,
        index=arguments.index,
        retrieval_only=arguments.retrieval_only,
        device=device_of(arguments),
        prefix_cache_mib=arguments.prefix_cache_mib,
    )
    limits = Limits(
        max_body=arguments.max_body_mib << 20,
        max_queries=arguments.max_queries,
        max_length=arguments.max_length,
        max_passages=arguments.max_passages,
        max_new_tokens=arguments.max_new_tokens,
        max_in_flight=arguments.max_in_flight,
        timeout=arguments.timeout,
    )
    with server.listen(arguments.host, arguments.port) as bound:
        service = Service(
            source,
            max_batch=arguments.max_batch,
            max_wait=arguments.max_wait_ms / 1000,
            reload_every=arguments.reload_every,
        )
        app = create_app(service, limits, topk=arguments.topk)
        host, port = bound.getsockname()[:2]
        if not arguments.host.startswith(_LOOPBACK):
            print(
                f"fastrag: warning: everybody who reaches {host} can search; there are no "
                "passwords",
                file=sys.stderr,
            )
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        kind = "vectors" if service.served.retriever is None else "texts"
        n = service.served.index.n_live
        answering = "POST /answer, " if service.served.model is not None else ""

        def started() -> None:
            print(f"serving {n} passages at {url}")
            routes = f"POST /retrieve ({kind}), {answering}GET /health, GET /metrics"
            print(routes, flush=True)

        server.run(app, bound, grace=arguments.grace, on_started=started)
    print("fastrag: stopped", file=sys.stderr)
    return 0


def _port(text: str) -> int:
    if not text.isdecimal() or len(text) > 5 or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {shown(text)}")
    return int(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 10**6:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 10**6, got {shown(text)}")
    return number


def _seconds(text: str) -> float:
    number = _number(text)
    if number == 0:
        raise argparse.ArgumentTypeError("expected a number above 0, got 0")
    return number

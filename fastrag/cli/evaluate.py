"""`fastrag evaluate`: recall@k, exact match and F1 of a model on questions, or retrieval alone."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrag.cli.options import add_model, device_of, load_model, positive
from fastrag.cli.output import print_metrics, print_retrieval, quiet

if TYPE_CHECKING:
    from fastrag.eval import DenseRetriever, RetrievalResult

# bm25s indexes some 10,000 passages per second, and a first look should not take minutes.
BM25_PASSAGES = 300_000


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    evaluate = commands.add_parser(
        "evaluate", help="recall@k, exact match and F1 on questions; or retrieval alone"
    )
    add_model(evaluate, required=False)
    evaluate.add_argument("--questions", required=True, help="questions file, or `default:<split>`")
    evaluate.add_argument(
        "--limit", type=positive, metavar="N", help="number of fixed questions (default: all)"
    )
    evaluate.add_argument(
        "--k",
        type=positive,
        nargs="+",
        default=[1, 5, 20],
        metavar="K",
        help="the k of recall@k (default 1 5 20)",
    )
    evaluate.add_argument(
        "--batch-size",
        type=positive,
        default=16,
        metavar="N",
        help="questions per batch (default 16)",
    )
    evaluate.add_argument(
        "--max-new-tokens",
        type=positive,
        default=32,
        metavar="N",
        help="longest answer, in tokens (default 32)",
    )
    evaluate.add_argument(
        "--marginal",
        choices=("token", "sequence", "sequence-thorough"),
        help="how answers are decoded (default: as the model was trained)",
    )
    evaluate.add_argument("--out", help="write predictions to this JSONL file")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument(
        "--retrieval-only",
        action="store_true",
        help="measure recall@k, MRR and nDCG@10 without generating answers, in seconds; BM25 is "
        "measured as well if bm25s is installed",
    )
    evaluate.add_argument(
        "--encoder",
        metavar="DIR",
        help="with --retrieval-only and --index: model folder or Hub id of a question "
        "encoder, in place of --model",
    )
    evaluate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out or ".").absolute()
    if arguments.out and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"--out: expected a file in an existing folder, got {arguments.out}")
    if arguments.encoder is not None:
        if arguments.model is not None or arguments.index is None or not arguments.retrieval_only:
            raise ValueError(
                "--encoder: expected --retrieval-only and --index with it, and no --model"
            )
    elif arguments.model is None:
        raise ValueError("--model: expected a model folder, a run folder or a checkpoint, got none")
    if arguments.retrieval_only and arguments.marginal is not None:
        raise ValueError("--marginal: expected no --retrieval-only, which generates no answers")
    return _retrieval(arguments) if arguments.retrieval_only else _answers(arguments)


def _answers(arguments: argparse.Namespace) -> int:
    model = load_model(arguments)
    from fastrag.data.default import load_questions
    from fastrag.eval import evaluate
    from fastrag.train.record import write_predictions

    result = evaluate(
        model,
        load_questions(arguments.questions),
        batch_size=arguments.batch_size,
        ks=arguments.k,
        limit=arguments.limit,
        max_new_tokens=arguments.max_new_tokens,
        marginal=arguments.marginal,
        loss=True,
    )
    if arguments.out:
        write_predictions(arguments.out, result)
    marginal = arguments.marginal or model.marginal
    if arguments.json:
        print(json.dumps({"marginal": marginal, **result.metrics}))
    else:
        print_metrics(result)
        name, _, how = marginal.partition("-")
        print(f"decoding: RAG-{name.capitalize()}" + (f", {how}" if how else ""))
    return 0


def _retrieval(arguments: argparse.Namespace) -> int:
    quiet()
    from fastrag.data.default import load_questions
    from fastrag.eval import BM25Retriever, evaluate_retrieval
    from fastrag.train.models import load_retriever, open_retriever
    from fastrag.train.record import write_predictions

    retriever: DenseRetriever
    if arguments.encoder is not None:
        retriever = open_retriever(arguments.encoder, arguments.index)
    else:
        retriever = load_retriever(arguments.model, arguments.index)
    retriever.retriever.to(device_of(arguments))
    questions = load_questions(arguments.questions)
    settings: dict[str, Any] = {
        "ks": arguments.k,
        "limit": arguments.limit,
        "batch_size": arguments.batch_size,
    }
    results: dict[str, RetrievalResult] = {
        "model": evaluate_retrieval(retriever, questions, **settings)
    }
    passages = retriever.passages
    if importlib.util.find_spec("bm25s") is None:
        print("fastrag: no BM25 to compare: bm25s is not installed", file=sys.stderr)
    elif len(passages) > BM25_PASSAGES:
        print(f"fastrag: no BM25 to compare: over {BM25_PASSAGES:,} passages", file=sys.stderr)
    else:
        results["BM25"] = evaluate_retrieval(BM25Retriever(passages), questions, **settings)
    if arguments.out:
        write_predictions(arguments.out, results["model"])
    if arguments.json:
        print(json.dumps({name: result.metrics for name, result in results.items()}))
    else:
        print_retrieval(results, len(passages))
    return 0

"""`fastrag evaluate`: retrieval and answers of models on questions, or retrieval alone."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrag.cli.options import add_index, add_prefix_cache, device_of, load_model, positive
from fastrag.cli.output import print_result, print_retrieval, print_rows, quiet
from fastrag.messages import shown

if TYPE_CHECKING:
    from fastrag.eval import DenseRetriever, RetrievalResult

RETRIEVERS = ("model", "bm25")
# bm25s indexes some 10,000 passages per second, and a first look should not take minutes.
BM25_PASSAGES = 300_000


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    evaluate = commands.add_parser(
        "evaluate", help="measure retrieval and answers on questions, or retrieval alone"
    )
    evaluate.add_argument(
        "--model",
        nargs="+",
        metavar="[NAME=]DIR",
        help="model folders, run folders or checkpoints; a name stands for the folder in the table",
    )
    add_index(evaluate)
    add_prefix_cache(evaluate)
    evaluate.add_argument(
        "--questions",
        required=True,
        help="questions file; `default:<split>`; or `form:path`, for example `popqa:test.tsv`",
    )
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
        "--n-docs",
        type=positive,
        metavar="N",
        help="passages per answer (default: as the model was trained)",
    )
    evaluate.add_argument(
        "--marginal",
        nargs="+",
        metavar="WORD",
        help="how answers are decoded, for example `token sequence` (default: as the model was "
        "trained)",
    )
    evaluate.add_argument(
        "--retriever",
        nargs="+",
        choices=RETRIEVERS,
        help="what finds the passages: the model, or BM25, the softmax of whose scores is then the "
        "prior (default: model)",
    )
    evaluate.add_argument(
        "--out",
        nargs="+",
        metavar="FILE",
        help="write a table (.md, .csv), all figures (.json) or the answers (.jsonl)",
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON, one object a line")
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
    from fastrag.eval.report import check_report

    for path in arguments.out or ():
        check_report(path, "--out")
    if arguments.encoder is not None:
        if arguments.model is not None or arguments.index is None or not arguments.retrieval_only:
            raise ValueError(
                "--encoder: expected --retrieval-only and --index with it, and no --model"
            )
    elif arguments.model is None:
        raise ValueError("--model: expected a model folder, a run folder or a checkpoint, got none")
    return _retrieval(arguments) if arguments.retrieval_only else _answers(arguments)


def _answers(arguments: argparse.Namespace) -> int:
    from fastrag.data.default import load_questions
    from fastrag.eval import BM25Retriever, evaluate
    from fastrag.eval.report import Row, write_report
    from fastrag.generation import DECODERS

    models = _named(arguments.model)
    for word in arguments.marginal or ():
        if word not in DECODERS:
            raise ValueError(f"--marginal: expected some of {list(DECODERS)}, got {shown(word)}")
    retrievers = dict.fromkeys(arguments.retriever or RETRIEVERS[:1])
    if "bm25" in retrievers and importlib.util.find_spec("bm25s") is None:
        raise ValueError(
            "--retriever bm25: expected the extra `bm25` (pip install 'fastrag-torch[bm25]')"
        )
    questions = load_questions(arguments.questions)
    rows: list[Row] = []
    for name, folder in models.items():
        model = load_model(arguments, folder)
        for retriever in retrievers:
            other = BM25Retriever(model.passages) if retriever == "bm25" else None
            for marginal in dict.fromkeys(arguments.marginal or [model.marginal]):
                result = evaluate(
                    model,
                    questions,
                    batch_size=arguments.batch_size,
                    ks=arguments.k,
                    limit=arguments.limit,
                    max_new_tokens=arguments.max_new_tokens,
                    n_docs=arguments.n_docs,
                    marginal=marginal,
                    retriever=other,
                    loss=True,
                    description=f"{name} {retriever} {marginal}",
                )
                rows.append(Row(name, retriever, result))
    for path in arguments.out or ():
        write_report(path, rows, arguments.questions)
    if arguments.json:
        for row in rows:
            print(json.dumps(row.labels | row.result.metrics))
    elif len(rows) > 1:
        print_rows(rows)
    else:
        print_result(rows[0].result)
        if rows[0].retriever != RETRIEVERS[0]:
            print(f"retriever: {rows[0].retriever}")
    return 0


def _named(models: list[str]) -> dict[str, str]:
    """Return the folder of each model by its name, which is the folder if none is given."""
    named: dict[str, str] = {}
    for given in models:
        name, equals, folder = given.partition("=")
        if not equals or Path(given).exists():
            name, folder = given, given
        if not name or not folder:
            raise ValueError(f"--model: expected a folder or name=folder, got {shown(given)}")
        if name in named:
            raise ValueError(f"--model: expected distinct names, got {shown(name)} twice")
        named[name] = folder
    return named


def _retrieval(arguments: argparse.Namespace) -> int:
    quiet()
    from fastrag.data.default import load_questions
    from fastrag.eval import BM25Retriever, evaluate_retrieval
    from fastrag.eval.report import write_records
    from fastrag.train.models import load_retriever, open_retriever

    for name in ("n_docs", "marginal", "retriever"):
        if getattr(arguments, name) is not None:
            option = name.replace("_", "-")
            raise ValueError(
                f"--{option}: expected no --retrieval-only, which generates no answers"
            )
    if len(arguments.model or ()) > 1:
        raise ValueError(f"--model: expected one with --retrieval-only, got {len(arguments.model)}")
    for path in arguments.out or ():
        if Path(path).suffix != ".jsonl":
            raise ValueError(
                f"--out: expected a .jsonl file with --retrieval-only, got {shown(path)}"
            )
    retriever: DenseRetriever
    if arguments.encoder is not None:
        retriever = open_retriever(arguments.encoder, arguments.index)
    else:
        [folder] = _named(arguments.model).values()
        retriever = load_retriever(folder, arguments.index)
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
    for path in arguments.out or ():
        write_records(path, results["model"].rankings)
    if arguments.json:
        print(json.dumps({name: result.metrics for name, result in results.items()}))
    else:
        print_retrieval(results, len(passages))
    return 0

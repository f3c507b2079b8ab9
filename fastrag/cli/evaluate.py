"""`fastrag evaluate`: recall@k, exact match and F1 of a model on questions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastrag.cli.options import add_model, load_model, positive
from fastrag.cli.output import print_metrics


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    evaluate = commands.add_parser("evaluate", help="recall@k, exact match and F1 on questions")
    add_model(evaluate)
    evaluate.add_argument("--questions", required=True, help="questions file, or `default:<split>`")
    evaluate.add_argument("--limit", type=positive, help="so many fixed questions")
    evaluate.add_argument("--k", type=positive, nargs="+", default=[1, 5, 20], metavar="K")
    evaluate.add_argument("--batch-size", type=positive, default=16, metavar="N")
    evaluate.add_argument("--max-new-tokens", type=positive, default=32, metavar="N")
    evaluate.add_argument("--out", help="write predictions to this JSONL file")
    evaluate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out or ".").absolute()
    if arguments.out and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"--out: expected a file in an existing folder, got {arguments.out}")
    model = load_model(arguments)
    from fastrag.eval import evaluate
    from fastrag.train.build import collator_for
    from fastrag.train.load import write_predictions
    from fastrag.train.parts import load_questions

    result = evaluate(
        model,
        load_questions(arguments.questions),
        collator_for(model),
        batch_size=arguments.batch_size,
        ks=arguments.k,
        limit=arguments.limit,
        max_new_tokens=arguments.max_new_tokens,
        loss=True,
    )
    if arguments.out:
        write_predictions(arguments.out, result)
    print_metrics(result)
    return 0

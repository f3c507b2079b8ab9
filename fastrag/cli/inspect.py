"""`fastrag inspect`: a page on what a model retrieves, reads and answers, and on its run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fastrag.cli.options import add_model, device_of, load_model, positive


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    inspect = commands.add_parser(
        "inspect", help="write a page on passages, answers and the run as one HTML file"
    )
    add_model(inspect)
    inspect.add_argument(
        "--questions",
        required=True,
        help="questions file; `default:<split>`; or `form:path`, for example `popqa:test.tsv`",
    )
    inspect.add_argument("--out", required=True, metavar="FILE", help="the page, a .html file")
    inspect.add_argument(
        "--limit",
        type=positive,
        default=50,
        metavar="N",
        help="number of fixed questions (default 50)",
    )
    inspect.add_argument(
        "--batch-size",
        type=positive,
        default=16,
        metavar="N",
        help="questions per batch (default 16)",
    )
    inspect.add_argument(
        "--max-new-tokens",
        type=positive,
        default=32,
        metavar="N",
        help="longest answer, in tokens (default 32)",
    )
    inspect.add_argument(
        "--marginal",
        metavar="WORD",
        help="how answers are decoded, for example sequence-thorough (default: as the model was "
        "trained)",
    )
    inspect.add_argument(
        "--no-checkpoints",
        action="store_true",
        help="leave out what the checkpoints of a run retrieve",
    )
    inspect.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastrag.data.default import load_questions
    from fastrag.eval.evaluate import decoding_name
    from fastrag.inspect import (
        check_page,
        passage_history,
        read_answers,
        read_log,
        render_page,
        write_page,
    )
    from fastrag.train.callbacks import METRICS_FILE

    check_page(arguments.out, "--out")
    questions = load_questions(arguments.questions)
    folder = Path(arguments.model)
    log = read_log(folder / METRICS_FILE)
    model = load_model(arguments, arguments.model)
    chosen: dict[str, Any] = {"limit": arguments.limit, "batch_size": arguments.batch_size}
    readings = read_answers(
        model,
        questions,
        max_new_tokens=arguments.max_new_tokens,
        marginal=arguments.marginal,
        **chosen,
    )
    history = None
    if not arguments.no_checkpoints:
        history = passage_history(
            folder,
            questions,
            k=model.n_docs,
            index=arguments.index,
            device=device_of(arguments),
            **chosen,
        )
    facts = {
        "Model": arguments.model,
        "Questions from": arguments.questions,
        "Decoding": decoding_name(arguments.marginal or model.marginal),
        "Passages per question": model.n_docs,
        "Passages in the index": f"{len(model.passages):,}",
        "Temperature": f"{model.retriever.tau_value:.4g}",
    }
    title = Path(os.path.abspath(folder)).name
    write_page(
        arguments.out, render_page(readings, title=title, facts=facts, log=log, history=history)
    )
    print(f"{arguments.out}: {len(readings)} of {len(questions)} questions")
    return 0

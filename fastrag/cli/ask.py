"""`fastrag ask`: answer questions with a model."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastrag.cli.options import add_model, load_model, positive
from fastrag.cli.output import one_line
from fastrag.terminal import labelled

if TYPE_CHECKING:
    from fastrag.eval import Prediction
    from fastrag.nn import RagModel

_PROMPT = "question: "


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    ask = commands.add_parser("ask", help="answer questions")
    add_model(ask)
    ask.add_argument(
        "question",
        nargs="*",
        help="questions; without any, they are read from a prompt or line by line from a pipe",
    )
    ask.add_argument(
        "--max-new-tokens",
        type=positive,
        default=32,
        metavar="N",
        help="longest answer, in tokens (default 32)",
    )
    ask.add_argument("--json", action="store_true", help="print one JSON object per question")
    ask.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Load the model once and answer all questions."""
    given = arguments.question
    for question in given:
        if not question.strip():
            raise ValueError("question: expected a text, got an empty one")
    at_prompt = not given and sys.stdin is not None and sys.stdin.isatty()
    model = load_model(arguments, arguments.model)
    if at_prompt:
        _converse(model, arguments)
        return 0
    asked = False
    for question in given or _lines():
        _answer(model, question, arguments, several=len(given) != 1)
        asked = True
    if not asked:
        raise ValueError("question: expected one as an argument or on standard input, got none")
    return 0


def _lines() -> Iterator[str]:
    for line in sys.stdin or ():
        if line.strip():
            yield line.strip()


def _converse(model: RagModel, arguments: argparse.Namespace) -> None:
    """Answer questions from a prompt; Ctrl-C drops the current question, Ctrl-D ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing and a history
    prompt = _PROMPT if sys.stdout.isatty() else ""
    while True:
        try:
            question = input(prompt).strip()
            if question:
                _answer(model, question, arguments, several=False)
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except ValueError as error:  # the next question may be answered
            print(f"fastrag: error: {one_line(error)}", file=sys.stderr)


def _answer(
    model: RagModel, question: str, arguments: argparse.Namespace, *, several: bool
) -> None:
    from fastrag.eval import evaluate

    result = evaluate(
        model,
        [{"id": "asked", "question": question}],
        ks=(model.n_docs,),
        max_new_tokens=arguments.max_new_tokens,
        progress=False,
    )
    [prediction] = result.predictions
    if arguments.json:
        print(json.dumps(_record(model, prediction), ensure_ascii=False), flush=True)
        return
    if several:
        print(labelled("question", question))
    print(_text(model, prediction), end="\n\n" if several else "\n", flush=True)


def _record(model: RagModel, prediction: Prediction) -> dict[str, Any]:
    passage = {"id": prediction.passage_id, "title": "", "text": ""}
    if prediction.passage_id:
        row = model.passages.row_of(prediction.passage_id)
        passage |= {"title": model.passages.title(row), "text": model.passages.text(row)}
    return {
        "question": prediction.question,
        "answer": prediction.prediction,
        "probability": math.exp(prediction.log_prob),
        "probability_per_token": prediction.probability_per_token,
        "passage": passage,
    }


def _text(model: RagModel, prediction: Prediction) -> str:
    found = _record(model, prediction)
    n = prediction.n_tokens
    whole = f"{found['probability']:.3g} for all {n} tokens" if n > 1 else "the answer is one token"
    passage = found["passage"]
    lines = [
        labelled("answer", found["answer"] or "(empty: the generator ended it without a word)"),
        labelled("probability", f"{found['probability_per_token']:.3g} a token ({whole})"),
        labelled("passage", _named(passage)),
    ]
    if passage["text"]:
        lines.append(labelled("", passage["text"]))
    return "\n".join(lines)


def _named(passage: dict[str, str]) -> str:
    if not passage["id"]:
        return "(none was found)"
    return f"{passage['title']} ({passage['id']})" if passage["title"] else passage["id"]

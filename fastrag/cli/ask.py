"""`fastrag ask`: answer questions with a model."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrag.cli.options import add_model, load_model, positive
from fastrag.cli.output import one_line
from fastrag.messages import refusal
from fastrag.terminal import Flow, labelled

if TYPE_CHECKING:
    from fastrag.generation.answers import Answer
    from fastrag.nn import RagModel

_PROMPT = "question: "
_REMEMBERED = 1000  # questions in the history


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    ask = commands.add_parser(
        "ask",
        help="answer questions",
        description="Answer questions. On a terminal the words of a RAG-Token answer are printed "
        "as they come; RAG-Sequence chooses between finished answers, so it prints them whole.",
    )
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
    ask.add_argument(
        "--no-history",
        action="store_true",
        help="do not read or keep the history of the prompt, ~/.local/state/fastrag/questions",
    )
    ask.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Load the model once and answer all questions."""
    given = arguments.question
    for question in given:
        if not question.strip():
            raise ValueError("question: expected a text, got an empty one")
    at_prompt = not given and sys.stdin is not None and sys.stdin.isatty()
    model = load_model(arguments, arguments.model)
    model.processor.question_batch.warns = False  # each answer says so itself
    if at_prompt:
        with _history(keep=not arguments.no_history):
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


@contextlib.contextmanager
def _history(*, keep: bool) -> Iterator[None]:
    """Give the prompt line editing and, on the arrow keys, the questions of earlier times."""
    try:
        import readline
    except ImportError:  # a Python that was built without it
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    file = Path(state).expanduser() / "fastrag" / "questions"
    if not keep:
        yield
        return
    with contextlib.suppress(FileNotFoundError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(_REMEMBERED)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            readline.write_history_file(file)
        except OSError as error:
            said = refusal(error, file)
            print(f"fastrag: warning: questions are not kept: {said}", file=sys.stderr)


def _converse(model: RagModel, arguments: argparse.Namespace) -> None:
    """Answer questions from a prompt; Ctrl-C drops the current question, Ctrl-D ends."""
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
    from fastrag.generation.answers import answer_questions, can_stream
    from fastrag.serve.records import answer_record

    if several and not arguments.json:
        print(labelled("question", question))
    flow = None
    if sys.stdout.isatty() and not arguments.json and can_stream(model):
        flow = Flow("answer", sys.stdout)
    [answer] = answer_questions(
        model,
        [question],
        max_new_tokens=arguments.max_new_tokens,
        on_text=None if flow is None else flow.write,
    )
    for warning in answer.warnings:
        print(f"fastrag: warning: {warning}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(answer_record(answer), ensure_ascii=False), flush=True)
        return
    text = answer.text or "(empty: the generator ended it without a word)"
    if flow is None:
        print(labelled("answer", text))
    else:
        if not answer.text:
            flow.write(text)
        flow.end()
    print(_details(answer), end="\n\n" if several else "\n", flush=True)


def _details(answer: Answer) -> str:
    n = answer.n_tokens
    whole = f"{answer.probability:.3g} for all {n} tokens" if n > 1 else "the answer is one token"
    lines = [labelled("probability", f"{answer.probability_per_token:.3g} a token ({whole})")]
    cited = answer.support
    if cited is None:
        return "\n".join([*lines, labelled("passage", "(none was found)")])
    passage = cited.passage
    name = f"{passage.title} ({passage.id})" if passage.title else passage.id
    shares = f"prior {cited.prior:.3g}, posterior {cited.posterior:.3g}"
    lines += [labelled("passage", f"{name}: {shares}"), labelled("", passage.text)]
    return "\n".join(lines)

"""`fastrag warmup`: train encoders on a corpus without questions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastrag.cli.options import add_device, device_of, positive
from fastrag.cli.output import quiet
from fastrag.messages import shown

_TASKS = ("ict", "title", "spans")


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("warmup", help="train encoders on a corpus without questions")
    parser.add_argument("--corpus", required=True, help="JSONL, CSV or TSV file, or `default`")
    parser.add_argument(
        "--encoder",
        required=True,
        help="model folder or Hub id of the question encoder, and of the passage encoder unless "
        "that is given: the two then share their weights",
    )
    parser.add_argument("--passage-encoder", help="model folder or Hub id of the passage encoder")
    parser.add_argument(
        "--out",
        required=True,
        help="new folder for question_encoder and passage_encoder, as `fastrag train` reads them",
    )
    parser.add_argument(
        "--task",
        default="ict",
        type=_task,
        help="pairs to train on: ict, a sentence and the rest of its passage (default); title, "
        "titles and texts; spans, two spans of one passage",
    )
    parser.add_argument(
        "--steps", type=positive, default=500, metavar="N", help="number of steps (default 500)"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="pairs per step (default 32)"
    )
    parser.add_argument(
        "--learning-rate", type=_rate, default=2e-5, metavar="LR", help="default 2e-5"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    add_device(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    target = Path(arguments.out)
    if target.exists():
        raise ValueError(f"--out: expected a new folder, {target} is there already")
    quiet()
    from fastrag import folders
    from fastrag.data.default import load_passages
    from fastrag.train.pretrained import load_encoder, load_tokenizer
    from fastrag.train.warmup import warm_up

    question_encoder = load_encoder(arguments.encoder, "encoder", "query")
    tokenizer = load_tokenizer(arguments.encoder, "encoder")
    passage_folder = arguments.passage_encoder or arguments.encoder
    passage_encoder = load_encoder(passage_folder, "passage_encoder", "passage")
    passage_tokenizer = load_tokenizer(passage_folder, "passage_encoder")
    if arguments.passage_encoder is None:
        passage_encoder.model = question_encoder.model
    device = device_of(arguments)
    question_encoder.to(device)
    passage_encoder.to(device)
    losses = warm_up(
        question_encoder,
        passage_encoder,
        tokenizer,
        list(load_passages(arguments.corpus)),
        passage_tokenizer=passage_tokenizer,
        task=arguments.task,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        progress=True,
    )
    staging = folders.begin(target)
    parts = {
        "question_encoder": (question_encoder, tokenizer),
        "passage_encoder": (passage_encoder, passage_tokenizer),
    }
    for name, (encoder, its_tokenizer) in parts.items():
        encoder.save_pretrained(staging / name)
        its_tokenizer.save_pretrained(staging / name)
    folders.commit(staging, target)
    tenth = max(1, len(losses) // 10)
    first, last = (sum(each) / tenth for each in (losses[:tenth], losses[-tenth:]))
    print(f"loss {first:.3f} in the first {tenth} steps, {last:.3f} in the last")
    for name in parts:
        print(f"retriever.{name}: {target / name}")
    return 0


def _task(text: str) -> str:
    if text not in _TASKS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(_TASKS)}, got {shown(text)}")
    return text


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1), got {shown(text)}")
    return value

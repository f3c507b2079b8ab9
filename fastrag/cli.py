"""The command `fastrag`: train, index build, index info, index verify, evaluate, ask, info.

A mistake of the user is one line on stderr and exit status 2; FASTRAG_DEBUG=1 shows the traceback.
torch and transformers are imported inside the subcommands, so that `fastrag --help` is quick.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from fastrag import __version__

if TYPE_CHECKING:
    from fastrag.nn import RagModel

USER_ERROR = 2
INTERRUPTED = 130
_INDEX_HELP = "folder from `fastrag index build`, of a run, or of a saved index"


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; None takes the process's.

    Returns:
        The exit status: 0, 2 after a user's mistake, 128 + n after signal n.
    """
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt as error:
        # TrainingInterrupted says where the checkpoint is and which signal came
        message = str(error) or "interrupted"
        print(f"fastrag: {message}", file=sys.stderr)
        if getattr(error, "checkpoint", None) and arguments.run is _train:
            print(f"fastrag: {_resume_command(arguments)}", file=sys.stderr)
        return getattr(error, "exit_code", INTERRUPTED)
    except BrokenPipeError:
        return 0  # the reader, for example head, has seen enough
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("FASTRAG_DEBUG") == "1" or not _is_user_error(error):
            raise
        print(f"fastrag: error: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR


def _is_user_error(error: Exception) -> bool:
    """Whether the user can mend it: any RuntimeError but that of a forced backend is a fault."""
    if not isinstance(error, RuntimeError):
        return True
    from fastrag.ops.backends import BackendError

    return isinstance(error, BackendError)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastrag", description="End-to-end training of a retriever and a generator."
    )
    parser.add_argument("--version", action="version", version=f"fastrag {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    train = commands.add_parser("train", help="train from a YAML config")
    train.add_argument("config", help="YAML file of settings")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting"
    )
    train.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="continue the run in output_dir, from its newest or from this checkpoint",
    )
    train.set_defaults(run=_train)

    index = commands.add_parser("index", help="build, describe or verify a passage index")
    actions = index.add_subparsers(dest="action", required=True, metavar="action")
    build = actions.add_parser("build", help="tokenise and encode a corpus")
    build.add_argument("--corpus", required=True, help="JSONL, CSV or TSV file, or `default`")
    build.add_argument(
        "--encoder", "--passage-encoder", required=True, help="folder of the passage encoder"
    )
    build.add_argument("--generator", required=True, help="folder of the generator")
    build.add_argument("--out", required=True, help="folder to write")
    build.add_argument(
        "--template",
        type=_template,
        default="plain",
        help="plain, chat, or a YAML mapping of a template's fields: what the config that will "
        "train on the index says",
    )
    build.add_argument(
        "--max-passage", type=_positive, metavar="TOKENS", help="cut longer passages (default 256)"
    )
    build.add_argument("--batch-size", type=_positive, default=64, metavar="N")
    build.add_argument(
        "--dtype",
        type=_dtype,
        default="float32",
        help="how the index stores vectors: float32 (default), float16, bfloat16 or int8",
    )
    _add_device(build)
    build.set_defaults(run=_index_build)
    verify = actions.add_parser("verify", help="check every byte against its checksum")
    verify.add_argument("folder", help=_INDEX_HELP)
    verify.set_defaults(run=_index_verify)
    described = actions.add_parser("info", help="what an index holds, and how well it searches")
    described.add_argument("folder", help=_INDEX_HELP)
    described.add_argument(
        "--probe",
        type=_positive,
        metavar="N",
        help="search for N of its vectors and report the recall against an exact search",
    )
    described.add_argument("--k", type=_positive, metavar="K", help="hits that count (default 10)")
    described.add_argument(
        "--exact",
        metavar="DIR",
        help="index of the original vectors to compare with; default: what the index reconstructs",
    )
    described.set_defaults(run=_index_info)

    evaluate = commands.add_parser("evaluate", help="recall@k, exact match and F1 on questions")
    _add_model(evaluate)
    evaluate.add_argument("--questions", required=True, help="questions file, or `default:<split>`")
    evaluate.add_argument("--limit", type=_positive, help="so many fixed questions")
    evaluate.add_argument("--k", type=_positive, nargs="+", default=[1, 5, 20], metavar="K")
    evaluate.add_argument("--batch-size", type=_positive, default=16, metavar="N")
    evaluate.add_argument("--max-new-tokens", type=_positive, default=32, metavar="N")
    evaluate.add_argument("--out", help="write predictions to this JSONL file")
    evaluate.set_defaults(run=_evaluate)

    ask = commands.add_parser("ask", help="answer one question")
    _add_model(ask)
    ask.add_argument("question")
    ask.add_argument("--max-new-tokens", type=_positive, default=32, metavar="N")
    ask.add_argument("--json", action="store_true", help="print JSON")
    ask.set_defaults(run=_ask)

    info = commands.add_parser("info", help="versions, backends, and why a backend is missing")
    info.set_defaults(run=_info)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from fastrag.train.config import RagConfig

    config = RagConfig.load(arguments.config, arguments.set)
    _quiet()
    from fastrag.train.run import train_run

    trainer = train_run(config, arguments.resume)
    if not trainer.is_world_process_zero():
        return 0
    if trainer.last_evaluation is not None:
        _print_metrics(trainer.last_evaluation)
    state = trainer.state
    best = f" (of step {state.best_global_step}, the best by {config.best_metric})"
    print(f"model: {config.output_dir}/model{best if state.best_model_checkpoint else ''}")
    return 0


def _index_build(arguments: argparse.Namespace) -> int:
    _quiet()
    from fastrag.train import build, parts

    tokenizer = parts.load_tokenizer(arguments.generator, "generator")
    index, _ = build.build_index(
        arguments.out,
        parts.load_passages(arguments.corpus),
        parts.load_encoder(arguments.encoder, "encoder", "passage"),
        template=parts.make_template(
            arguments.template, tokenizer, parts.generator_kind(arguments.generator)
        ),
        encoder_tokenizer=parts.load_tokenizer(arguments.encoder, "encoder"),
        generator_tokenizer=tokenizer,
        max_passage=arguments.max_passage or build.MAX_PASSAGE,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        device=_device(arguments),
    )
    print(f"{arguments.out}: {len(index)} passages, {index.dim} dimensions")
    return 0


def _index_verify(arguments: argparse.Namespace) -> int:
    folder = _index_folder(arguments.folder)
    if folder == Path(arguments.folder):
        from fastrag.index import open_index

        n = len(open_index(folder, verify=True))
        print(f"{arguments.folder}: {n} vectors, all checksums hold")
        return 0
    from fastrag.train.build import load_index

    index, _ = load_index(folder.parent, verify=True)
    print(f"{arguments.folder}: {len(index)} passages, all checksums hold")
    return 0


def _index_info(arguments: argparse.Namespace) -> int:
    from fastrag.index import FlatIndex, open_index, saved

    if arguments.probe is None and (arguments.exact or arguments.k):
        raise ValueError("--probe: expected a number of queries with --exact or --k, got none")
    index = open_index(_index_folder(arguments.folder))
    for name, value in saved.describe(index).items():
        print(f"{name:<12}{value}")
    if arguments.probe is None:
        return 0
    if arguments.exact:
        exact, source = open_index(_index_folder(arguments.exact)), arguments.exact
    elif isinstance(index, FlatIndex):
        raise ValueError(
            "--exact: expected an index of the original vectors, as a FlatIndex searches what it "
            "stores exactly, got none"
        )
    else:
        exact, source = saved.exact_of(index), "its reconstructed vectors"
    k = arguments.k or 10
    found = saved.recall(index, exact, k, arguments.probe)
    n = min(arguments.probe, index.n_live)
    print(f"{f'recall@{k}':<12}{found:.4f}   ({n} queries, against {source})")
    return 0


def _index_folder(folder: str) -> Path:
    """The index itself, which lies beside the passages, in a run both in a folder of their own."""
    from fastrag import folders

    root = Path(folder)
    folders.recover(root.absolute())
    while (root / "index").is_dir():
        root /= "index"
    return root


def _evaluate(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out or ".").absolute()
    if arguments.out and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"--out: expected a file in an existing folder, got {arguments.out}")
    model = _load_model(arguments)
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
    _print_metrics(result)
    return 0


def _ask(arguments: argparse.Namespace) -> int:
    if not arguments.question.strip():
        raise ValueError("question: expected a text, got an empty one")
    model = _load_model(arguments)
    from fastrag.eval import evaluate
    from fastrag.train.build import collator_for

    result = evaluate(
        model,
        [{"id": "asked", "question": arguments.question}],
        collator_for(model),
        ks=(model.n_docs,),
        max_new_tokens=arguments.max_new_tokens,
        progress=False,
    )
    [prediction] = result.predictions
    passage: dict[str, str] = {"id": prediction.passage_id, "title": "", "text": ""}
    if prediction.passage_id:
        row = model.passages.row_of(prediction.passage_id)
        passage |= {"title": model.passages.title(row), "text": model.passages.text(row)}
    probability = math.exp(prediction.log_prob)
    if arguments.json:
        answer = {"answer": prediction.prediction, "probability": probability, "passage": passage}
        print(json.dumps(answer, ensure_ascii=False))
        return 0
    print(f"answer       {prediction.prediction}")
    print(f"probability  {probability:.3g}")
    print(f"passage      {passage['id']}  {passage['title']}")
    print(f"             {passage['text']}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from fastrag import info

    info.main()
    return 0


def _load_model(arguments: argparse.Namespace) -> RagModel:
    _quiet()
    from fastrag.train.load import load_run

    model = load_run(arguments.model, arguments.index)
    device = _device(arguments)
    model.to(device)
    model.index.to(device)
    model.passages.to(device)
    return model


def _print_metrics(result: Any) -> None:
    """Print a table of metrics with 95 % bootstrap intervals."""
    from fastrag.eval import bootstrap_interval

    answered = [each for each in result.predictions if each.answers]
    judged = [each.hit_rank for each in result.predictions if each.hit_rank is not None]
    print(f"{'metric':<12}{'value':>8}   95 % interval   ({len(result.predictions)} questions)")
    for name, value in result.metrics.items():
        values: list[float] = []
        if name.startswith("recall@"):
            values = [float(0 <= rank < int(name.partition("@")[2])) for rank in judged]
        elif name in ("em", "f1"):
            values = [each.exact_match if name == "em" else each.f1 for each in answered]
        if values:
            low, high = bootstrap_interval(values)
            print(f"{name:<12}{value:>8.3f}   {low:.3f} – {high:.3f}")
        elif name != "n_questions":
            print(f"{name:<12}{value:>8.3f}")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="model folder, run folder or checkpoint")
    parser.add_argument("--index", help="folder from `fastrag index build`")
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 …; default: a GPU if there is one")


def _device(arguments: argparse.Namespace) -> str:
    import torch

    if arguments.device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {arguments.device}: {_one_line(error)}") from error
    return str(arguments.device)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def _dtype(text: str) -> str:
    from fastrag.index.codec import DTYPES

    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(DTYPES)}, got {text!r}")
    return text


def _template(text: str) -> str | dict[str, Any]:
    """Read a template as a config's `template` may state it."""
    import yaml

    from fastrag.train.config import TEMPLATES

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if isinstance(value, dict) or value in TEMPLATES:
        return value
    raise argparse.ArgumentTypeError(
        f"expected one of {', '.join(TEMPLATES)}, or a YAML mapping of a template's fields, "
        f"got {text!r}"
    )


def _resume_command(arguments: argparse.Namespace) -> str:
    settings = "".join(f" --set {each}" for each in arguments.set)
    return f"resume with: fastrag train {arguments.config}{settings} --resume"


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _quiet() -> None:
    """Keep transformers' notes and loading bars off the terminal; errors still show."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if not issubclass(category, (DeprecationWarning, FutureWarning)):
        print(f"fastrag: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

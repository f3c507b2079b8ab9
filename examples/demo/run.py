"""The demo: train a retriever and a generator jointly, from scratch, without passage labels.

    python -m examples.demo.run --seed 0 --marginal sequence --out runs/demo

1. Tiny models with random weights, a passage store and an index, over the facts of fastrag.
2. A cloze warm-up of the generator on the passages alone.
3. Joint training on questions and answers through the RAG marginal likelihood: the retriever is
   never told which passage is right, it learns from which passages make the answer likely.
4. Evaluation on facts that were held out, with seen and unseen wordings, and with the right
   passages deleted from the index: then nothing can be answered, so nothing was memorised. Answers
   are decoded by the marginal of the training, RAG-Sequence by default.

The run folder gets `summary.json`, `metrics.jsonl`, `curve.png`, the config and the trained model,
which `fastrag ask` reads. Ctrl-C leaves a checkpoint; `--resume` goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from examples.demo import report
from examples.demo.models import TEMPLATE
from examples.demo.questions import six_questions
from examples.demo.system import (
    START,
    Settings,
    build_model,
    make_config,
    measure,
    measure_without_gold,
    warm_up_generator,
)
from fastrag import RagModel
from fastrag.data import DefaultDataset, Question, RagCollator, default_dataset
from fastrag.eval import EvalResult, Prediction
from fastrag.train import RagTrainer, TrainingInterrupted
from fastrag.train.callbacks import CURVE_FILE, METRICS_FILE, read_metrics
from fastrag.train.record import git_state

SUMMARY = "summary.json"
PROGRESS = "progress.json"  # what a resumed run has to know of the time before


def prepare(
    data: DefaultDataset, settings: Settings, out: Path, *, progress: bool
) -> tuple[RagModel, dict[str, Any]]:
    """Build the start of a run: random models, warmed-up generator, figures before training.

    Args:
        data: corpus and questions.
        settings: see `Settings`.
        out: the run folder; `start/` in it gets the model, `progress.json` the figures.
        progress: show progress bars.

    Returns:
        The model, and the figures before joint training with the seconds of the warm-up.
    """
    model = build_model(data, settings)
    begin = time.perf_counter()
    warm_up_generator(model, data, settings, progress=progress)
    seconds = time.perf_counter() - begin
    found = measure(model, data.questions["test"], name="before", progress=progress)
    before = found.metrics
    model.save_pretrained(out / START, include_index=True)
    state = {
        "settings": dataclasses.asdict(settings),
        "train_seconds": seconds,
        "recall@1_before": before["recall@1"],
        "recall@5_before": before["recall@5"],
        "em_before": before["em"],
        "ranked_first": ranked_first(found),
    }
    write_json(out / PROGRESS, state)
    return model, state


def run(
    settings: Settings,
    out: str | Path,
    *,
    data: DefaultDataset | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Do the whole demo.

    Args:
        settings: see `Settings`.
        out: the run folder. What an older run left there is removed, unless it is resumed.
        data: corpus and questions; None takes the facts that ship with fastrag.
        resume: go on from the last checkpoint, with the settings of then.
        progress: show progress bars, the curve, the six answers and the scores.

    Returns:
        What `summary.json` holds.

    Raises:
        TrainingInterrupted: Ctrl-C; the checkpoint is on disk.
        ValueError: there is nothing to resume.
    """
    out = Path(out)
    data = data or default_dataset()
    if resume:
        if not (out / PROGRESS).is_file():
            raise ValueError(f"{out}: expected a run of the demo to resume, found no {PROGRESS}")
        state = json.loads((out / PROGRESS).read_text(encoding="utf-8"))
        settings = Settings(**state["settings"])
        model = RagModel.from_pretrained(out / START)
    else:
        clear(out)
        model, state = prepare(data, settings, out, progress=progress)

    config = make_config(settings, out, progress=progress)
    config.training.eval_on_start = not resume  # the curve begins before the first step
    trainer = RagTrainer(
        model,
        config,
        RagCollator(model.processor),
        data.questions["train"],
        data.questions["dev"],
    )
    begin = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    finally:
        seconds = time.perf_counter() - begin - trainer.evaluation_seconds
        state["train_seconds"] += seconds
        write_json(out / PROGRESS, state)
    trainer.save_model()

    test, unseen = data.questions["test"], data.questions["test_unseen_wording"]
    found = measure(model, test, name="after", progress=progress)
    after = found.metrics
    six, without_passage = ask_six(model, test, found, state["ranked_first"])
    summary = {
        **{name: value for name, value in state.items() if name.endswith("_before")},
        "recall@1_after": after["recall@1"],
        "recall@5_after": after["recall@5"],
        "em_after": after["em"],
        "em_unseen_wording": measure(
            model, unseen, name="unseen wording", progress=progress
        ).metrics["em"],
        "em_gold_removed": measure_without_gold(model, test, progress=progress).metrics["em"],
        "train_seconds": round(state["train_seconds"], 1),
        "seed": settings.seed,
        "marginal": settings.marginal,
        "steps": settings.steps,
        "commit": (git_state() or {}).get("commit"),
        "six_questions": six,
        "without_passage": without_passage,
    }
    write_json(out / SUMMARY, summary)
    if progress:
        print(f"\n{report.curve(read_metrics(out / METRICS_FILE))}\n")
        print(f"{report.answers(six, without_passage)}\n\n{report.table(summary)}\n")
        print(f"figures: {out / SUMMARY}\ncurve:   {out / CURVE_FILE}\nmodel:   {out / 'model'}")
    return summary


def ranked_first(result: EvalResult) -> dict[str, str]:
    """Question id to the id of the passage ranked first."""
    return {each.id: each.retrieved[0] for each in result.predictions}


def ask_six(
    model: RagModel,
    test: Sequence[Question],
    found: EvalResult,
    first_before: Mapping[str, str],
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Collect the answers to the six questions, and ask one again without its passage.

    Args:
        model: the trained model.
        test: the test questions.
        found: the answers to them.
        first_before: question id to the passage ranked first before joint training.

    Returns:
        entries, without_passage: as `report.answers` shows them.
    """
    six = six_questions(test)
    by_id = {each.id: each for each in found.predictions}

    def passage(name: str) -> str:
        return TEMPLATE.render_passage(model.passages.passage(model.passages.row_of(name)))

    def entry(prediction: Prediction) -> dict[str, Any]:
        return {
            "question": prediction.question,
            "expected": " or ".join(prediction.answers),
            "answer": prediction.prediction,
            "correct": bool(prediction.exact_match),
            "after": passage(prediction.retrieved[0]),
        }

    entries = [
        {**entry(by_id[each.id]), "before": passage(first_before[each.id])} for each in six.asked
    ]
    if six.without_passage is None:
        return entries, None
    (bare,) = measure_without_gold(model, [six.without_passage], progress=False).predictions
    return entries, entry(bare)


def clear(out: Path) -> None:
    """Remove what an older run of the demo left; other files stay."""
    out.mkdir(parents=True, exist_ok=True)
    for folder in (out / START, out / "tensorboard", *out.glob("checkpoint-*")):
        shutil.rmtree(folder, ignore_errors=True)
    for name in (SUMMARY, PROGRESS, METRICS_FILE, CURVE_FILE):
        (out / name).unlink(missing_ok=True)


def quiet() -> None:
    """Keep loading reports and hints of the libraries below from burying the progress bars."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers|accelerate|torch")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file for people to read."""
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo.run", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--marginal", choices=("sequence", "token"), default="sequence")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="joint training steps")
    parser.add_argument("--n-docs", type=int, default=Settings.n_docs, help="passages, K")
    parser.add_argument("--prune", type=float, help="least posterior of a context that trains")
    parser.add_argument("--out", default="runs/demo", help="run folder")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args(argv)
    settings = Settings(
        seed=args.seed,
        marginal=args.marginal,
        steps=args.steps,
        n_docs=args.n_docs,
        prune=args.prune,
    )
    quiet()
    try:
        run(settings, args.out, resume=args.resume)
    except TrainingInterrupted as interrupted:
        print(f"\n{interrupted}\nto go on: python -m examples.demo.run --resume --out {args.out}")
        return interrupted.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted before the first checkpoint; nothing to resume")
        return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

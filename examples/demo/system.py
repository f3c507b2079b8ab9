"""The demo's RAG system, put together from fastrag's parts; shared by the run and the ablations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import set_seed

from examples.demo.models import TEMPLATE, tiny_encoders, tiny_generator, train_tokenizers
from examples.demo.warmup import warm_up
from fastrag import FlatIndex, PassageStore, RagModel
from fastrag.data import DefaultDataset, Question, RagProcessor
from fastrag.eval import EvalResult, evaluate
from fastrag.train import RagConfig

MAX_ANSWER = 16  # tokens; the longest answer of the embedded set has fewer
START = "start"


@dataclass(frozen=True)
class Settings:
    """What the demo can be asked to vary. The defaults were chosen on the dev splits."""

    seed: int = 0
    marginal: str = "sequence"
    steps: int = 500
    warmup_steps: int = 150
    batch_size: int = 32
    n_docs: int = 5
    explore: int = 1
    explore_pool: int = 24
    explore_tau: float = 1.0
    tau: float = 0.1
    prune: float | None = None
    refresh: int = 20
    generator_lr: float = 2e-3
    retriever_lr: float = 1e-3
    eval_steps: int = 50
    eval_limit: int = 120


def build_model(data: DefaultDataset, settings: Settings) -> RagModel:
    """Make tokenizers, encoders, generator, passage store and index, all from scratch.

    Args:
        data: corpus and questions.
        settings: see `Settings`.

    Returns:
        The model with random weights; its index holds the vectors of the random passage encoder.
    """
    set_seed(settings.seed)
    tokenizers = train_tokenizers(data.passages, data.questions["train"])
    question_encoder, passage_encoder = tiny_encoders(len(tokenizers.retriever))
    generator = tiny_generator(tokenizers.generator)
    processor = RagProcessor(
        tokenizers.retriever,
        tokenizers.generator,
        template=TEMPLATE,
        max_answer=MAX_ANSWER,
        max_context=128,
    )
    model = RagModel(
        question_encoder,
        passage_encoder,
        generator,
        FlatIndex(question_encoder.dim),
        PassageStore.build(data.passages, processor),
        processor,
        n_docs=settings.n_docs,
        marginal=settings.marginal,
        tau=settings.tau,
        learn_tau=True,
        train_passage_encoder=True,
        explore=settings.explore,
        explore_pool=settings.explore_pool,
        explore_tau=settings.explore_tau,
        prune=settings.prune,
    )
    model.refresh_index()
    return model


def warm_up_generator(
    model: RagModel, data: DefaultDataset, settings: Settings, *, progress: bool = True
) -> float:
    """Train the generator on clozes of the corpus (see `warmup`); returns the last loss."""
    return warm_up(
        model.generator,
        model.processor.generator_tokenizer,
        data.passages,
        steps=settings.warmup_steps,
        seed=settings.seed,
        progress=progress,
    )


def make_config(
    settings: Settings,
    out: str | os.PathLike[str],
    *,
    start: Path | None = None,
    progress: bool = True,
) -> RagConfig:
    """The settings of the joint training, as `fastrag train` reads them from YAML.

    Args:
        settings: see `Settings`.
        out: the run folder.
        start: folder of the models to start from; None: `start` in the run folder.
        progress: show progress bars.

    Returns:
        The config; a `config.yaml` written from it repeats the joint training.
    """
    start = Path(out) / START if start is None else start
    return RagConfig.from_dict(
        {
            "retriever": {
                "question_encoder": str(start / "question_encoder"),
                "passage_encoder": str(start / "passage_encoder"),
                "n_docs": settings.n_docs,
                "tau": settings.tau,
                "learn_tau": True,
                "train_passage_encoder": True,
                "explore": settings.explore,
                "explore_pool": settings.explore_pool,
                "explore_tau": settings.explore_tau,
                "learning_rate": settings.retriever_lr,
            },
            "reader": {"generator": str(start / "generator")},
            "loss": {"marginal": settings.marginal, "prune": settings.prune},
            "data": {
                "train_questions": "default:train",
                "eval_questions": "default:dev",
                "template": TEMPLATE.to_dict(),
                "max_answer": MAX_ANSWER,
                "max_context": 128,
            },
            "refresh": {"policy": f"every:{settings.refresh}", "batch_size": 256},
            "evaluation": {"limit": settings.eval_limit, "max_new_tokens": MAX_ANSWER},
            "training": {
                "output_dir": str(out),
                "max_steps": settings.steps,
                "per_device_train_batch_size": settings.batch_size,
                "per_device_eval_batch_size": 32,
                "learning_rate": settings.generator_lr,
                "adam_beta2": 0.98,
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {
                    "num_decay_steps": max(1, round(0.4 * settings.steps)),
                    "decay_type": "linear",
                    "min_lr_ratio": 0.05,
                },
                "warmup_steps": min(30, settings.steps // 10),
                "eval_strategy": "steps",
                "eval_steps": settings.eval_steps,
                "seed": settings.seed,
                "use_cpu": True,
                "disable_tqdm": not progress,
            },
        }
    )


def measure(
    model: RagModel, questions: Sequence[Question], *, name: str, progress: bool = True
) -> EvalResult:
    """Recall@1, recall@5 and EM on questions, with the index as it is."""
    return evaluate(
        model,
        questions,
        batch_size=64,
        ks=(1, 5),
        max_new_tokens=MAX_ANSWER,
        progress=progress,
        description=name,
    )


def measure_without_gold(
    model: RagModel, questions: Sequence[Question], *, progress: bool = True
) -> EvalResult:
    """The same after the questions' own passages are deleted from the index; it is restored.

    What is still answered was guessed, or read elsewhere.
    """
    vectors = model.index
    bare = FlatIndex(vectors.dim)
    bare.add(vectors.index_emb)
    gold = {question.positive for question in questions if question.positive}
    bare.remove(torch.tensor([model.passages.row_of(each) for each in sorted(gold)]))
    model.index = bare
    try:
        return measure(model, questions, name="without gold passages", progress=progress)
    finally:
        model.index = vectors

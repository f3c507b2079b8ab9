"""RagConfig: all settings of a training run, nested by the part of the system they configure.

A misspelt name or a value out of range is an error before anything is loaded, because a setting
that is silently ignored costs a whole run. `RagConfig.save` writes the resolved settings, so that
the run folder alone says how a model was trained.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastrag.data.templates import TEMPLATES
from fastrag.folders import replacing
from fastrag.freshness import RefreshPolicy
from fastrag.messages import shown
from fastrag.nn.arguments import check_pruning, checked_weight
from fastrag.nn.loss import RagLoss
from fastrag.train.parsing import dotted, dotted_hints, read_yaml, require, to_yaml, typed
from fastrag.train.sections import (
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    LossConfig,
    ReaderConfig,
    RefreshConfig,
    RetrieverConfig,
)
from fastrag.train.training_config import TrainingConfig

if TYPE_CHECKING:
    from transformers import TrainingArguments

LEARNING_RATE = 5e-5
LORA_LEARNING_RATE = 2e-4  # the update is a product of two small matrices, one initially zero
ANSWER_METRICS = ("em", "f1", "loss")

# Settings that a resumed run may change: where it runs and how it is watched. Most fields of
# `training` may change too, so the second list names those that must not.
FREE_ON_RESUME = (
    "retriever.index_device",
    "reader.likelihoods",
    "data.eval_questions",
    "refresh.batch_size",
    "refresh.worker",
    "evaluation.",
)
BOUND_IN_TRAINING = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "seed",
    "data_seed",
)


@dataclass
class RagConfig:
    """All settings of one training run.

    Paths are relative to the working directory.

    Args:
        retriever: encoders, index and search.
        reader: the generator.
        loss: the marginal likelihood.
        data: corpus, questions, and how both are tokenised.
        refresh: when the vectors of the index are recomputed.
        evaluation: measures of an evaluation.
        training: the fields of transformers.TrainingArguments, with defaults of our own.

    Raises:
        ValueError: a value is out of range, or two settings contradict each other.

    Example:
        >>> config = RagConfig(RetrieverConfig("minilm"), ReaderConfig("smollm2"))
        >>> config.retriever.n_docs, config.refresh.policy, config.training.learning_rate
        (5, 'frozen', 5e-05)
    """

    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.training.learning_rate is None:
            lora = self.reader.lora.rank is not None
            self.training.learning_rate = LORA_LEARNING_RATE if lora else LEARNING_RATE
        self._check_retriever()
        self._check_reader()
        self._check_loss()
        self._check_data()
        try:
            RefreshPolicy.parse(self.refresh.policy)
        except ValueError as error:
            raise ValueError(f"refresh.policy{str(error).removeprefix('refresh')}") from None
        _require_count("refresh.batch_size", self.refresh.batch_size)
        samples = self.refresh.samples
        fits = samples is None or samples >= 0
        require("refresh.samples", fits, "an integer >= 0 or null", samples)
        self.training.check()
        self._check_evaluation()

    def _check_retriever(self) -> None:
        part = self.retriever
        _require_text("retriever.question_encoder", part.question_encoder)
        _require_count("retriever.n_docs", part.n_docs)
        if part.tau is not None:
            _require_positive("retriever.tau", part.tau, " or null")
        at_least = f"an integer >= n_docs = {part.n_docs} or null"
        fits = part.rescore is None or part.rescore >= part.n_docs
        require("retriever.rescore", fits, at_least, part.rescore)
        fits = part.passage_batch is None or part.passage_batch >= 1
        require("retriever.passage_batch", fits, "an integer >= 1 or null", part.passage_batch)
        within = f"an integer from 0 to n_docs = {part.n_docs}"
        require("retriever.explore", 0 <= part.explore <= part.n_docs, within, part.explore)
        pool = part.explore_pool
        fits = pool is None or pool >= part.n_docs
        require("retriever.explore_pool", fits, at_least, pool)
        _require_positive("retriever.explore_tau", part.explore_tau)
        if part.tau_start is not None:
            _require_positive("retriever.tau_start", part.tau_start, " or null")
        falls = "null with retriever.learn_tau"
        fits = part.tau_start is None or not part.learn_tau
        require("retriever.tau_start", fits, falls, part.tau_start)
        needs = "an integer >= 1 with" if part.tau_start is not None else "0 without"
        fits = (part.tau_steps >= 1) if part.tau_start is not None else part.tau_steps == 0
        require("retriever.tau_steps", fits, f"{needs} retriever.tau_start", part.tau_steps)
        require(
            "retriever.freeze_steps", part.freeze_steps >= 0, "an integer >= 0", part.freeze_steps
        )
        rate = part.learning_rate
        require("retriever.learning_rate", 0.0 <= rate < math.inf, "a number >= 0", rate)

    def _check_reader(self) -> None:
        part, lora = self.reader, self.reader.lora
        _require_text("reader.generator", part.generator)
        # the loss scaler of fp16 expects gradients in float16 or float32
        fits = not (part.dtype == "bfloat16" and self.training.fp16)
        require("reader.dtype", fits, "auto or float32 with training.fp16", part.dtype)
        others = [each for each, value in vars(LoraConfig()).items() if vars(lora)[each] != value]
        why = f", since reader.lora.{others[0]} is set" if others else " or null"
        holds = (lora.rank is None and not others) or (lora.rank or 0) >= 1
        require("reader.lora.rank", holds, f"an integer >= 1{why}", lora.rank)
        off = "null with reader.train = false"
        require("reader.lora.rank", part.train or lora.rank is None, off, lora.rank)
        require("loss.prune", part.train or self.loss.prune is None, off, self.loss.prune)
        if part.likelihoods is not None:
            frozen = not part.train or self.loss.objective == "replug"
            only = "null unless the generator does not train (reader.train: false)"
            require("reader.likelihoods", frozen, only, part.likelihoods)
            smooths = self.loss.label_smoothing
            require("loss.label_smoothing", not smooths, "0 with reader.likelihoods", smooths)
        if lora.alpha is not None:
            _require_positive("reader.lora.alpha", lora.alpha, " or null")
        require(
            "reader.lora.dropout", 0.0 <= lora.dropout < 1.0, "a number in [0, 1)", lora.dropout
        )

    def _check_loss(self) -> None:
        part = self.loss
        _require_positive("loss.tau_lm", part.tau_lm)
        smooths = 0.0 <= part.label_smoothing < 1.0
        require("loss.label_smoothing", smooths, "a number in [0, 1)", part.label_smoothing)
        try:
            loss = RagLoss(part.marginal, part.objective, label_smoothing=part.label_smoothing)
            check_pruning(loss, part.prune, part.prune_unbiased)
            checked_weight("in_batch", part.in_batch)
            checked_weight("contrastive", part.contrastive)
        except ValueError as error:
            raise ValueError(f"loss.{error}") from None
        fits = part.posterior_encoder is None or part.objective.partition(":")[0] == "jsa"
        encoder = part.posterior_encoder
        require("loss.posterior_encoder", fits, "null unless loss.objective is jsa", encoder)
        fits = part.contrastive == 0.0 or self.data.force_labelled
        require("loss.contrastive", fits, "0 without data.force_labelled", part.contrastive)

    def _check_data(self) -> None:
        part = self.data
        known = isinstance(part.template, dict) or part.template in TEMPLATES
        require("data.template", known, f"{', '.join(TEMPLATES)} or a mapping", part.template)
        for name in ("max_question", "max_context", "max_answer"):
            _require_count(f"data.{name}", getattr(part, name))
        _require_count("data.max_passage", part.max_passage, nullable=True)
        if self.retriever.index is not None:
            given = f"null with retriever.index = {shown(self.retriever.index)}"
            own = f"{given}, which has its own passages"
            require("data.corpus", part.corpus is None, own, part.corpus)
            cut = f"{given}, whose passages were cut when it was built"
            require("data.max_passage", part.max_passage is None, cut, part.max_passage)

    def _check_evaluation(self) -> None:
        # transformers finds these mistakes at the first evaluation, which may be hours later
        part, training = self.evaluation, self.training
        _require_count("evaluation.limit", part.limit, nullable=True)
        _require_count("evaluation.max_new_tokens", part.max_new_tokens)
        _require_count("evaluation.early_stopping", part.early_stopping, nullable=True)
        require("evaluation.ks", min(part.ks, default=0) >= 1, "integers >= 1", part.ks)
        metric = training.metric_for_best_model
        if metric is not None:
            known = [*ANSWER_METRICS, *(f"recall@{k}" for k in sorted(part.ks))]
            more = ""
            if re.match(r"(eval_)?recall@\d+$", metric):
                more = " (evaluation.ks says which k are measured)"
            holds = metric.removeprefix("eval_") in known
            one_of = f"one of {', '.join(known)}{more}"
            require("training.metric_for_best_model", holds, one_of, metric)
        asks = self.data.eval_questions is not None
        no = "no without data.eval_questions"
        strategy = training.eval_strategy
        require("training.eval_strategy", asks or strategy == "no", no, strategy)
        if part.early_stopping is not None:
            best = training.load_best_model_at_end
            true = "true with evaluation.early_stopping"
            require("training.load_best_model_at_end", best, true, best)

    @property
    def best_metric(self) -> str | None:
        """The metric that picks the best checkpoint, without transformers' prefix."""
        if not self.training.load_best_model_at_end:
            return None
        return (self.training.metric_for_best_model or "loss").removeprefix("eval_")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RagConfig:
        """Make a config from a nested mapping.

        Args:
            values: a mapping of settings for each section.

        Returns:
            The config.

        Raises:
            ValueError: a name is unknown (the error names the nearest known one), a value is of
                another type or out of range, or two settings contradict each other.

        Example:
            >>> RagConfig.from_dict({"retriever": {"question_encoder": "a", "n_doc": 3}})
            Traceback (most recent call last):
            ValueError: retriever.n_doc: unknown setting; did you mean retriever.n_docs?
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"values: expected a mapping of settings, got {shown(values)}")
        given = typed(cls, values)
        if "lora" in given.get("reader", {}):
            given["reader"]["lora"] = LoraConfig(**given["reader"]["lora"])
        kinds = {each.name: each.default_factory for each in dataclasses.fields(cls)}
        return cls(**{name: kinds[name](**section) for name, section in given.items()})  # type: ignore[operator]

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None
    ) -> RagConfig:
        """Read a config from a YAML file.

        Args:
            path: the file.
            overrides: settings that replace those of the file, nested as in `from_dict`.

        Returns:
            The config.

        Raises:
            ValueError: as `from_dict`; the message names the file.
            OSError: the file cannot be read.

        Example:
            >>> RagConfig.load("train.yaml", {"retriever": {"n_docs": 8}})   # doctest: +SKIP
        """
        values = _merged(read_yaml(path), overrides or {})
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def check_resumes(self, other: RagConfig, where: str) -> None:
        """Check that a run with these settings continues a run with others.

        Args:
            other: the settings that the run was started with.
            where: the file they were read from, for the error message.

        Raises:
            ValueError: a setting differs that a resumed run must not change.

        Example:
            >>> import copy
            >>> before = RagConfig.from_dict(
            ...     {"retriever": {"question_encoder": "a"}, "reader": {"generator": "b"}}
            ... )
            >>> after = copy.deepcopy(before)
            >>> after.retriever.n_docs = 8
            >>> after.check_resumes(before, "runs/x/config.yaml")
            Traceback (most recent call last):
            ValueError: retriever.n_docs: expected 5 as in runs/x/config.yaml, got 8
        """
        bound = [f"training.{name}" for name in BOUND_IN_TRAINING]
        hints = dotted_hints(RagConfig)
        then, now = (dict(dotted(dataclasses.asdict(each), hints)) for each in (other, self))
        for name, before in then.items():
            free = name.startswith(FREE_ON_RESUME)
            if name.startswith("training."):
                free = name not in bound
            if not free:
                require(name, now[name] == before, f"{shown(before)} as in {where}", now[name])

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as nested mappings of plain values.

        `training` holds the fields that `TrainingConfig` states and those that differ from
        transformers' defaults.

        Returns:
            A new dict in the order of the fields.

        Example:
            >>> RagConfig(RetrieverConfig("a"), ReaderConfig("b")).to_dict()["loss"]["marginal"]
            'token'
        """
        sections = dataclasses.asdict(self)
        return sections | {"training": self.training.written()}

    def to_yaml(self) -> str:
        """Return the settings as the text of a YAML file, see `to_dict`."""
        return to_yaml(self.to_dict())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the resolved settings as YAML; the file is replaced in one step.

        Args:
            path: the file.

        Example:
            >>> RagConfig(RetrieverConfig("a"), ReaderConfig("b")).save("c.yaml")  # doctest: +SKIP
        """
        with replacing(path) as temporary:
            temporary.write_text(self.to_yaml(), encoding="utf-8")

    def trainer_settings(self) -> dict[str, Any]:
        """Return the settings of a RagTrainer that TrainingArguments does not have, by name."""
        evaluation = self.evaluation
        return {
            "retriever_lr": self.retriever.learning_rate,
            "generator_lr": self.training.learning_rate,
            "refresh": self.refresh.policy,
            "encode_batch_size": self.refresh.batch_size,
            "refresh_samples": self.refresh.samples,
            "refresh_worker": self.refresh.worker,
            "eval_limit": evaluation.limit,
            "eval_ks": evaluation.ks,
            "eval_max_new_tokens": evaluation.max_new_tokens,
            "early_stopping": evaluation.early_stopping,
            "tau_start": self.retriever.tau_start,
            "tau_steps": self.retriever.tau_steps,
            "freeze_steps": self.retriever.freeze_steps,
        }

    def training_arguments(self) -> TrainingArguments:
        """Make the `transformers.TrainingArguments` of a run.

        Returns:
            The arguments.

        Raises:
            ValueError: TrainingArguments refuses a value, a schedule or a reporter is unknown, or
                the device cannot compute in the precision.

        Example:
            >>> config = RagConfig(RetrieverConfig("a"), ReaderConfig("b"))
            >>> args = config.training_arguments()
            >>> args.learning_rate, args.remove_unused_columns
            (5e-05, False)
        """
        stops = self.evaluation.early_stopping is not None
        restores = self.training.restore_callback_states_from_checkpoint or stops
        return self.training.arguments(
            label_smoothing_factor=self.loss.label_smoothing,
            restore_callback_states_from_checkpoint=restores,
        )


def _merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` updated by `overrides`, nested mappings included."""
    merged = dict(values)
    for name, value in overrides.items():
        below = merged.get(name)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = _merged(below, value)
        merged[name] = value
    return merged


def _require_text(name: str, value: str) -> None:
    require(name, bool(value), "a model folder or a Hub id", value)


def _require_count(name: str, value: int | None, nullable: bool = False) -> None:
    expected = "an integer >= 1 or null" if nullable else "an integer >= 1"
    require(name, (value is None and nullable) or (value or 0) >= 1, expected, value)


def _require_positive(name: str, value: float, otherwise: str = "") -> None:
    require(name, 0.0 < value < math.inf, f"a number > 0{otherwise}", value)

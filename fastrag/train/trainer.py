"""RagTrainer: transformers.Trainer for a retriever and a generator that train together."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import (
    ExportableState,
    PrinterCallback,
    ProgressCallback,
)

from fastrag import folders
from fastrag.eval import DenseRetriever, EvalResult, evaluate_retrieval
from fastrag.eval import evaluate as evaluate_model
from fastrag.eval.evaluate import decoding_name
from fastrag.eval.retrieval import recall
from fastrag.freshness import IndexRefresher, RefreshPolicy
from fastrag.messages import reason
from fastrag.nn.card import model_card, write_card
from fastrag.profiling import stage
from fastrag.train import checkpoint_contents, checkpoints
from fastrag.train.batches import ResumableCollator, count_label_tokens
from fastrag.train.callbacks import (
    CURVE_FILE,
    METRICS_FILE,
    CheckpointCallback,
    CurveCallback,
    MetricsFileCallback,
    RefreshCallback,
    TerminalCallback,
)
from fastrag.train.collapse import CollapseCallback, remedies
from fastrag.train.config import RagConfig
from fastrag.train.distributed import SamePassagesCallback, check_processes
from fastrag.train.optimizer import MasterWeights, needs_masters, parameter_groups
from fastrag.train.record import MODEL_FOLDER, write_record
from fastrag.train.signals import SignalCallback, SignalGuard, TrainingInterrupted
from fastrag.train.statistics import StepClockCallback, StepStatistics

if TYPE_CHECKING:
    from fastrag.data import Question, RagCollator
    from fastrag.nn import RagModel

TENSORBOARD_FOLDER = "tensorboard"


class RagTrainer(Trainer):
    """Train question encoder, passage encoder and generator through the marginal likelihood.

    A `transformers.Trainer`: accumulation, mixed precision, distribution, schedules, callbacks and
    reporting are its own. The differences: retriever and generator have a learning rate each; label
    smoothing is part of `RagLoss`; evaluation answers questions (recall@k, EM, F1); checkpoints
    hold the index; SIGINT and SIGTERM end training with a checkpoint.

    Args:
        model: the model.
        args: a `RagConfig`, or `transformers.TrainingArguments`.
        data_collator: makes batches from questions.
        train_dataset: training questions.
        eval_dataset: questions for the evaluation, or several such lists by name.
        retriever_lr: learning rate of encoders and temperature; None: the config's, or
            `args.learning_rate`.
        generator_lr: learning rate of the generator, likewise.
        refresh: a setting such as `every:200` or `rolling:64`, or a RefreshPolicy; None: the
            config's.
        encode_batch_size: passages per batch of a refresh.
        refresh_samples: passages that are encoded in each step to measure how stale the index is;
            None: as many as the policy asks for.
        refresh_worker: device of a process that encodes, such as `cuda:1`; None: no other process.
        eval_limit: number of fixed questions to evaluate on; None: all.
        eval_ks: the k of recall@k.
        eval_max_new_tokens: longest answer in evaluation.
        callbacks: further callbacks.
        optimizers: an optimiser and a schedule of your own.

    Raises:
        ValueError: a setting is out of range, or an argument of another kind.

    Example:
        >>> trainer = RagTrainer(model, config, collator, questions)     # doctest: +SKIP
        >>> trainer.train()                                              # doctest: +SKIP
        >>> trainer.save_model()                                         # doctest: +SKIP
    """

    optimizer: Any
    control: Any

    def __init__(
        self,
        model: RagModel,
        args: TrainingArguments | RagConfig,
        data_collator: RagCollator,
        train_dataset: Sequence[Question | Mapping[str, Any]] | None = None,
        eval_dataset: Sequence[Any] | dict[str, Sequence[Any]] | None = None,
        *,
        retriever_lr: float | None = None,
        generator_lr: float | None = None,
        refresh: str | RefreshPolicy | None = None,
        encode_batch_size: int | None = None,
        refresh_samples: int | None = None,
        refresh_worker: str | None = None,
        eval_limit: int | None = None,
        eval_ks: Sequence[int] | None = None,
        eval_max_new_tokens: int | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if not isinstance(args, (RagConfig, TrainingArguments)):
            raise ValueError(
                f"args: expected a RagConfig or TrainingArguments, got {type(args).__name__}"
            )
        if not callable(data_collator):
            raise ValueError(
                f"data_collator: expected a RagCollator, got {type(data_collator).__name__}"
            )
        config = args if isinstance(args, RagConfig) else None
        configured = {} if config is None else config.trainer_settings()
        if isinstance(args, RagConfig):
            args = args.training_arguments()
        else:
            args = copy.copy(args)
            check_processes(args)

        def setting(given: Any, name: str, default: Any) -> Any:
            return given if given is not None else configured.get(name, default)

        self.config = config
        self.retriever_lr = float(setting(retriever_lr, "retriever_lr", args.learning_rate))
        self.generator_lr = float(setting(generator_lr, "generator_lr", args.learning_rate))
        self.eval_limit = setting(eval_limit, "eval_limit", None)
        self.eval_ks = tuple(setting(eval_ks, "eval_ks", (1, 5)))
        self.eval_max_new_tokens = int(setting(eval_max_new_tokens, "eval_max_new_tokens", 32))
        self.evaluation_seconds = 0.0
        self.last_evaluation: EvalResult | None = None
        self.statistics = StepStatistics()
        self.refresher = IndexRefresher(
            model,
            setting(refresh, "refresh", "frozen"),
            int(setting(encode_batch_size, "encode_batch_size", 256)),
            samples=setting(refresh_samples, "refresh_samples", None),
            worker=setting(refresh_worker, "refresh_worker", None),
            seed=args.seed,
        )
        self.include_index = self.refresher.changing or (
            config is not None and not config.retriever.index
        )
        if getattr(args, "enable_jit_checkpoint", False):
            raise ValueError(
                "enable_jit_checkpoint: expected False, since RagTrainer itself saves a checkpoint "
                "after SIGTERM, got True"
            )
        # transformers would delete old checkpoints before the new one is finished
        keep, args.save_total_limit = args.save_total_limit, None
        args.remove_unused_columns = False
        if args.label_smoothing_factor:
            model.loss_fn.label_smoothing = args.label_smoothing_factor
            args.label_smoothing_factor = 0.0  # Trainer's own smoother would need the logits
        run = Path(args.output_dir)
        patience = configured.get("early_stopping")
        super().__init__(
            model=model,
            args=args,
            data_collator=ResumableCollator(data_collator, args.seed),
            train_dataset=None if train_dataset is None else _as_list(train_dataset),
            eval_dataset=eval_dataset,
            callbacks=[
                SamePassagesCallback(model),
                RefreshCallback(self.refresher),
                MetricsFileCallback(run / METRICS_FILE),
                CurveCallback(run / METRICS_FILE, run / CURVE_FILE),
                CollapseCallback(model),
                *remedies(model, configured),
                *([EarlyStoppingCallback(patience)] if patience else []),
                *(callbacks or []),
            ],
            optimizers=optimizers,
        )
        # First, so that the other callbacks of an event find a whole checkpoint, or the best index.
        self.callback_handler.callbacks.insert(0, CheckpointCallback(self.refresher, keep))
        for callback in self.callback_handler.callbacks:
            # otherwise logs from before training go to the working directory
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(run / TENSORBOARD_FOLDER)
        self.add_callback(StepClockCallback(self.statistics, self.data_collator))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.remove_callback(PrinterCallback)
            self.add_callback(TerminalCallback)

    # ---- training ------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest of the run folder.
            kwargs: passed on to `transformers.Trainer.train`.

        Returns:
            transformers' TrainOutput.

        Raises:
            TrainingInterrupted: a signal came; its checkpoint is on disk.
            ValueError: there is no such checkpoint, it belongs to another configuration, or a file
                of it was altered; a run starts where another one left checkpoints; another process
                trains in the run folder; or a checkpoint cannot be written.
        """
        run = Path(self.args.output_dir)
        with folders.locked(run) if self.is_world_process_zero() else nullcontext():
            return self._train(run, resume_from_checkpoint, **kwargs)

    def _train(self, run: Path, resume_from_checkpoint: str | bool | None, **kwargs: Any) -> Any:
        if self.is_world_process_zero():
            checkpoints.remove_leftovers(run)
        self.accelerator.wait_for_everyone()
        checkpoint = self._resolve(resume_from_checkpoint)
        if checkpoint is None:
            checkpoints.require_no_checkpoints(run)
            checkpoint_contents.track_index(self.model)
        else:
            self._restore(checkpoint)
        if self.is_world_process_zero():
            write_record(run, self.config)
        loading = self.model.register_load_state_dict_post_hook(checkpoint_contents.forgive_frozen)
        with SignalGuard() as guard:
            callback = SignalCallback(guard)
            self.add_callback(callback)
            try:
                output = super().train(
                    resume_from_checkpoint=None if checkpoint is None else str(checkpoint), **kwargs
                )
            except Exception as error:
                self._explain(error)
                raise
            finally:
                loading.remove()
                self.remove_callback(callback)
                for each in self.callback_handler.callbacks:
                    if isinstance(each, TerminalCallback):
                        each.close()
        step = self.state.global_step
        if guard.received is not None and step < self.state.max_steps:
            folder = run / f"checkpoint-{step}"
            saved = str(folder) if checkpoints.is_checkpoint(folder) else None
            raise TrainingInterrupted(guard.received, step, saved)
        return output

    def finish_index(self) -> None:
        """Encode passages with vectors of older weights, if training changes the index."""
        if self.refresher.changing:
            self.refresher.finish(self.state.global_step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained model as `RagModel.from_pretrained` reads it.

        The index is saved with the model if training changes it or the run has built it (see the
        attribute `include_index`). Another index is named by its checksum.

        Args:
            output_dir: the folder; None: `model` in the run folder.
            _internal_call: transformers sets it when it begins a checkpoint in `output_dir`.
        """
        if _internal_call and output_dir is not None:
            self._begin_checkpoint(Path(output_dir))
            return
        self.finish_index()
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            target = output_dir or Path(self.args.output_dir) / MODEL_FOLDER
            card = self.model_card()
            model.save_pretrained(target, include_index=self.include_index, card=card)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def model_card(self, **settings: Any) -> str:
        """Describe the model, its data and the last evaluation; see `fastrag.nn.card.model_card`.

        Args:
            settings: `name`, and fields of `huggingface_hub.ModelCardData`, such as `license`.
        """
        data: dict[str, Any] = {}
        if self.config is not None:
            named = self.config.data
            data = {
                "corpus": named.corpus,
                "training questions": named.train_questions,
                "evaluation questions": named.eval_questions,
            }
        if hasattr(self.train_dataset, "__len__"):
            data["number of training questions"] = len(self.train_dataset)
        found = self.last_evaluation
        metrics: dict[str, float | str] = {}
        if found is not None:
            metrics = {"decoding": found.decoding, **found.metrics}
        known = {name: value for name, value in data.items() if value is not None}
        model = self.accelerator.unwrap_model(self.model)
        return model_card(model, data=known, metrics=metrics, **settings)

    def create_model_card(self, model_name: str | None = None, **settings: Any) -> None:
        """Write the card of the run folder, which `push_to_hub` uploads."""
        if self.is_world_process_zero():
            write_card(self.args.output_dir, self.model_card(name=model_name, **settings))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward of one micro-batch, as `transformers.Trainer` does."""
        with stage("training_step"):
            return super().training_step(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Take the micro-batches of a step, and count their label tokens on all ranks."""
        if self.state.global_step >= self.state.max_steps:
            # transformers takes a step more if it resumes after the last one
            return [], None
        batches = list(islice(epoch_iterator, num_batches))
        if any(batch.get("labels") is None for batch in batches):
            raise ValueError("train_dataset: expected questions with answers, got none in a batch")
        if not self.args.average_tokens_across_devices:  # each rank divides by its own tokens
            return super().get_batch_samples(iter(batches), num_batches, device)
        return batches, count_label_tokens(batches, device=device) if batches else None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch and add the outputs to the statistics.

        `num_items_in_batch`, the counted label tokens of the whole accumulated batch over all
        devices, becomes the loss's normalizer: one batch of 8 equals four of 2.
        """
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if self.model.training:
            self.statistics.add(outputs, inputs["labels"], self.model.retriever.search_seconds)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimiser, with a learning rate each for generator and retriever.

        Weight decay applies to matrices. Parameters of fewer bits than float32 are updated through
        float32 copies.
        """
        if self.optimizer is None:
            module = self.model if model is None else model
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, module)
            settings.pop("lr", None)
            groups = parameter_groups(
                module,
                retriever_lr=self.retriever_lr,
                reader_lr=self.generator_lr,
                weight_decay=self.args.weight_decay,
            )
            # accelerate replaces the parameters of the groups by shards, which have no copies
            if needs_masters(groups) and not self._sharded:
                self.optimizer = MasterWeights(kind, groups, **settings)
            else:
                self.optimizer = kind(groups, **settings)
        return self.optimizer

    # ---- logging and evaluation ----------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the statistics of the window to a training log, then report it."""
        if "loss" in logs:
            logs.update(self.statistics.summary(self.accelerator))
            logs.update(self.refresher.summary(self.state.global_step))
            likelihoods = self.model.reader.likelihoods
            logs.update({} if likelihoods is None else likelihoods.summary())
        super().log(logs, *args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Answer the evaluation questions and report recall@k, EM, F1 and the loss.

        Answers are decoded by the marginal that the model is trained with, which the progress bar
        and the model card name.

        Args:
            eval_dataset: questions, or lists of them by name; None: the trainer's.
            ignore_keys: not used.
            metric_key_prefix: put before every metric's name.

        Returns:
            Metrics by name. All others and the predictions are in `last_evaluation`.

        Raises:
            ValueError: there are no questions.
        """

        def answer(questions: Any, progress: bool) -> Mapping[str, float]:
            self.last_evaluation = evaluate_model(
                self.model,
                questions,
                batch_size=self.args.eval_batch_size,
                ks=self.eval_ks,
                limit=self.eval_limit,
                max_new_tokens=self.eval_max_new_tokens,
                loss=True,
                progress=progress,
                description=f"evaluate {decoding_name(self.model.marginal)}",
            )
            return self.last_evaluation.summary

        return self._measure(answer, eval_dataset, metric_key_prefix)

    def evaluate_retrieval(
        self, eval_dataset: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Report recall@k of the evaluation questions, without generating answers.

        Args:
            eval_dataset: questions, or lists of them by name; None: the trainer's.
            metric_key_prefix: put before every metric's name.

        Returns:
            Metrics by name; `recall@k` is that of `evaluate`.

        Raises:
            ValueError: there are no questions.
        """
        question_batch = self.model.processor.question_batch
        retriever = DenseRetriever(self.model.retriever, question_batch)

        def rank(questions: Any, progress: bool) -> Mapping[str, float]:
            result = evaluate_retrieval(
                retriever, questions, ks=self.eval_ks, limit=self.eval_limit, progress=progress
            )
            return recall(result.rankings, self.eval_ks)

        return self._measure(rank, eval_dataset, metric_key_prefix)

    def _measure(
        self, measure: Callable[[Any, bool], Mapping[str, float]], questions: Any, prefix: str
    ) -> dict[str, float]:
        """Measure each set of questions, log the figures and tell the callbacks."""
        questions = self.eval_dataset if questions is None else questions
        if questions is None:
            raise ValueError("eval_dataset: expected questions, got none")
        sets = {prefix: questions}
        if isinstance(questions, dict):
            sets = {f"{prefix}_{name}": part for name, part in questions.items()}
        progress = not self.args.disable_tqdm and self.is_world_process_zero()
        result: dict[str, float] = {}
        for name, part in sets.items():
            start = time.perf_counter()
            values = measure(part, progress)
            seconds = time.perf_counter() - start
            self.evaluation_seconds += seconds
            metrics = {f"{name}_{metric}": value for metric, value in values.items()}
            metrics[f"{name}_runtime"] = round(seconds, 3)
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
            result |= metrics
        return result

    # ---- checkpoints ---------------------------------------------------------------------------

    def _begin_checkpoint(self, folder: Path) -> None:
        """Write model, index and refresher; transformers writes the rest."""
        self.refresher.flush()
        if self.args.should_save:
            checkpoints.begin(folder)
            # first, because saving the index also computes the checksum that a state dict contains
            checkpoint_contents.write_index(self.model, folder, changing=self.refresher.changing)
        self.accelerator.wait_for_everyone()
        state = self.accelerator.get_state_dict(self.model_wrapped) if self._sharded else None
        if self.args.should_save:
            checkpoint_contents.write_weights(self.model, folder, state)
            checkpoint_contents.write_refresher(self.refresher, folder)
        # transformers appends to the list of callbacks of one class with each checkpoint, and fails
        # for a callback that was not there before a resume
        exportable = [
            type(each).__name__
            for each in [*self.callback_handler.callbacks, self.control]
            if isinstance(each, ExportableState)
        ]
        self.state.stateful_callbacks = {
            name: [] if exportable.count(name) > 1 else {} for name in exportable
        }

    def _restore(self, checkpoint: Path) -> None:
        """Check a whole checkpoint, and load its index and refresher.

        transformers loads the rest.
        """
        optimizer = None
        if not (self.args.save_only_model or self._sharded):
            checkpoint_contents.require_training_state(checkpoint, self.args.world_size)
            optimizer = self.create_optimizer()
        checkpoint_contents.check_files(checkpoint)
        checkpoint_contents.check_weights(self.model, checkpoint)
        checkpoint_contents.check_training_state(checkpoint, optimizer)
        checkpoint_contents.read_refresher(self.refresher, checkpoint)
        checkpoint_contents.read_index(self.model, checkpoint)

    def _explain(self, error: Exception) -> None:
        """Raise a clear error for a checkpoint that could not be written or read."""
        run = Path(self.args.output_dir)
        folder = run / f"checkpoint-{self.state.global_step}"
        if (folder / checkpoints.UNFINISHED).exists():
            if self.args.should_save:
                checkpoints.withdraw(folder)
            whole = checkpoints.checkpoints(run)
            left = f"resume from {whole[-1]}" if whole else "there is none before it"
            raise ValueError(
                f"{folder}: expected room for a checkpoint in a writable folder, got "
                f"{reason(error)}; {left}"
            ) from error
        # of the best checkpoint: the one to resume from was checked
        if isinstance(error, SafetensorError):
            best = Path(str(self.state.best_model_checkpoint))
            checkpoint_contents.check_files(best, checkpoint_contents.MODEL_FILES)

    @property
    def _sharded(self) -> bool:
        """Whether ranks hold shards, which accelerate gathers and writes in files of its own."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _resolve(self, resume: str | bool | None) -> Path | None:
        """Return the checkpoint to resume from: the newest one, if a run folder is given."""
        if resume is None or resume is False:
            return None
        folder = Path(self.args.output_dir if resume is True else resume)
        folders.recover(folder)
        if (folder / checkpoints.STATE).is_file():
            return folder
        found = checkpoints.checkpoints(folder)
        if not found:
            raise ValueError(
                f"resume_from_checkpoint: expected a checkpoint in {folder}, found none"
            )
        return found[-1]


def _as_list(questions: Any) -> Any:
    """Return questions as a list, unless they can be indexed already."""
    return questions if hasattr(questions, "__getitem__") else list(questions)

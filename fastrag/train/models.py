"""Build the model that a RagConfig describes, or load the model of a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, set_seed

from fastrag.data import RagCollator, RagProcessor
from fastrag.data.default import DEFAULT, load_passages
from fastrag.data.processor import MAX_PASSAGE, shortest
from fastrag.data.tokenization import QuestionBatch
from fastrag.eval import DenseRetriever
from fastrag.index import Index, PassageStore
from fastrag.index.encoding import encode_passages
from fastrag.nn import RagModel, TextEncoder, checkpoint
from fastrag.nn.checkpoint import CONFIG as MODEL_CONFIG
from fastrag.nn.hub import model_folder
from fastrag.nn.likelihoods import LikelihoodCache
from fastrag.nn.retriever import Retriever
from fastrag.train.checkpoint_contents import (
    MODEL_FILES,
    check_files,
    read_encoder,
    read_index,
    read_weights,
)
from fastrag.train.checkpoints import STATE, checkpoints
from fastrag.train.config import RagConfig
from fastrag.train.distributed import is_first_process, launched_processes
from fastrag.train.indexing import build_index, load_index
from fastrag.train.pretrained import (
    choose_dtype,
    generator_kind,
    load_encoder,
    load_generator,
    load_tokenizer,
    make_template,
)
from fastrag.train.record import CONFIG_FILE, INDEX_FOLDER, MODEL_FOLDER

# Smallest cosine of a stored vector and a new one; vectors in half precision stay above it.
_SAME_ENCODER_COSINE = 0.99


def build_model(
    config: RagConfig,
    progress: bool = True,
    *,
    resume: bool = False,
    on_loaded: Callable[[], None] | None = None,
) -> RagModel:
    """Load or build everything that a config names and join it into a RagModel.

    Without `retriever.index`, the corpus is encoded into the run folder. The random seed is set
    first, because some weights, such as those of LoRA, start from random values.

    Args:
        config: the settings.
        progress: show progress bars.
        resume: the model is for a resumed run, which uses the index in the run folder as it is.
        on_loaded: called after encoders, generator and a given index are read, and before a corpus
            is encoded.

    Returns:
        The model, on the CPU.

    Raises:
        ValueError: a part is missing or does not fit the others.
    """
    built = Path(config.training.output_dir) / INDEX_FOLDER
    if (
        config.retriever.index is None
        and not (resume and built.is_dir())
        and launched_processes() > 1
    ):
        # every process would encode the corpus into the same folder
        raise ValueError(
            "retriever.index: expected a folder from `fastrag index build` where several "
            "processes train, got null"
        )
    set_seed(config.training.seed)
    question_folder = config.retriever.question_encoder
    passage_folder = config.retriever.passage_encoder or question_folder
    question_encoder = load_encoder(question_folder, "question_encoder", "query")
    passage_encoder = load_encoder(passage_folder, "passage_encoder", "passage")
    posterior_folder = config.loss.posterior_encoder
    posterior_encoder = (
        None
        if posterior_folder is None
        else load_encoder(posterior_folder, "posterior_encoder", "query")
    )
    generator_folder = config.reader.generator
    dtype, stored = choose_dtype(config)
    if progress and stored not in (dtype, None) and is_first_process():
        said = [str(each).removeprefix("torch.") for each in (dtype, stored)]
        tqdm.write(f"generator: {said[0]} weights, stored in {said[1]} (see reader.dtype)")
    generator: PreTrainedModel = load_generator(generator_folder, config.reader.lora, dtype)
    question_tokenizer = load_tokenizer(question_folder, "question_encoder")
    generator_tokenizer = load_tokenizer(generator_folder, "generator")
    kind = generator_kind(generator_folder)
    own_tokenizer = config.retriever.passage_encoder is not None
    processor = RagProcessor.for_encoders(
        question_encoder,
        passage_encoder,
        question_tokenizer,
        generator_tokenizer,
        kind=kind,
        template=make_template(config.data.template, generator_tokenizer, kind),
        passage_tokenizer=(
            load_tokenizer(passage_folder, "passage_encoder") if own_tokenizer else None
        ),
        max_question=config.data.max_question,
        max_passage=config.data.max_passage or MAX_PASSAGE,
        max_answer=config.data.max_answer,
        max_context=config.data.max_context,
    )
    ready = config.retriever.index or (built if resume and built.is_dir() else None)
    found = None if ready is None else load_index(ready)
    if on_loaded is not None:
        on_loaded()
    if found is not None:
        index, passages = found
    else:
        corpus = config.data.corpus or DEFAULT
        index, passages = build_index(
            built,
            load_passages(corpus),
            passage_encoder,
            processor,
            batch_size=config.refresh.batch_size,
            dtype=config.retriever.index_dtype,
            origin={"encoder": passage_folder, "corpus": corpus},
            device="cuda" if not config.training.use_cpu and torch.cuda.is_available() else None,
            progress=progress,
        )
        passage_encoder.to("cpu")
    model = RagModel(
        question_encoder,
        passage_encoder,
        generator,
        index,
        passages,
        processor,
        n_docs=config.retriever.n_docs,
        marginal=config.loss.marginal,
        tau=config.retriever.tau,
        learn_tau=config.retriever.learn_tau,
        train_passage_encoder=config.retriever.train_passage_encoder,
        explore=config.retriever.explore,
        explore_pool=config.retriever.explore_pool,
        explore_tau=config.retriever.explore_tau,
        rescore=config.retriever.rescore,
        passage_batch=config.retriever.passage_batch,
        null_passage=config.retriever.null_passage,
        label_smoothing=config.loss.label_smoothing,
        objective=config.loss.objective,
        tau_lm=config.loss.tau_lm,
        prune=config.loss.prune,
        prune_unbiased=config.loss.prune_unbiased,
        in_batch=config.loss.in_batch,
        contrastive=config.loss.contrastive,
        posterior_encoder=posterior_encoder,
    )
    if not config.reader.train:
        model.generator.requires_grad_(False)
    if config.reader.likelihoods is not None:
        folder = Path(config.reader.likelihoods)
        if launched_processes() > 1:  # one process at a time writes to a folder
            folder = folder / f"rank-{os.environ.get('RANK', '0')}"
        model.reader.likelihoods = LikelihoodCache(folder)
    if config.retriever.index is not None and not resume:
        _warn_of_another_encoder(index, passages, passage_encoder, passage_folder)
    return model


def build_collator(model: RagModel, config: RagConfig) -> RagCollator:
    """Make the collator of a run's training questions.

    Args:
        model: the model; its processor is used.
        config: the choice of answers, and the labelled passages that are used.

    Returns:
        The collator.
    """
    return RagCollator(
        model.processor,
        answer_choice=config.data.answer_choice,
        passages=model.passages,
        force=config.data.force_labelled,
        exclude_source=config.data.exclude_source,
        posterior=model.posterior_encoder is not None,
    )


def _warn_of_another_encoder(
    index: Index, passages: PassageStore, encoder: TextEncoder, folder: str
) -> None:
    """Warn if the index holds vectors of another encoder: encode a few passages and compare."""
    rows = torch.linspace(0, len(index) - 1, 16).long().unique()
    fresh = encode_passages(encoder, passages, rows=rows)
    stored = index.vectors(rows)
    cosine = float(torch.cosine_similarity(fresh, stored).median())
    if not cosine >= _SAME_ENCODER_COSINE:
        warnings.warn(
            f"index: its vectors are not those of the passage encoder {folder} (median cosine "
            f"{cosine:.2f}); set passage_encoder to the encoder that it was built with, or build "
            "the index again",
            stacklevel=3,
        )


def load_run(
    folder: str | os.PathLike[str], index: str | os.PathLike[str] | None = None
) -> RagModel:
    """Load a model from a model folder, a run folder, or a checkpoint of a run.

    Args:
        folder: a folder that `save_pretrained` wrote, a run folder (its `model` is loaded, or the
            newest checkpoint while there is none), or a checkpoint of a run.
        index: a folder from `fastrag index build`; None: the index of the model.

    Returns:
        The model, in eval mode on the CPU.

    Raises:
        ValueError: the folder is none of these, or there is no index.
    """
    path = find_model(folder)
    if (path / STATE).is_file():
        model = _load_checkpoint(path, index)
    else:
        model = RagModel.from_pretrained(path, *_index_of(path, index))
    processor = model.processor
    processor.question_batch = _within_window(processor.question_batch, model.question_encoder)
    return model


def load_retriever(
    folder: str | os.PathLike[str], index: str | os.PathLike[str] | None = None
) -> DenseRetriever:
    """Load the retriever of a model, run or checkpoint, without its generator.

    Args:
        folder: a model folder or its Hub id, a run folder, or a checkpoint of a run.
        index: a folder from `fastrag index build`; None: the index of the model.

    Returns:
        The retriever, in eval mode on the CPU.

    Raises:
        ValueError: as `load_run`.
    """
    path = find_model(folder)
    if (path / STATE).is_file():
        config = _config_of(path, index)
        known = config.retriever
        dense = open_retriever(known.question_encoder, str(known.index), config.data.max_question)
        read_encoder(dense.retriever.question_encoder, path)
        if index is None:
            read_index(dense.retriever, path)
        return dense
    vectors, passages = _index_of(path, index)
    retriever, processor = checkpoint.load_retriever(path, vectors, passages)
    batch = _within_window(processor.question_batch, retriever.question_encoder)
    return DenseRetriever(retriever, batch)


def open_retriever(
    encoder: str | os.PathLike[str],
    index: str | os.PathLike[str],
    max_question: int | None = None,
) -> DenseRetriever:
    """Make a retriever of an encoder and an index.

    Args:
        encoder: folder or Hub id of the question encoder.
        index: a folder from `fastrag index build`.
        max_question: question tokens; None: as many as the encoder takes.

    Returns:
        The retriever, in eval mode on the CPU.

    Raises:
        ValueError: a folder cannot be read, or the index was built with another tokenizer or width.
    """
    name = "question_encoder"
    question_encoder = load_encoder(encoder, name, "query")
    tokenizer = load_tokenizer(encoder, name)
    vectors, passages = load_index(index)
    passages.check_tokenizer("encoder", tokenizer)
    retriever = Retriever(question_encoder, None, vectors, passages).eval()
    length = shortest(max_question, question_encoder.max_length)
    batch = QuestionBatch(tokenizer, question_encoder.prefix, length)
    return DenseRetriever(retriever, _within_window(batch, question_encoder))


def find_model(folder: str | os.PathLike[str]) -> Path:
    """Return the folder of the model that a run or a Hub id stands for.

    Args:
        folder: a model folder or its Hub id, a run folder, or a checkpoint of a run.

    Returns:
        The folder of a saved model or of a checkpoint; of a run that has no model yet, its newest
        checkpoint.

    Raises:
        ValueError: the folder is none of these.
    """
    path = model_folder("model", str(folder), holding=", a run, a checkpoint", whole=True)
    if (path / STATE).is_file() or (path / MODEL_CONFIG).is_file():
        return path
    if not (path / MODEL_FOLDER).exists() and (saved := checkpoints(path)):
        return saved[-1]
    if not (path / MODEL_FOLDER / MODEL_CONFIG).is_file():
        raise ValueError(
            f"model: expected a model, a run or a checkpoint, {path} has no {MODEL_CONFIG}"
        )
    return path / MODEL_FOLDER


def _config_of(path: Path, index: str | os.PathLike[str] | None) -> RagConfig:
    """Return the settings of a checkpoint's run, with the index to load."""
    saved = path.parent / CONFIG_FILE
    if not saved.is_file():
        raise ValueError(f"model: expected the run's settings next to the checkpoint, in {saved}")
    check_files(path, MODEL_FILES)
    config = RagConfig.load(saved)
    if index is not None:
        config.retriever.index = os.fspath(index)
    elif config.retriever.index is None:
        config.retriever.index = str(path.parent / INDEX_FOLDER)
    return config


def _load_checkpoint(path: Path, index: str | os.PathLike[str] | None) -> RagModel:
    config = _config_of(path, index)
    model = build_model(config, progress=False, resume=True)
    read_weights(model, path)
    if index is None:
        read_index(model, path)
    return model.eval()


def _index_of(
    path: Path, index: str | os.PathLike[str] | None
) -> tuple[Index | None, PassageStore | None]:
    if index is not None:
        return load_index(index)
    if (path / INDEX_FOLDER).is_dir():
        return None, None  # part of the model folder
    saved = path.parent / CONFIG_FILE
    if saved.is_file() and (known := RagConfig.load(saved).retriever.index) is not None:
        return load_index(known)
    raise ValueError(f"index: expected a folder from `fastrag index build`, {path} holds none")


def _within_window(batch: QuestionBatch, encoder: Any) -> QuestionBatch:
    """Return a question batch that cuts questions at the encoder's positions, if it has fewer.

    Args:
        batch: tokenises questions for the encoder.
        encoder: the question encoder.
    """
    config = getattr(getattr(encoder, "model", None), "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:  # of some kinds -1 says that none is known
        return batch
    return QuestionBatch(batch.tokenizer, batch.prefix, shortest(batch.max_question, positions))

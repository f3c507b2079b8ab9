"""From a RagConfig to the objects that train: index, model, collator."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from fastrag import folders
from fastrag.data import Passage, RagCollator, RagProcessor
from fastrag.index import FlatIndex, Index, PassageStore
from fastrag.index.encoding import encode_passages
from fastrag.index.passages import FORMAT as PASSAGES_FORMAT
from fastrag.index.storage import check_replaceable
from fastrag.ops import backends
from fastrag.train.config import RagConfig
from fastrag.train.parts import (
    DEFAULT,
    choose_dtype,
    generator_kind,
    load_encoder,
    load_generator,
    load_passages,
    load_tokenizer,
    make_template,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastrag.nn import RagModel, TextEncoder

INDEX_FOLDER = "index"
PASSAGES_FOLDER = "passages"
MAX_PASSAGE = 256  # tokens, where nobody says how many
# How far a stored vector may point away from a fresh one: storage in half precision stays above.
_SAME_ENCODER_COSINE = 0.99


def build_index(
    folder: str | os.PathLike[str],
    passages: Iterable[Passage],
    encoder: TextEncoder,
    processor: RagProcessor,
    *,
    batch_size: int = 64,
    dtype: str = "float32",
    device: str | None = None,
    origin: Mapping[str, str] | None = None,
    progress: bool = True,
) -> tuple[Index, PassageStore]:
    """Tokenise a corpus, encode it, and write `passages` and `index` into a folder.

    Args:
        folder: where both go; it appears whole, and an older index in it stays until then.
        passages: the corpus.
        encoder: the passage encoder.
        processor: tokenises the passages.
        batch_size: passages per encoder batch.
        dtype: how the index stores vectors, as for FlatIndex.
        device: where the encoder runs; None leaves it where it is.
        origin: names of the `encoder` and the `corpus`, which `fastrag index info` prints with the
            date.
        progress: show a progress bar.

    Returns:
        The index and the passages.

    Raises:
        ValueError: the corpus is empty or malformed, or the folder holds something else.
        RuntimeError: `FASTRAG_BACKEND` names a backend that cannot run here.
    """
    out = Path(folder)
    _check_replaceable(out)
    backends.check_forced()  # a search would tell, after the whole corpus is encoded
    staging = folders.begin(out)
    try:
        store = PassageStore.build(
            passages,
            processor,
            origin={**(origin or {}), "built": datetime.now(UTC).isoformat(timespec="seconds")},
            dir=staging / PASSAGES_FOLDER,
            progress=progress,
        )
        if device is not None:
            encoder.to(device)
        vectors = encode_passages(encoder, store, batch_size, progress=progress)
        index = FlatIndex(vectors.shape[1], dtype)
        index.add(vectors)
        index.passages_checksum = store.checksum()
        index.save(staging / INDEX_FOLDER)
        _check_replaceable(out)  # what was put there meanwhile
        folders.commit(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return load_index(out)


def _check_replaceable(out: Path) -> None:
    """Raise unless a folder is new, empty, or holds an index and its passages and nothing else."""
    parts = {INDEX_FOLDER: Index.formats(), PASSAGES_FOLDER: (PASSAGES_FORMAT,)}
    if out.exists() and not (out.is_dir() and {each.name for each in out.iterdir()} <= set(parts)):
        raise ValueError(f"out: expected a new folder or an index to replace, {out} is neither")
    for name, formats in parts.items():
        check_replaceable(out / name, *formats)


def load_index(folder: str | os.PathLike[str], verify: bool = False) -> tuple[Index, PassageStore]:
    """Load what `build_index` wrote; another kind of index may have taken the place of its index.

    Args:
        folder: the folder.
        verify: check every byte against the checksums.

    Returns:
        The index and the passages.

    Raises:
        ValueError: a part is missing or damaged, or the two are not of one build.
    """
    root = Path(folder)
    return folders.read_whole(root, lambda: _read_index(root, verify))


def _read_index(root: Path, verify: bool) -> tuple[Index, PassageStore]:
    for part in (INDEX_FOLDER, PASSAGES_FOLDER):
        if not (root / part).is_dir():
            raise ValueError(
                f"index: expected a folder from `fastrag index build`, {root / part} is missing"
            )
    index = Index.load(root / INDEX_FOLDER, verify=verify)
    store = PassageStore.load(root / PASSAGES_FOLDER, verify=verify)
    if len(index) != len(store):
        raise ValueError(
            f"{root}: expected index and passages of one length, got {len(index)} and {len(store)}"
        )
    if index.passages_checksum not in (None, store.checksum()):
        raise ValueError(
            f"{root}: expected the passages that the index was built with, checksum "
            f"{index.passages_checksum}, got {store.checksum()}"
        )
    return index, store


def build_model(
    config: RagConfig,
    progress: bool = True,
    *,
    resume: bool = False,
    on_loaded: Callable[[], None] | None = None,
) -> RagModel:
    """Load or build everything that a config names and join it into a RagModel.

    Without `index`, the corpus is encoded into the run folder. Sets the random seed, which what
    starts from random values, such as LoRA, depends on.

    Args:
        config: the settings.
        progress: show progress bars.
        resume: the model is for a run that goes on: an index in the run folder is taken as it is.
        on_loaded: called once encoders, generator and a given index have been read, before a corpus
            is encoded.

    Returns:
        The model, on the CPU.

    Raises:
        ValueError: a part is missing or does not fit the others.
    """
    import torch
    from transformers import set_seed

    from fastrag.nn import RagModel
    from fastrag.train.distributed import is_first_process, launched_processes

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
        label_smoothing=config.loss.label_smoothing,
        objective=config.loss.objective,
        tau_lm=config.loss.tau_lm,
    )
    if config.retriever.index is not None and not resume:
        _warn_of_another_encoder(index, passages, passage_encoder, passage_folder)
    return model


def build_collator(model: RagModel, config: RagConfig) -> RagCollator:
    """Make the collator of a run's training questions.

    Args:
        model: the model; its processor is used.
        config: the choice of answers.

    Returns:
        The collator.
    """
    return RagCollator(model.processor, answer_choice=config.data.answer_choice)


def _warn_of_another_encoder(
    index: Index, passages: PassageStore, encoder: TextEncoder, folder: str
) -> None:
    """Encode a few passages and compare: nothing else tells two encoders of one width apart."""
    import torch

    rows = torch.linspace(0, len(index) - 1, 16).long().unique()
    fresh = encode_passages(encoder, passages, rows=rows)
    stored = index.vectors(rows)
    cosine = float(torch.cosine_similarity(fresh, stored).median())
    if not cosine >= _SAME_ENCODER_COSINE:
        warnings.warn(
            f"index: its vectors are not those of the passage encoder {folder} (median cosine "
            f"{cosine:.2f}); set passage_encoder to the encoder that it was built with, or build "
            "it anew",
            stacklevel=3,
        )

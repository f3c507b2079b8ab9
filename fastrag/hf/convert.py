"""RagModel from a RAG model of transformers, and back. Both share the same modules."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    DPRContextEncoder,
    RagConfig,
    RagSequenceForGeneration,
    RagTokenForGeneration,
)

from fastrag.data import RagProcessor, Template
from fastrag.data.tokenization import load_tokenizer
from fastrag.hf.corpora import from_dataset, read_hf_index
from fastrag.hf.retriever import IndexRetriever, rag_processor
from fastrag.index import Index, PassageStore
from fastrag.messages import shown
from fastrag.nn.encoders import TextEncoder
from fastrag.nn.heads import architecture
from fastrag.nn.hub import model_folder
from fastrag.nn.model import RagModel
from fastrag.nn.quiet import without_bars

_CLASSES = {"token": RagTokenForGeneration, "sequence": RagSequenceForGeneration}
_TOKENIZERS = ("question_tokenizer", "generator_tokenizer")
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_CONTEXT_ENCODER = "rag.ctx_encoder."


def from_hf(
    cls: type[RagModel],
    source: Any,
    index: Index | None,
    passages: PassageStore | None,
    processor: RagProcessor | None,
    tokenizers: tuple[Any, Any],
    settings: dict[str, Any],
) -> RagModel:
    """Compose a RagModel of the parts of a RAG model of transformers; see `RagModel.from_hf`."""
    saved: tuple[Any, Any] = (None, None)
    if isinstance(source, str | os.PathLike):
        source, saved = _load(source)
    if not isinstance(source, (RagTokenForGeneration, RagSequenceForGeneration)):
        raise ValueError(
            "model: expected a RagTokenForGeneration, a RagSequenceForGeneration or the folder of "
            f"one, got {type(source).__name__}"
        )
    config, retriever = source.config, source.retriever
    if retriever is not None:
        saved = (retriever.question_encoder_tokenizer, retriever.generator_tokenizer)
    if isinstance(retriever, IndexRetriever):
        processor = processor or retriever.processor
        if index is None and passages is None:
            index, passages = retriever.index.index, retriever.passages
    if processor is None:
        processor = rag_processor(config, *_known(tokenizers, saved))
    elif tokenizers != (None, None):
        raise ValueError("processor: expected one, or tokenizers to make it with, got both")
    if index is None and passages is None:
        index, passages = _own_index(source, processor)
    elif index is None or passages is None:
        missing = "index" if index is None else "passages"
        raise ValueError(f"{missing}: expected index and passages together, got None")
    if config.exclude_bos_score and isinstance(source, RagSequenceForGeneration):
        warnings.warn(
            "exclude_bos_score: expected False, got True: a RagModel scores every token of an "
            "answer, BOS too if the tokenizer writes one",
            stacklevel=3,
        )
    found = source.rag.ctx_encoder
    encoder = None if found is None else TextEncoder(found, "pooler")
    defaults: dict[str, Any] = {
        "question_encoder": TextEncoder(source.question_encoder, "pooler"),
        "passage_encoder": encoder,
        "generator": source.generator,
        "n_docs": config.n_docs,
        "marginal": "token" if isinstance(source, RagTokenForGeneration) else "sequence",
        "tau": 1.0,
        "train_passage_encoder": source.rag.context_encoder_training,
        "label_smoothing": config.label_smoothing,
    }
    parts: dict[str, Any] = {"index": index, "passages": passages, "processor": processor}
    made = cls(**parts | defaults | settings)
    return made if source.training else made.eval()


def to_hf(model: RagModel) -> Any:
    """Compose a RAG model of transformers of the parts of a RagModel; see `RagModel.to_hf`."""
    if model.adapter.kind != "seq2seq" or hasattr(model.generator, "peft_config"):
        kind = "PEFT adapters" if hasattr(model.generator, "peft_config") else "a decoder alone"
        raise ValueError(
            f"generator: expected a plain encoder-decoder, which transformers' RAG classes take, "
            f"got {architecture(model.generator)} with {kind}"
        )
    if model.null_passage:
        raise ValueError(
            "null_passage: expected False, since transformers has no passage without text, got True"
        )
    if model.retriever.log_tau is not None or model.tau != 1.0:
        raise ValueError(
            f"tau: expected 1, since transformers does not divide scores, got "
            f"{model.retriever.tau_value:g}"
        )
    processor = model.processor
    question_encoder = _plain_encoder("question_encoder", model.question_encoder)
    generator_config = model.generator.config
    config = RagConfig.from_question_encoder_generator_configs(
        question_encoder.config,
        generator_config,
        n_docs=model.n_docs,
        max_combined_length=processor.max_context,
        retrieval_vector_size=model.index.dim,
        label_smoothing=model.loss_fn.label_smoothing,
        **{name: getattr(generator_config, name, None) for name in _SPECIAL_TOKENS},
        **_separators(processor.template, getattr(generator_config, "prefix", None) or ""),
    )
    made = _CLASSES[model.marginal](
        config=config,
        question_encoder=question_encoder,
        generator=model.generator,
        retriever=IndexRetriever(
            config,
            model.index,
            model.passages,
            processor.question_tokenizer,
            processor.generator_tokenizer,
            processor,
        ),
    )
    if model.passage_encoder is not None:
        made.rag.ctx_encoder = _plain_encoder("passage_encoder", model.passage_encoder)
        if model.train_passage_encoder:
            made.set_context_encoder_for_training(made.rag.ctx_encoder)
            made.retriever.set_ctx_encoder_tokenizer(processor.passage_tokenizer)
    return made if model.training else made.eval()


def _known(given: tuple[Any, Any], saved: tuple[Any, Any]) -> list[Any]:
    tokenizers = []
    for name, mine, found in zip(_TOKENIZERS, given, saved, strict=True):
        if mine is None and found is None:
            raise ValueError(f"{name}: expected a tokenizer, as the model comes without one")
        tokenizers.append(found if mine is None else mine)
    return tokenizers


def _own_index(model: Any, processor: RagProcessor) -> tuple[Index, PassageStore]:
    """Return index and passages of a model's retriever, or those that its config names."""
    config = model.config
    dataset = getattr(getattr(model.retriever, "index", None), "dataset", None)
    if dataset is not None:
        return from_dataset(dataset, processor)
    if config.index_name == "custom" and config.passages_path is not None:
        return read_hf_index(config.passages_path, processor, index_path=config.index_path)
    raise ValueError(
        "index: expected an index with passages, as the model has no retriever with a dataset and "
        "its config names none (index_name='custom', passages_path), got None"
    )


def _plain_encoder(name: str, encoder: Any) -> Any:
    """Return the transformers model of an encoder that adds nothing to its pooler's output."""
    if not isinstance(encoder, TextEncoder):
        raise ValueError(f"{name}: expected a TextEncoder, got {type(encoder).__name__}")
    if (encoder.pooling, encoder.normalize, encoder.prefix) != ("pooler", False, ""):
        raise ValueError(
            f"{name}: expected pooling 'pooler' without normalisation and prefix, as transformers' "
            f"RAG classes take a vector, got {encoder.extra_repr()}"
        )
    return encoder.model


def _separators(template: Template, prefix: str) -> dict[str, str]:
    """Return title_sep and doc_sep of a template that transformers can reproduce."""
    before, _, rest = template.context.partition("{passage}")
    doc_sep, _, after = rest.partition("{question}")
    opening, _, rest = template.passage.partition("{title}")
    title_sep, _, closing = rest.partition("{text}")
    written = Template(
        context=f"{prefix}{{passage}}{doc_sep}{{question}}",
        passage=f"{{title}}{title_sep}{{text}}",
    )
    if template != written:
        raise ValueError(
            f"template: expected passage before question and title before text, with nothing "
            f"around them, which transformers can reproduce, got {template}"
        )
    return {"title_sep": title_sep, "doc_sep": doc_sep}


@without_bars()
def _load(source: str | os.PathLike[str]) -> tuple[Any, tuple[Any, Any]]:
    """Load a saved RAG model and its tokenizers, which may be None.

    transformers saves a context encoder with the model and leaves it out when it loads the model;
    here it is read as the DPR encoder that it is.
    """
    folder = model_folder("model", source, holding=" of a RAG model of transformers", whole=True)
    try:
        config = RagConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"model: expected {folder} to hold a RAG model: {error}") from error
    named = next(iter(config.architectures or ()), None)
    kinds = {kind.__name__: kind for kind in _CLASSES.values()}
    if named not in kinds:
        raise ValueError(
            f"{folder / 'config.json'}: expected architectures to name one of {list(kinds)}, got "
            f"{shown(named)}"
        )
    if not config.generator.is_encoder_decoder:
        raise ValueError(
            f"{folder / 'config.json'}: expected an encoder-decoder as generator, to load with "
            f"transformers, got {shown(config.generator.model_type)}; pass a live model instead"
        )
    model, extra = _read(kinds[named], folder)
    if any(name.startswith(_CONTEXT_ENCODER) for name in extra):
        model.rag.ctx_encoder, _ = _read(
            DPRContextEncoder,
            folder,
            config=config.question_encoder,
            key_mapping={f"^{re.escape(_CONTEXT_ENCODER)}": ""},
        )
    parts = ("question_encoder_tokenizer", "generator_tokenizer")
    question, generator = (load_tokenizer(folder / part) for part in parts)
    return model, (question, generator)


def _read(kind: Any, folder: Path, **settings: Any) -> tuple[Any, list[str]]:
    """Load a model whose every weight must be there; return it and the names left over."""
    try:
        model, report = kind.from_pretrained(
            folder, local_files_only=True, dtype="auto", output_loading_info=True, **settings
        )
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder}: expected a readable {kind.__name__}: {error}") from error
    for what in ("missing_keys", "mismatched_keys"):
        if report[what]:
            raise ValueError(
                f"{folder}: expected the weights of a {kind.__name__}, got {what} "
                f"{sorted(map(str, report[what]))[:4]}"
            )
    return model, [str(name) for name in report["unexpected_keys"]]

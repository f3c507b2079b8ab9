"""RagModel as a folder: encoders and generator as Hugging Face folders, settings as JSON.

    question_encoder/
    passage_encoder/ posterior_encoder/ (unless shared; settings alone if it has the same model)
    generator/ (or a PEFT adapter)
    generator_base/ (only under an adapter whose base model has no name of its own)
    index/ passages/ (if asked for)   rag_config.json   processor.json   manifest.json
    README.md (the model card, if given)

`FolderWriter` writes it: whole or not at all. Nothing is pickled. The manifest lists all files
except those of index and passages, which have manifests of their own, because transformers and PEFT
replace a missing file by a default or ask the hub for it.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor, nn

from fastrag import folders, manifests
from fastrag.data.processor import CONFIG as PROCESSOR_CONFIG
from fastrag.data.processor import RagProcessor
from fastrag.data.templates import Template
from fastrag.data.tokenization import load_tokenizer
from fastrag.manifests import flag, integer, items, number, one_of, optional, record, text
from fastrag.nn.arguments import is_sharded
from fastrag.nn.card import write_card
from fastrag.nn.encoders import TextEncoder
from fastrag.nn.generators import GeneratorAdapter
from fastrag.nn.heads import base_model
from fastrag.nn.hub import model_folder
from fastrag.nn.index_reference import FIELDS as INDEX_FIELDS
from fastrag.nn.index_reference import IndexReference
from fastrag.nn.loss import MARGINALS
from fastrag.nn.quiet import without_bars
from fastrag.nn.sentence_encoder import CONFIG_NAME as SENTENCE_CONFIG
from fastrag.nn.sentence_encoder import SentenceEncoder

if TYPE_CHECKING:
    from fastrag.nn.model import RagModel
    from fastrag.nn.retriever import Retriever

FORMAT = "fastrag-model"
VERSION = 3
CONFIG = "rag_config.json"
_SETTINGS = (
    "n_docs",
    "marginal",
    "train_passage_encoder",
    "explore",
    "explore_pool",
    "explore_tau",
)
HOLDS = ("index", "passages")  # with manifests of their own
_LOSS_SETTINGS = ("label_smoothing", "objective", "tau_lm")
_LATER_SETTINGS = (
    "rescore",
    "passage_batch",
    "null_passage",
    "prune",
    "prune_unbiased",
    "in_batch",
    "contrastive",
)
# name -> its tokenizer in the processor
_OTHER_ENCODERS = {
    "passage_encoder": "passage_tokenizer",
    "posterior_encoder": "question_tokenizer",
}
_KEPT = ("own", "shared", "same model", "none")
_MANIFEST = record({}, {"parts": items(manifests.relative_path())})  # version 1 lists none
_SAVED = record(
    {
        "fastrag": text(),
        "kind": one_of("seq2seq", "causal"),
        "generator": one_of("model", "adapter", "adapter on generator_base"),
        "passage_encoder": one_of(*_KEPT),
        "n_docs": integer(1),
        "marginal": one_of(*MARGINALS),
        "train_passage_encoder": flag(),
        "explore": integer(),
        "explore_pool": optional(integer(1)),
        "explore_tau": number(above=0),
        "tau": number(above=0),
        "learn_tau": flag(),
        "label_smoothing": number(0),
        "objective": text(),  # as RetrieverTerm knows it
        "tau_lm": number(above=0),
        "index": INDEX_FIELDS,
    },
    {
        # versions 1 and 2, which have no file of the processor
        "max_context": integer(1),
        "template": record({}),
        # models saved before these settings existed do not have them
        "rescore": optional(integer(1)),
        "passage_batch": optional(integer(1)),
        "posterior_encoder": one_of(*_KEPT),
        "null_passage": flag(),
        "null_score": number(),
        "prune": optional(number(0)),
        "prune_unbiased": flag(),
        "in_batch": number(0),
        "contrastive": number(0),
    },
    closed=True,
)


def save_model(
    model: RagModel,
    path: str | os.PathLike[str],
    *,
    merge_adapter: bool = False,
    include_index: bool = False,
    card: str | None = None,
) -> None:
    """Write `model` as the folder `path`; see `RagModel.save_pretrained`.

    Raises:
        ValueError: sharded weights, an encoder that cannot write itself, a generator that is not
            of transformers, several PEFT adapters, a merge that would change a tied embedding, or
            a folder that cannot be replaced.
    """
    from fastrag.index.storage import FolderWriter

    if is_sharded(model):
        raise ValueError(
            "model: expected whole weights to save, got the shards of fully_shard; load "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
            "StateDictOptions(full_state_dict=True)) into a model without shards and save that"
        )
    for name in ("question_encoder", *_OTHER_ENCODERS):
        encoder = getattr(model, name)
        if encoder is not None and not hasattr(encoder, "save_pretrained"):
            raise ValueError(
                f"{name}: expected a module with save_pretrained, got {type(encoder).__name__}"
            )
    if not isinstance(model.adapter, GeneratorAdapter):
        raise ValueError(
            f"adapter: expected one of adapt_generator to save with, got "
            f"{type(model.adapter).__name__}, whose {type(model.generator).__name__} no "
            "from_pretrained can read; save model.state_dict() instead"
        )
    if model.loss_fn.objective is None:
        raise ValueError(
            f"objective: expected a retriever term with a word to save, got "
            f"{type(model.loss_fn.retriever_term).__name__} without one"
        )
    model.retriever.fold_map()  # the folder holds vectors that are searched as they are
    with FolderWriter(path, format=FORMAT, version=VERSION, holds=HOLDS) as writer:
        folder = writer.folder
        model.question_encoder.save_pretrained(folder / "question_encoder")
        for name, tokenizer in _OTHER_ENCODERS.items():
            encoder, encoder_folder = getattr(model, name), folder / name
            match _encoder_kept(model.question_encoder, encoder):
                case "own":
                    encoder.save_pretrained(encoder_folder)
                    # an encoder of another run needs it there, even if it is that of the questions
                    getattr(model.processor, tokenizer).save_pretrained(encoder_folder)
                case "same model":
                    encoder_folder.mkdir()
                    encoder.save_settings(encoder_folder)
        kept = _save_generator(model.generator, folder, merge_adapter)
        model.processor.save_pretrained(folder)
        if include_index:
            model.index.save(folder / "index")
            model.passages.save(folder / "passages")
        if card is not None:
            write_card(folder, card)
        manifests.write(folder / CONFIG, _settings(model, kept))
        writer.commit({"parts": _parts(folder)})


def load_model(
    cls: type[RagModel],
    path: str | os.PathLike[str],
    index: Any,
    passages: Any,
    *,
    base_generator: nn.Module | None,
    generator_class: type | None,
    overrides: dict[str, Any],
) -> RagModel:
    """Read the folder `path`; see `RagModel.from_pretrained`.

    Raises:
        ValueError: something is missing, unreadable or of another configuration; it is named.
    """
    folder = _saved_folder(path)
    return folders.read_whole(
        folder,
        lambda: _load_model(
            cls, folder, index, passages, base_generator, generator_class, overrides
        ),
    )


def _load_model(
    cls: type[RagModel],
    folder: Path,
    index: Any,
    passages: Any,
    base_generator: nn.Module | None,
    generator_class: type | None,
    overrides: dict[str, Any],
) -> RagModel:
    settings = _read_settings(folder, given_base=base_generator is not None)
    question_encoder = _load_encoder(folder / "question_encoder")
    others: dict[str, Any] = dict.fromkeys(_OTHER_ENCODERS)
    for name in _OTHER_ENCODERS:
        match settings.get(name):
            case "shared":
                others[name] = question_encoder
            case "same model":
                others[name] = question_encoder.with_settings(folder / name)
            case "own":
                others[name] = _load_encoder(folder / name)
    passage_encoder = others["passage_encoder"]
    generator = _load_generator(folder, settings, base_generator, generator_class)
    arguments = {name: settings[name] for name in _SETTINGS}
    arguments |= {
        "tau": settings["tau"],
        "learn_tau": settings["learn_tau"],
        "posterior_encoder": others["posterior_encoder"],
        **{name: settings[name] for name in _LOSS_SETTINGS},
        **{name: settings[name] for name in (*_LATER_SETTINGS, "null_score") if name in settings},
    }
    parts = (_load_index(folder, settings, index), _load_passages(folder, passages))
    if "processor" not in overrides:
        encoders = (question_encoder, passage_encoder)
        arguments["processor"] = _load_processor(folder, settings, encoders, parts[1])
    try:
        model = cls(question_encoder, passage_encoder, generator, *parts, **(arguments | overrides))
    except ValueError as error:
        name = str(error).partition(":")[0]
        if name in overrides or name == "index" or name not in settings:
            raise
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    return model.eval()


def _saved_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder of a saved model, restored if a killed save had set it aside."""
    folders.recover(Path(path))
    return model_folder("path", path, holding=" that save_pretrained wrote", whole=True)


def load_retriever(
    path: str | os.PathLike[str], index: Any, passages: Any
) -> tuple[Retriever, RagProcessor]:
    """Read question encoder, processor and index of the folder `path`, but no generator.

    Raises:
        ValueError: as `load_model`.
    """
    from fastrag.nn.retriever import Retriever

    folder = _saved_folder(path)
    settings = _read_settings(folder, given_base=True)
    encoder = _load_encoder(folder / "question_encoder")
    passages = _load_passages(folder, passages)
    processor = _load_processor(folder, settings, (encoder, None), passages)
    processor.check(passages)
    retriever = Retriever(encoder, None, _load_index(folder, settings, index), passages)
    return retriever.eval(), processor


def _settings(model: RagModel, generator_kept: str) -> dict[str, Any]:
    """Return the content of rag_config.json."""
    from fastrag import __version__

    tau = model.tau
    return {
        "fastrag": __version__,
        "kind": model.adapter.kind,
        "generator": generator_kept,
        **{
            name: _encoder_kept(model.question_encoder, getattr(model, name))
            for name in _OTHER_ENCODERS
        },
        **{name: getattr(model, name) for name in _SETTINGS},
        "tau": tau.item() if isinstance(tau, Tensor) else tau,
        "learn_tau": model.retriever.log_tau is not None,
        **{name: getattr(model.loss_fn, name) for name in _LOSS_SETTINGS},
        **{name: getattr(model, name) for name in _LATER_SETTINGS},
        "null_score": model.null_score.item() if model.null_passage else 0.0,
        "index": IndexReference.of(model.index)._asdict(),
    }


def _encoder_kept(question: Any, other: Any) -> str:
    """Return how another encoder is saved; "same model" keeps only its settings."""
    if other is None:
        return "none"
    if other is question:
        return "shared"
    alike = type(other) is type(question) and isinstance(other, (TextEncoder, SentenceEncoder))
    return "same model" if alike and other.model is question.model else "own"


def _parts(folder: Path) -> list[str]:
    files = (each.relative_to(folder) for each in folder.rglob("*") if each.is_file())
    return sorted(each.as_posix() for each in files if each.parts[0] not in HOLDS)


def _check_parts(folder: Path, manifest: dict[str, Any], given_base: bool) -> None:
    for part in manifest.get("parts", ()):
        path = folder / part
        if path.exists() or (given_base and part.startswith("generator_base/")):
            continue
        while not path.parent.exists():
            path = path.parent
        raise ValueError(f"{path}: expected a part of a saved RagModel, got no such file or folder")


def _read_settings(folder: Path, *, given_base: bool) -> dict[str, Any]:
    from fastrag.index.storage import read_folder

    # Also restores a folder that a killed save had set aside.
    manifest, _ = read_folder(folder, format=FORMAT, version=VERSION, fields=_MANIFEST)
    settings: dict[str, Any] = manifests.read(folder / CONFIG, _SAVED)
    _check_parts(folder, manifest, given_base)
    return settings


@without_bars()
def _save_generator(generator: Any, folder: Path, merge_adapter: bool) -> str:
    """Write the generator; return "model", "adapter" or "adapter on generator_base"."""
    if not hasattr(generator, "peft_config"):
        generator.save_pretrained(folder / "generator")
        return "model"
    if merge_adapter:
        _refuse_tied_merge(generator)
        copy.deepcopy(generator).merge_and_unload().save_pretrained(folder / "generator")
        return "model"
    if list(generator.peft_config) != ["default"]:
        raise ValueError(
            f"generator: expected one PEFT adapter named 'default' to save, got "
            f"{sorted(generator.peft_config)}"
        )
    if base_model(generator).name_or_path:
        generator.save_pretrained(folder / "generator")
        return "adapter"
    # A base model without a name cannot be found again, so it is saved next to its adapter.
    copy.deepcopy(generator).unload().save_pretrained(folder / "generator_base")
    generator.save_pretrained(folder / "generator", save_embedding_layers=False)
    return "adapter on generator_base"


def _refuse_tied_merge(generator: Any) -> None:
    base = base_model(generator)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    adapted = [hasattr(part, "base_layer") for part in (head, embedding)]
    if not any(adapted):
        return
    weights = [getattr(part, "base_layer", part).weight for part in (head, embedding)]
    if weights[0] is weights[1]:
        raise ValueError(
            f"merge_adapter: expected an untied head, got LoRA on the "
            f"{'head' if adapted[0] else 'embedding'} of {type(base).__name__}, whose head and "
            f"embedding are one tensor: merging would change both; save the adapter instead"
        )


def _load_encoder(folder: Path) -> TextEncoder | SentenceEncoder:
    try:
        if (folder / SENTENCE_CONFIG).is_file():
            return SentenceEncoder.from_pretrained(folder)
        return TextEncoder.from_pretrained(folder, dtype="auto")
    except ValueError as error:
        # from_pretrained names its own argument, which the caller of load_model never gave.
        raise ValueError(f"{folder.name}: {str(error).removeprefix('path: ')}") from error


def _load_generator(
    folder: Path,
    settings: dict[str, Any],
    base_generator: nn.Module | None,
    generator_class: type | None,
) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    automatic = AutoModelForSeq2SeqLM if settings["kind"] == "seq2seq" else AutoModelForCausalLM
    loader = generator_class or automatic
    generator = folder / "generator"
    if settings["generator"] == "model":
        return load_whole(loader, generator)
    from peft import PeftConfig, PeftModel
    from peft.utils import CONFIG_NAME

    try:
        base_name = PeftConfig.from_pretrained(generator).base_model_name_or_path
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{generator / CONFIG_NAME}: expected the settings of an adapter: {error}"
        ) from error
    base = base_generator
    if base is None and settings["generator"] == "adapter on generator_base":
        base = load_whole(loader, folder / "generator_base")
    elif base is None:
        if not base_name:
            raise ValueError(f"base_generator: expected the model under the adapter in {folder}")
        base = load_whole(loader, base_name)
    try:
        adapted = PeftModel.from_pretrained(base, generator, is_trainable=True)
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{generator}: expected a readable adapter: {error}") from error
    return adapted.eval()


@without_bars()
def load_whole(
    loader: Any,
    folder: str | os.PathLike[str],
    *,
    dtype: Any = "auto",
    allow_unexpected: bool = False,
) -> Any:
    """Load a generator whose every weight must be in the folder.

    transformers gives a missing weight random values and at most logs a line about it.

    Args:
        loader: class with transformers' `from_pretrained`.
        folder: a Hugging Face folder, or a Hub id.
        dtype: of the weights; "auto": as they are stored.
        allow_unexpected: whether the folder may hold weights that the model does not have.

    Returns:
        The model.

    Raises:
        ValueError: a file cannot be read, or weights are missing, misshapen or left over.
    """
    folder = model_folder("generator", folder)
    try:
        model, report = loader.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder}: expected a readable generator: {error}") from error
    quantization = getattr(model.config, "quantization_config", None)
    if getattr(quantization, "quant_method", None) == "gguf":
        # transformers takes its plain weights for packed ones, and refuses to save them again
        raise ValueError(
            f"{folder / 'config.json'}: expected no quantization_config of the GGUF that the "
            "weights come from, as they are not packed here; delete it"
        )
    wrong = ["missing_keys", "mismatched_keys", *([] if allow_unexpected else ["unexpected_keys"])]
    for what in wrong:
        if report[what]:
            raise ValueError(
                f"{folder}: expected the weights of a {type(model).__name__}, got {what} "
                f"{sorted(map(str, report[what]))[:4]} (a class of your own goes into "
                f"generator_class)"
            )
    return model


def _load_processor(
    folder: Path, settings: dict[str, Any], encoders: tuple[Any, Any], passages: Any
) -> RagProcessor:
    if (folder / PROCESSOR_CONFIG).exists():
        return RagProcessor.from_pretrained(folder)
    # versions 1 and 2 keep template and window in rag_config.json, prefixes with the encoders
    tokenizers = [load_tokenizer(folder / part) for part in ("question_encoder", "generator")]
    if None in tokenizers or not {"template", "max_context"} <= settings.keys():
        raise ValueError(f"processor: expected a RagProcessor, as {folder} holds none")
    with manifests.named(folder / CONFIG):
        template = Template.from_dict(settings["template"])
    return RagProcessor.for_encoders(
        *encoders,
        *tokenizers,
        kind=settings["kind"],
        template=template,
        passage_prefix=passages.prefix,
        max_context=settings["max_context"],
    )


def _load_index(folder: Path, settings: dict[str, Any], index: Any) -> Any:
    from fastrag.index import Index

    if index is None:
        if not (folder / "index").is_dir():
            raise ValueError(
                f"index: expected an index, as {folder} holds none (saved from "
                f"{settings['index'].get('source')})"
            )
        index = Index.load(folder / "index")
    elif not hasattr(index, "search"):
        raise ValueError(
            f"index: expected an index, such as Index.load reads from a folder, got "
            f"{type(index).__name__}"
        )
    IndexReference.of_record(settings["index"]).check(index, str(folder))
    return index


def _load_passages(folder: Path, passages: Any) -> Any:
    from fastrag.index import PassageStore

    if passages is not None:
        return passages
    if not (folder / "passages").is_dir():
        raise ValueError(f"passages: expected a PassageStore, as {folder} holds none")
    return PassageStore.load(folder / "passages")

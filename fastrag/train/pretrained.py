"""The pretrained parts that a config names: encoders, generator, tokenizers, and the template."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from fastrag.data import Template
from fastrag.nn import TextEncoder
from fastrag.nn.checkpoint import load_whole
from fastrag.nn.hub import model_folder

if TYPE_CHECKING:
    from fastrag.train.config import RagConfig
    from fastrag.train.sections import LoraConfig


def load_encoder(
    path: str | os.PathLike[str], name: str, role: Literal["query", "passage"]
) -> TextEncoder:
    """Load an encoder from a folder or the Hub.

    Args:
        path: a Hugging Face folder, one of sentence-transformers, or one of a `TextEncoder`; or the
            Hub id of one.
        name: the setting that the path belongs to, for the error message.
        role: which prompt of a sentence-transformers folder becomes the prefix.

    Returns:
        The encoder, in fp32.

    Raises:
        ValueError: the folder cannot be read.
    """
    folder = model_folder(name, path)
    try:
        return TextEncoder.from_pretrained(folder, role=role)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('path: ')}") from error


def load_generator(
    path: str | os.PathLike[str],
    lora: LoraConfig | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load a generator from a folder or the Hub, with LoRA adapters if asked.

    Args:
        path: a Hugging Face folder, or the Hub id, of a seq2seq or causal language model.
        lora: settings of LoRA adapters, which are float32; None or a rank of None: no LoRA.
        dtype: dtype of the model's own weights; None: float32.

    Returns:
        The model.

    Raises:
        ValueError: the folder cannot be read, or LoRA is asked for and peft is not installed.
    """
    kind = AutoModelForSeq2SeqLM if generator_kind(path) == "seq2seq" else AutoModelForCausalLM
    try:
        model = load_whole(kind, path, dtype=dtype or torch.float32, allow_unexpected=True)
    except ValueError as error:
        raise ValueError(f"generator: {_first_line(error).removeprefix('generator: ')}") from error
    return model if lora is None or lora.rank is None else _with_lora(model, lora, lora.rank)


def generator_kind(path: str | os.PathLike[str]) -> Literal["seq2seq", "causal"]:
    """Return the kind of a generator, from its config alone.

    Args:
        path: a Hugging Face folder.

    Returns:
        `seq2seq` or `causal`.

    Raises:
        ValueError: the folder holds no readable config.
    """
    return "seq2seq" if _generator_config(path).is_encoder_decoder else "causal"


def choose_dtype(config: RagConfig) -> tuple[torch.dtype, torch.dtype | None]:
    """Choose the dtype of the generator's weights.

    Args:
        config: the settings.

    Returns:
        The dtype to load, and the dtype of the stored weights; None if the folder does not state
        it.

    Raises:
        ValueError: the folder holds no readable config.
    """
    stored = getattr(_generator_config(config.reader.generator), "dtype", None)
    if config.reader.dtype != "auto":
        return getattr(torch, config.reader.dtype), stored
    # nothing is lost: autocast multiplies in bfloat16, and the adapters are float32
    adapters = config.reader.lora.rank is not None
    kept = adapters and config.training.bf16 and stored == torch.bfloat16
    return torch.bfloat16 if kept else torch.float32, stored


def load_tokenizer(path: str | os.PathLike[str], name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Args:
        path: the model's folder.
        name: the setting that the path belongs to, for the error message.

    Returns:
        The tokenizer.

    Raises:
        ValueError: the folder holds none, or one without a vocabulary.
    """
    tokenizer: PreTrainedTokenizerBase = _read(AutoTokenizer, "a tokenizer", name, path)
    # AutoTokenizer makes an empty one, for which every word is unknown, if only the config is there
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"{name}: expected a tokenizer in {path}, found no vocabulary")
    return tokenizer


def make_template(
    setting: str | dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    kind: Literal["seq2seq", "causal"],
) -> Template:
    """Make the template that a config names.

    Args:
        setting: `plain`, `chat`, or a mapping of Template's fields.
        tokenizer: the generator's tokenizer.
        kind: `seq2seq` or `causal`.

    Returns:
        The template.

    Raises:
        ValueError: `chat` and the tokenizer has no chat template, or a wrong mapping.
    """
    if isinstance(setting, dict):
        return Template.from_dict(setting)
    if setting == "chat":
        return Template.from_chat(tokenizer)
    return Template.default(kind)


def _generator_config(path: str | os.PathLike[str]) -> Any:
    return _read(AutoConfig, "a model config", "generator", path)


def _read(kind: Any, expected: str, name: str, path: str | os.PathLike[str]) -> Any:
    folder = model_folder(name, path)
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{name}: expected {expected} in {folder}: {_first_line(error)}"
        ) from error


def _with_lora(model: Any, lora: LoraConfig, rank: int) -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError("reader.lora: expected peft to be installed (pip install peft)") from None
    seq2seq = model.config.is_encoder_decoder
    targets = lora.targets
    # PEFT matches a text against the whole path of a layer, so its name alone needs a list
    if isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"[\w.]+", targets):
        targets = [targets]
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank if lora.alpha is None else lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            task_type=peft.TaskType.SEQ_2_SEQ_LM if seq2seq else peft.TaskType.CAUSAL_LM,
        ),
    )


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""TextEncoder: a Hugging Face model, a pooling and an optional normalisation, to one vector.

states [B, S, H]  --pooling (cls | mean | last | pooler)-->  [B, D]  --normalise-->  [B, D]
"""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastrag import manifests
from fastrag.manifests import flag, integer, items, one_of, optional, record, table, text
from fastrag.messages import shown
from fastrag.nn.hub import model_folder
from fastrag.nn.quiet import without_bars
from fastrag.ops import checks

Pooling = Literal["cls", "mean", "last", "pooler"]
Role = Literal["query", "passage"]

POOLINGS = ("cls", "mean", "last", "pooler")
CONFIG_NAME = "fastrag_encoder.json"
# AutoModel chooses by model_type, which names another class for these: the question encoder of DPR,
# or a whole encoder-decoder.
_OWN_CLASSES = ("DPRContextEncoder", "T5EncoderModel", "MT5EncoderModel", "UMT5EncoderModel")
_FORMAT = "fastrag-text-encoder"
_VERSION = 1
_SETTINGS = record(
    {
        "format": one_of(_FORMAT),
        "version": integer(_VERSION, _VERSION),
        "pooling": one_of(*POOLINGS),
        "normalize": flag(),
        "prefix": text(),
        "max_length": optional(integer(1)),
    },
    closed=True,
)
# The files of a sentence-transformers folder.
_ST_MODULES = items(record({}, {"type": text(), "path": text("[^\0]*", "a path")}))
_ST_CONFIG = record(
    {}, {"prompts": optional(table(text())), "default_prompt_name": optional(text())}
)
_ST_TRANSFORMER = record(
    {}, {"max_seq_length": optional(integer(1)), "do_lower_case": optional(flag())}
)
_ST_POOLING = record({}, {"include_prompt": flag(), "pooling_mode": text()})
# How sentence-transformers names the poolings that exist here.
_ST_POOLINGS = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}
_ST_POOLING_WORDS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_ST_PROMPTS = {"query": ("query",), "passage": ("document", "passage", "corpus")}


class TextEncoder(nn.Module):
    """Encode tokenised text to one vector, in fp32 (fp64 for fp64 models).

        cls:  state of the first token       mean: average of the states under the mask
        last: state of the last token        pooler: the model's own `pooler_output` (DPR, BERT)

    First and last mean the first and last token under the mask, on whichever side the padding is.

    Args:
        model: a transformers model that returns `last_hidden_state` or `pooler_output`.
        pooling: one of the four above.
        normalize: divide each vector by its Euclidean length.
        prefix: text put before each question or passage ("query: "). It is kept for the code that
            tokenises; the encoder itself sees token ids.
        max_length: longest input in tokens, for the code that tokenises; None: no limit is known.

    Raises:
        ValueError: an unknown pooling.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> from fastrag import TextEncoder
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1,
        ...                     num_attention_heads=2, intermediate_size=8)
        >>> encoder = TextEncoder(BertModel(config), normalize=True)
        >>> ids, mask = torch.tensor([[2, 3, 4], [5, 6, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> vectors = encoder(ids, mask)
        >>> vectors.shape, bool((vectors.norm(dim=1) - 1).abs().max() < 1e-6)
        (torch.Size([2, 8]), True)
    """

    def __init__(
        self,
        model: nn.Module,
        pooling: Pooling = "mean",
        *,
        normalize: bool = False,
        prefix: str = "",
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {POOLINGS}, got {shown(pooling)}")
        self.model = model
        self.pooling = pooling
        self.normalize = normalize
        self.prefix = prefix
        self.max_length = max_length
        takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        # Decoder-type encoders may be padded on the left; encoders count positions themselves.
        self._gives_positions = pooling == "last" and takes_positions

    @property
    def dim(self) -> int:
        """Width D of the vectors."""
        config: Any = self.model.config
        return int(getattr(config, "projection_dim", 0) or config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the vectors of a batch.

        Args:
            input_ids: `[B, S]` int64, in the encoder's vocabulary, special tokens included.
            attention_mask: `[B, S]`, 1 at tokens; None: no padding.

        Returns:
            embeddings `[B, D]`, fp32 or fp64, differentiable.

        Raises:
            ValueError: shapes or dtypes disagree, more tokens than the model has positions, (on
                the CPU) an id outside its vocabulary, or the model has no `pooler_output` for
                pooling="pooler".
        """
        attention_mask = check_inputs(self.model, input_ids, attention_mask)
        outputs = self.model(**self._inputs(input_ids, attention_mask))
        vectors = self._pool(outputs, attention_mask)
        if vectors.dtype in (torch.float16, torch.bfloat16):
            vectors = vectors.float()
        return nn.functional.normalize(vectors, dim=-1) if self.normalize else vectors

    def _inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "return_dict": True,
        }
        if self._gives_positions:
            inputs["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return inputs

    def _pool(self, outputs: Any, attention_mask: Tensor) -> Tensor:
        if self.pooling == "pooler":
            pooled = getattr(outputs, "pooler_output", None)
            if pooled is None:
                raise ValueError(
                    f"pooling: expected a model with a pooler_output for 'pooler', got "
                    f"{type(self.model).__name__} without one"
                )
            return pooled
        states = outputs.last_hidden_state  # [B, S, H]
        if self.pooling == "mean":
            # bf16 sums of many tokens lose digits: fp32 (fp64 stays).
            states = states.float() if states.dtype != torch.float64 else states
            weights = attention_mask.to(states.dtype).unsqueeze(-1)
            return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
        order = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
        if self.pooling == "cls":
            order = order.flip(0)
        at = (attention_mask * order).argmax(dim=1)  # first or last token under the mask
        return states.gather(1, at[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)

    @without_bars()
    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a Hugging Face folder with `fastrag_encoder.json` next to the weights.

        PEFT adapters on the encoder are merged into the weights that are written.

        Args:
            path: folder; made if it does not exist.
        """
        model: Any = self.model
        if hasattr(model, "peft_config"):
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(path)
        self.save_settings(path)

    def save_settings(self, path: str | os.PathLike[str]) -> None:
        """Write only `fastrag_encoder.json` into a folder; see `with_settings`."""
        settings = {
            "format": _FORMAT,
            "version": _VERSION,
            "pooling": self.pooling,
            "normalize": self.normalize,
            "prefix": self.prefix,
            "max_length": self.max_length,
        }
        manifests.write(Path(path, CONFIG_NAME), settings)

    def with_settings(self, path: str | os.PathLike[str]) -> TextEncoder:
        """Return another encoder around the same model, with the settings of a folder."""
        return TextEncoder(self.model, **_read_settings(Path(path), None))

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        role: Role | None = None,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        prefix: str | None = None,
        max_length: int | None = None,
        dtype: torch.dtype | str = torch.float32,
    ) -> TextEncoder:
        """Read an encoder from a folder, or else from the Hugging Face Hub.

        A folder that `save_pretrained` wrote and a sentence-transformers folder (modules.json,
        pooling, normalise, maximum length, prompts) are read as they stand. A plain Hugging Face
        folder gets mean pooling, or its own pooler for DPR models. Arguments override the folder.

        Args:
            path: the folder, or a Hub id.
            role: "query" or "passage": which prompt of a sentence-transformers folder is `prefix`.
            pooling: see the class.
            normalize: see the class.
            prefix: see the class.
            max_length: see the class.
            dtype: of the weights; "auto": as they are stored.

        Returns:
            A TextEncoder in eval mode, as transformers loads models.

        Raises:
            ValueError: the folder cannot be read, holds weights of another configuration, or needs
                a sentence-transformers module that does not exist here (it is named).
        """
        holding = " with config.json or modules.json"
        folder = model_folder("path", path, holding=holding)
        if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
            raise ValueError(f"path: expected a model folder{holding}, got {shown(str(folder))}")
        settings = _read_settings(folder, role)
        given = {
            "pooling": pooling,
            "normalize": normalize,
            "prefix": prefix,
            "max_length": max_length,
        }
        settings |= {name: value for name, value in given.items() if value is not None}
        model = _load_model(folder / settings.pop("folder", ""), dtype, settings.get("pooling"))
        if "pooling" not in settings:
            settings["pooling"] = "pooler" if model.config.model_type == "dpr" else "mean"
        if settings["pooling"] != "pooler" and getattr(model, "pooler", None) is not None:
            model.pooler.requires_grad_(False)  # never read; DDP would wait for its gradient
        return cls(model, **settings)

    def extra_repr(self) -> str:
        return (
            f"pooling={self.pooling!r}, normalize={self.normalize}, prefix={self.prefix!r}, "
            f"max_length={self.max_length}"
        )


def check_inputs(model: Any, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Check an encoder's input against its transformers model.

    Returns:
        The mask `[B, S]`, made if there is none.

    Raises:
        ValueError: as `TextEncoder.forward`.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    checks.check_ids("input_ids", input_ids, _vocabulary_size(model))
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected the [B, S] shape of input_ids {list(input_ids.shape)}, "
            f"got {list(attention_mask.shape)}"
        )
    config: Any = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and 0 < limit < input_ids.shape[1]:
        raise ValueError(
            f"input_ids: expected at most the encoder's {limit} positions, got "
            f"{input_ids.shape[1]} tokens"
        )
    return attention_mask


def _vocabulary_size(model: Any) -> int | None:
    """Return the rows of the input embedding; None where the model has none to ask for."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):  # a wrapper such as DPR's names none
        return None


def _read_settings(folder: Path, role: Role | None) -> dict[str, Any]:
    """Return the pooling, normalisation, prefix and length that a folder states."""
    if role not in (None, "query", "passage"):
        raise ValueError(f"role: expected 'query', 'passage' or None, got {shown(role)}")
    if (folder / CONFIG_NAME).is_file():
        settings = manifests.read(folder / CONFIG_NAME, _SETTINGS)
        return {key: settings[key] for key in ("pooling", "normalize", "prefix", "max_length")}
    if (folder / "modules.json").is_file():
        return _read_sentence_transformers(folder, role)
    return {}


def _read_sentence_transformers(folder: Path, role: Role | None) -> dict[str, Any]:
    """Return the settings of a sentence-transformers folder; refuse modules unknown here."""
    settings: dict[str, Any] = {"normalize": False}
    for module in manifests.read(folder / "modules.json", _ST_MODULES):
        kind = module.get("type", "").rsplit(".", 1)[-1]
        place = folder / module.get("path", "")
        if kind == "Transformer":
            settings["folder"] = module.get("path", "")
            settings["max_length"] = _st_max_length(place)
        elif kind == "Pooling":
            settings["pooling"] = _st_pooling(place / "config.json")
        elif kind == "Normalize":
            settings["normalize"] = True
        else:
            raise ValueError(
                f"{folder / 'modules.json'}: expected the modules Transformer, Pooling and "
                f"Normalize, got {shown(module.get('type'))} (SentenceEncoder.from_pretrained "
                "reads it with sentence-transformers)"
            )
    config = folder / "config_sentence_transformers.json"
    if config.is_file():
        stated = manifests.read(config, _ST_CONFIG)
        prompts, default = stated.get("prompts"), stated.get("default_prompt_name")
        settings["prefix"] = prompt_of_role(prompts, default, role)
    return settings


def _st_max_length(folder: Path) -> int | None:
    path = folder / "sentence_bert_config.json"
    if not path.is_file():
        return None
    config = manifests.read(path, _ST_TRANSFORMER)
    if config.get("do_lower_case"):
        warnings.warn(
            f"{path}: do_lower_case is left to the tokenizer; lower-case the text if it keeps case",
            stacklevel=2,
        )
    return config.get("max_seq_length")


def _st_pooling(path: Path) -> str:
    config = manifests.read(path, _ST_POOLING)
    if config.get("include_prompt", True) is False:
        raise ValueError(f"{path}: expected include_prompt = true, got false")
    if "pooling_mode" in config:
        modes = {config["pooling_mode"]}
        known = {_ST_POOLING_WORDS.get(mode) for mode in modes}
    else:
        marks = {
            name for name, value in config.items() if name.startswith("pooling_mode_") and value
        }
        modes = {name.removeprefix("pooling_mode_") for name in marks}
        known = {_ST_POOLINGS.get(mode) for mode in modes}
    if len(known) != 1 or None in known:
        raise ValueError(
            f"{path}: expected one of the poolings cls, mean, last, got {sorted(modes)}"
        )
    return str(known.pop())


def prompt_of_role(
    prompts: Mapping[str, str | None] | None, default: str | None, role: Role | None
) -> str:
    """Return the prompt of a sentence-transformers model for questions or for passages.

    Args:
        prompts: its prompts by name.
        default: the name of its default prompt.
        role: "query" or "passage"; None: the default prompt.

    Raises:
        ValueError: an unknown role.
    """
    if role not in (None, "query", "passage"):
        raise ValueError(f"role: expected 'query', 'passage' or None, got {shown(role)}")
    names = [*(_ST_PROMPTS[role] if role else ()), *([default] if default else [])]
    known = prompts or {}
    return next((known[name] or "" for name in names if name in known), "")


@without_bars()
def _load_model(folder: Path, dtype: torch.dtype | str, pooling: str | None) -> Any:
    """Load the transformers model of a folder; every weight that is used must be there."""
    import transformers
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.is_encoder_decoder:
            raise ValueError(
                f"{folder}: expected an encoder, got the encoder-decoder {config.model_type!r}"
            )
        named = next(iter(config.architectures or ()), "")
        kind: Any = getattr(transformers, named) if named in _OWN_CLASSES else AutoModel
        model, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            dtype=dtype,
            output_loading_info=True,
            **({} if pooling == "pooler" else _without_missing_pooler(folder)),
        )
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"path: expected a readable model folder {folder}: {error}") from error
    missing = [
        name for name in report["missing_keys"] if pooling == "pooler" or "pooler" not in name
    ]
    if missing or report["mismatched_keys"]:
        raise ValueError(
            f"{folder}: expected the weights of its config.json, missing {sorted(missing)[:4]}, "
            f"of another shape {sorted(report['mismatched_keys'])[:4]}"
        )
    if report["missing_keys"]:  # a pooler that was not stored: random, and of no use
        model.pooler = None
    return model


def _without_missing_pooler(folder: Path) -> dict[str, bool]:
    """Return the argument that keeps transformers from making a pooler that is not stored.

    The pooler would have random values and a report on the terminal, and nothing would read it. If
    the names of the weights cannot be read without the weights, the argument is left out.
    """
    from transformers import MODEL_MAPPING, AutoConfig

    if (folder / "model.safetensors.index.json").is_file():
        weights_of = record({"weight_map": table(text())})
        index = manifests.read(folder / "model.safetensors.index.json", weights_of)
        names = list(index["weight_map"])
    elif (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", "pt") as weights:
            names = list(weights.keys())
    else:
        return {}
    kind = MODEL_MAPPING.get(type(AutoConfig.from_pretrained(folder, local_files_only=True)), None)
    takes_it = isinstance(kind, type) and "add_pooling_layer" in inspect.signature(kind).parameters
    stored = any("pooler" in name.split(".") for name in names)
    return {"add_pooling_layer": False} if takes_it and not stored else {}

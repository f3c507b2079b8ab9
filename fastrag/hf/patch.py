"""patch_hf_rag: a live RAG model of transformers with fastrag's loss and, if given, its index.

    patch_hf_rag(model)
    model(input_ids, labels=labels).loss        # from hidden states: no logits are made
    unpatch_hf_rag(model)

transformers' own forward still does everything except the loss. With labels it runs while the hook
of the generator's adapter records the input of the output projection, which itself processes one
position only.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import RagSequenceForGeneration, RagTokenForGeneration
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.models.rag.modeling_rag import RetrievAugLMMarginOutput
from transformers.utils import ModelOutput

from fastrag.data import RagProcessor
from fastrag.hf.losses import hf_sequence_nll, paper_nll, shifted, without_bos, without_padding
from fastrag.hf.retriever import IndexRetriever, check_parts, rag_processor
from fastrag.index import Index, PassageStore
from fastrag.nn.arguments import check_answers
from fastrag.nn.generators import GeneratorAdapter, adapt_generator
from fastrag.nn.heads import architecture
from fastrag.ops.positions import IGNORE_INDEX, check_label_values

_NAME = "_fastrag_patch"
_RETRIEVED = (
    "context_input_ids",
    "context_attention_mask",
    "retrieved_doc_embeds",
    "retrieved_doc_ids",
)
_FIELDS = [
    (field.name, field.type, field.default)
    for field in dataclasses.fields(RetrievAugLMMarginOutput)
    if field.name != "logits"
]
_WithoutLogits: Any = dataclasses.make_dataclass("_WithoutLogits", _FIELDS, bases=(ModelOutput,))


@dataclasses.dataclass
class PatchedOutput(_WithoutLogits):
    """transformers' RetrievAugLMMarginOutput of a call with labels, without `logits`.

    `logits` and positions after the first, which depend on it, are refused by name.
    """

    def __getattr__(self, name: str) -> Any:
        if name == "logits":
            raise _no_logits(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, key: Any) -> Any:
        if key == "logits" or not (isinstance(key, str) or key == 0):
            raise _no_logits(key)
        return super().__getitem__(key)


def _no_logits(asked: object) -> ValueError:
    return ValueError(
        f"{asked}: expected the name of a field other than logits, which a patched model does not "
        "make for a loss; call it without labels (decoder_input_ids=labels) for logits"
    )


@dataclasses.dataclass
class _Patch:
    """State of a patched model: how its loss is computed, and what unpatching restores."""

    marginal: str
    hf_quirks: bool
    adapter: GeneratorAdapter
    retriever: Any  # the model's own, to which unpatching returns
    own_retriever: IndexRetriever | None

    def adapter_of(self, generator: Any) -> GeneratorAdapter:
        """Return the adapter of the present generator, which may have been replaced."""
        if self.adapter.model is not generator:
            self.adapter = adapt_generator(generator)
        return self.adapter


def patch_hf_rag(
    model: Any,
    *,
    index: Index | None = None,
    passages: PassageStore | None = None,
    hf_quirks: bool = False,
    processor: RagProcessor | None = None,
) -> Any:
    """Give a live RAG model of transformers fastrag's loss and, with an index, its retrieval.

        RAG-Token      nll = -sum_t log sum_k p(z_k|x) p(y_t|x,z_k,y_<t)
        RAG-Sequence   nll = -log sum_k p(z_k|x) prod_t p(y_t|x,z_k,y_<t)
                                                            (Lewis et al. 2020, sec. 2.1)

    A call with `labels` returns the loss and every other output of transformers except the logits.
    A call without labels and `generate` are transformers' own; with an index they retrieve from it.
    Parameters, configuration and the class of the model stay as they are.

    Labels are those that transformers takes. For an encoder-decoder the first column is the
    decoder's start token and is not predicted; the pad token and -100 do not count. For a
    decoder-only generator, which transformers cannot run, every label is predicted.

    Args:
        model: a `RagTokenForGeneration` or `RagSequenceForGeneration`.
        index: vectors of `passages`, to retrieve from; None: the model's own retriever stays.
        passages: the passages of the index. Unless hf_quirks is set, they must have been tokenised
            by the processor that builds the contexts.
        hf_quirks: compute the loss as transformers does, also where it departs from the paper (see
            docs/math.md), and build contexts as it does, which may cut the question. If False,
            labels of one column are the target itself, a missing passage takes no probability, and
            questions are never cut.
        processor: tokenizers and template for an index; None: the tokenizers of the model's
            retriever, and `rag_processor`.

    Returns:
        The model.

    Raises:
        ValueError: the model is of another class, already patched or wrapped; `adapt_generator`
            refuses the generator; hf_quirks with a decoder-only generator; only one of index and
            passages; or index and passages of another kind, width, length or tokenizer.

    Example:
        >>> fastrag.patch_hf_rag(model)                                 # doctest: +SKIP
        >>> model(input_ids, labels=labels).loss.sum().backward()       # doctest: +SKIP
    """
    if not isinstance(model, (RagTokenForGeneration, RagSequenceForGeneration)):
        raise ValueError(
            f"model: expected a RagTokenForGeneration or a RagSequenceForGeneration, got "
            f"{type(model).__name__}"
        )
    if _NAME in model.__dict__:
        raise ValueError("model: expected one that is not patched; call unpatch_hf_rag first")
    if "forward" in model.__dict__:
        raise ValueError(
            "model: expected one with the forward of its class, got one that is wrapped; patch it "
            "before accelerator.prepare"
        )
    adapter = adapt_generator(model.generator)
    if hf_quirks and adapter.kind != "seq2seq":
        raise ValueError(
            f"hf_quirks: expected False with {architecture(model.generator)}, a decoder-only "
            "generator, which transformers cannot run, got True"
        )
    own = None
    if index is not None or passages is not None:
        own = _make_retriever(model, adapter, index, passages, processor, hf_quirks)
    elif processor is not None:
        raise ValueError("processor: expected None without an index, got a RagProcessor")
    kind: Any = type(model)
    marginal = "token" if issubclass(kind, RagTokenForGeneration) else "sequence"
    model.__dict__[_NAME] = _Patch(marginal, hf_quirks, adapter, model.rag.retriever, own)
    if own is not None:
        model.rag.retriever = own
    model.forward = MethodType(_forward_of(kind), model)
    if adapter.kind != "seq2seq":
        model.generate = MethodType(_refuse_generate, model)
    return model


def unpatch_hf_rag(model: Any) -> Any:
    """Undo `patch_hf_rag`: the model has its own forward and its own retriever again.

    Args:
        model: a patched model.

    Returns:
        The model.

    Raises:
        ValueError: the model is not patched, or something has wrapped its forward since.

    Example:
        >>> fastrag.unpatch_hf_rag(fastrag.patch_hf_rag(model)) is model    # doctest: +SKIP
        True
    """
    patch = getattr(model, "__dict__", {}).get(_NAME)
    if patch is None:
        raise ValueError(f"model: expected a patched model, got a plain {type(model).__name__}")
    kind: Any = type(model)
    if getattr(model.forward, "__func__", None) is not _forward_of(kind):
        raise ValueError(
            "model: expected the forward of patch_hf_rag, got one that is wrapped; unwrap it first "
            "(accelerator.unwrap_model)"
        )
    if patch.own_retriever is not None and model.rag.retriever is patch.own_retriever:
        model.rag.retriever = patch.retriever
    for name in ("forward", "generate", _NAME):
        model.__dict__.pop(name, None)
    return model


def _make_retriever(
    model: Any,
    adapter: GeneratorAdapter,
    index: Index | None,
    passages: PassageStore | None,
    processor: RagProcessor | None,
    hf_quirks: bool,
) -> IndexRetriever:
    if index is None or passages is None:
        missing = "index" if index is None else "passages"
        raise ValueError(f"{missing}: expected index and passages together, got None")
    check_parts(index, passages, processor)
    before = model.rag.retriever
    if processor is not None:
        tokenizers = (processor.question_tokenizer, processor.generator_tokenizer)
    elif before is not None:
        tokenizers = (before.question_encoder_tokenizer, before.generator_tokenizer)
    else:
        raise ValueError(
            "processor: expected a RagProcessor, as the model has no retriever to take the "
            "tokenizers from (fastrag.hf.rag_processor makes one), got None"
        )
    if hf_quirks:
        processor = None
    elif processor is None:
        processor = rag_processor(model.config, *tokenizers, passage_prefix=passages.prefix)
    if processor is not None and processor.kind != adapter.kind:
        raise ValueError(
            f"processor: expected one of kind {adapter.kind!r} as the generator is, got "
            f"{processor.kind!r}"
        )
    retriever = IndexRetriever(model.config, index, passages, *tokenizers, processor)
    if before is not None and before.return_tokenized_docs:
        retriever.set_ctx_encoder_tokenizer(before.ctx_encoder_tokenizer)
    return retriever


@functools.cache
def _forward_of(kind: Any) -> Any:
    """Return the patched forward of a class, with the signature of its own."""
    signature = inspect.signature(kind.forward)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        del given["self"]
        given |= given.pop("kwargs", {})
        if given.get("labels") is not None:
            return _with_labels(self, given)
        if self.__dict__[_NAME].adapter_of(self.generator).kind != "seq2seq":
            raise ValueError(
                f"labels: expected the answers, without which transformers cannot run "
                f"{architecture(self.generator)}, a decoder-only generator, got None"
            )
        return kind.forward(self, **given)

    return forward


def _with_labels(model: Any, given: dict[str, Any]) -> PatchedOutput:
    patch, config = model.__dict__[_NAME], model.config
    adapter = patch.adapter_of(model.generator)

    def setting(name: str) -> Any:
        value = given.pop(name, None)
        return getattr(config, name) if value is None else value

    reduce_loss, asked = setting("reduce_loss"), setting("output_retrieved")
    excludes_bos = patch.marginal == "sequence" and setting("exclude_bos_score")
    labels = given.pop("labels")
    questions = given.get("input_ids") if given.get("doc_scores") is None else given["doc_scores"]
    check_answers(labels, None if questions is None else len(questions))
    outside = check_label_values(labels, labels != IGNORE_INDEX, adapter.n_vocab)
    pad_id = getattr(config.generator, "pad_token_id", None)
    if adapter.kind == "seq2seq":
        known = labels.masked_fill(outside | (labels == IGNORE_INDEX), pad_id or 0)
        targets, decoder_ids = _targets(model, patch, labels, known, given.get("decoder_input_ids"))
        given["decoder_input_ids"] = decoder_ids
        calling: AbstractContextManager[None] = nullcontext()
    else:
        _refuse_decoder_arguments(model, given)
        if pad_id == getattr(config.generator, "eos_token_id", None):
            pad_id = None  # the end of an answer counts
        targets = labels
        read = without_padding(labels, pad_id).masked_fill(outside, 0)
        calling = _as_decoder_only(adapter, read)
    targets = without_padding(targets, pad_id)
    given |= {"use_cache": False, "output_retrieved": True}
    if patch.marginal == "token":
        given["do_marginalize"] = False
    with adapter.capturing() as seen, calling:
        outputs = type(model).forward(model, **given)
    if len(seen) != 1:
        raise ValueError(
            f"generator: expected {architecture(model.generator)} to apply its output projection "
            f"once, got {len(seen)} times"
        )
    hidden = seen[0][:, -targets.shape[1] :]
    doc_scores = outputs.doc_scores
    if not patch.hf_quirks and outputs.retrieved_doc_ids is not None:
        missing = outputs.retrieved_doc_ids.to(doc_scores.device) < 0
        doc_scores = doc_scores.masked_fill(missing, -torch.inf)
    head, smoothing = adapter.head(), config.label_smoothing
    gold = targets
    if excludes_bos:
        bos_id = config.bos_token_id or getattr(config.generator, "bos_token_id", None)
        gold = without_bos(targets, bos_id)
    if patch.hf_quirks and patch.marginal == "sequence":
        loss = hf_sequence_nll(hidden, head, targets, doc_scores, smoothing, gold)
        loss = loss.sum() if reduce_loss else loss
    else:
        reduction = "sum" if reduce_loss else "none"
        loss = paper_nll(patch.marginal, hidden, head, gold, doc_scores, smoothing, reduction)
    fields = {name: getattr(outputs, name) for name, *_ in _FIELDS if name != "loss"}
    if not asked:
        fields |= dict.fromkeys(_RETRIEVED)
    fields["doc_scores"] = doc_scores
    return PatchedOutput(loss=loss, **fields)


def _targets(
    model: Any, patch: _Patch, labels: Tensor, known: Tensor, decoder_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the targets of an encoder-decoder and what its decoder reads, both `[B, T]`.

    Args:
        model: the patched model.
        patch: its patch.
        labels: the labels as they came.
        known: the labels with a token of the vocabulary everywhere.
        decoder_ids: the decoder's input, if it was given.
    """
    if decoder_ids is None:
        if labels.shape[1] == 1 and not patch.hf_quirks:
            return labels, model.generator.prepare_decoder_input_ids_from_labels(known)
        return shifted(labels), known
    if not patch.hf_quirks:
        raise ValueError(
            "decoder_input_ids: expected None with labels, since transformers shifts the labels of "
            "RAG-Token but the decoder_input_ids of RAG-Sequence (hf_quirks=True does as it does), "
            f"got {list(decoder_ids.shape)}"
        )
    return shifted(labels if patch.marginal == "token" else decoder_ids), decoder_ids


def _refuse_decoder_arguments(model: Any, given: dict[str, Any]) -> None:
    for name in (
        "encoder_outputs",
        "decoder_input_ids",
        "decoder_attention_mask",
        "past_key_values",
        "output_attentions",
    ):
        value = given.get(name)
        if value is not None and value is not False:
            raise ValueError(
                f"{name}: expected None with {architecture(model.generator)}, a decoder-only "
                f"generator, got {type(value).__name__}"
            )


@contextmanager
def _as_decoder_only(adapter: GeneratorAdapter, labels: Tensor) -> Iterator[None]:
    """Let transformers call a decoder-only generator as if it were an encoder-decoder.

    Each context, padded on either side, and its labels become one sequence.
    """

    def before(_: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids, mask = given["input_ids"], given["attention_mask"]
        order = mask.argsort(dim=1, stable=True)  # padding first
        return args, adapter.inputs(ids.gather(1, order), mask.gather(1, order), labels)

    def after(_: Any, args: Any, outputs: Any) -> Seq2SeqLMOutput:
        return Seq2SeqLMOutput(logits=outputs.logits)

    generator = adapter.model
    hooks = (
        generator.register_forward_pre_hook(before, with_kwargs=True),
        generator.register_forward_hook(after),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _refuse_generate(self: Any, *_args: Any, **_kwargs: Any) -> Any:
    raise ValueError(
        f"generate: expected an encoder-decoder, got {architecture(self.generator)}; "
        "fastrag.RagModel.from_hf(model).generate answers with it"
    )

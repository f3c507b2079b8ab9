"""Reader: a generator as a module that maps contexts and answers to hidden states before its head.

    hidden = reader(context_ids, context_mask, labels)      # [B, K, T, H]
    head = reader.head()                                    # LMHead, with gradients

Everything that fastrag knows about a generator's architecture is in its adapter. `adapt_generator`
makes one for any model of transformers; another model reads through an adapter that its owner
passes in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastrag.nn.arguments import explain_failure, is_sharded
from fastrag.nn.generators import adapt_generator, evaluating
from fastrag.nn.heads import LMHead
from fastrag.nn.loss import Pairs, RagLoss, RagLossOutput
from fastrag.nn.prefix_cache import PrefixCache
from fastrag.nn.pruning import Pruned, pruned_loss
from fastrag.profiling import stage

if TYPE_CHECKING:
    from fastrag.data.processor import Contexts
    from fastrag.nn.likelihoods import LikelihoodCache

# Contexts that are read together without gradient on a CPU. A T5 of width 128 scores 512 contexts
# of 21 tokens, the longest of 29, in .28 s if it reads 64 at a time, in .35 s with 32 or all.
_CONTEXTS_ON_CPU = 64


@runtime_checkable
class Adapter(Protocol):
    """Connects a generator to a reader: hidden states before the head, and the head.

    Attributes:
        kind: "causal" (contexts are padded on the left) or "seq2seq" (on the right).
        n_vocab: V, the size of the vocabulary that the head scores.
    """

    kind: str

    @property
    def n_vocab(self) -> int: ...

    def hidden(self, context_ids: Tensor, context_mask: Tensor, labels: Tensor) -> Tensor:
        """Return the states that predict each label, `[B, K, T, H]`, differentiable."""

    def head(self) -> LMHead:
        """Return the head as it is now, with gradients to its parameters."""


class Reader(nn.Module):
    """Read contexts with a generator.

    The generator may be replaced at any time (`reader.generator = other`): the next call adapts the
    new one and checks it.

    Args:
        generator: a seq2seq or causal language model of transformers, plain or with PEFT; with
            `adapter`, any module.
        adapter: an `Adapter` of this generator; None: `adapt_generator(generator)`.
        prune: in training, `loss` first scores all contexts without gradient, and then reads those
            with gradient whose weight in the generator's gradient exceeds this, in [0, 1); see
            `fastrag.nn.pruning`. None: it reads all with gradient.
        prune_unbiased: keep contexts below `prune` at random, so that the expected gradient is that
            of all contexts.

    Attributes:
        prefix_cache: a `PrefixCache` that decoding uses, or None.
        likelihoods: a `LikelihoodCache` that `loss` uses, for a generator that does not train, or
            None.

    Raises:
        ValueError: a generator that `adapt_generator` refuses, or an adapter without the methods
            of `Adapter`.

    Example:
        >>> reader = Reader(generator)                              # doctest: +SKIP
        >>> reader(context_ids, context_mask, labels).shape         # doctest: +SKIP
        torch.Size([8, 5, 16, 576])
    """

    def __init__(
        self,
        generator: nn.Module,
        adapter: Adapter | None = None,
        *,
        prune: float | None = None,
        prune_unbiased: bool = False,
    ) -> None:
        super().__init__()
        if adapter is None:
            adapter = adapt_generator(generator)
        elif not isinstance(adapter, Adapter):
            raise ValueError(
                f"adapter: expected an object with kind, n_vocab, hidden and head, got "
                f"{type(adapter).__name__}"
            )
        self.generator = generator
        self.prune = prune
        self.prune_unbiased = prune_unbiased
        self.prefix_cache: PrefixCache | None = None
        self.likelihoods: LikelihoodCache | None = None
        self._adapted = (generator, adapter)

    @property
    def adapter(self) -> Any:
        """The adapter of the present generator."""
        adapted, adapter = self._adapted
        if adapted is not self.generator:
            adapter = adapt_generator(self.generator)
            self._adapted = (self.generator, adapter)
        return adapter

    @property
    def kind(self) -> str:
        """ "causal" or "seq2seq"."""
        return str(self.adapter.kind)

    def head(self) -> LMHead:
        """Return the head as it is now, with gradients to its parameters."""
        return self.adapter.head()

    def forward(self, context_ids: Tensor, context_mask: Tensor, labels: Tensor) -> Tensor:
        """Return the hidden states that predict each label.

        Args:
            context_ids: `[B*K, L]` int64, the K contexts of a question next to each other.
            context_mask: `[B*K, L]`, 1 at tokens.
            labels: `[B, T]` int64, padded on the right with -100.

        Returns:
            hidden `[B, K, T, H]`, differentiable.

        Raises:
            ValueError: as the adapter's `hidden`, or the generator is on another device.
        """
        try:
            return self.adapter.hidden(context_ids, context_mask, labels)
        except RuntimeError as error:
            explain_failure("generator", self.generator, context_ids, error)
            raise

    def states(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Return the states of single contexts, without the padding that all of them have.

        Args:
            ids: `[n, L]` int64.
            mask: `[n, L]`, 1 at tokens.
            labels: the answer of each context, `[n, T]` int64, padded with -100.

        Returns:
            hidden `[n, 1, T, H]`, differentiable.
        """
        width = int(mask.sum(1).max())
        columns = slice(-width, None) if self.kind == "causal" else slice(width)
        with stage("generator"):
            return self(ids[:, columns], mask[:, columns], labels)

    def score(
        self, loss_fn: RagLoss, ids: Tensor, mask: Tensor, labels: Tensor, n_docs: int = 1
    ) -> Pairs:
        """Return the log-likelihood of the answer in each context, without gradient, in eval mode.

        On a CPU, contexts of like length are read together.

        Args:
            loss_fn: the loss that takes them.
            ids: `[B*K, L]` int64, the K contexts of a question next to each other.
            mask: `[B*K, L]`, 1 at tokens.
            labels: `[B, T]` int64, padded with -100.
            n_docs: K.

        Returns:
            `Pairs`.

        Raises:
            ValueError: as `RagLoss.pairs`.
        """
        with evaluating(self), stage("score_contexts"):
            groups = self._groups(mask)
            hidden = [self.states(ids[rows], mask[rows], labels[rows // n_docs]) for rows in groups]
            ordered = torch.cat(hidden)[torch.cat(groups).argsort()]
            del hidden
            known = loss_fn.pairs(ordered, self.head(), labels, n_docs)
            # Weights that autocast has cast here have no gradient: a next pass must not use them.
            torch.clear_autocast_cache()
        return known

    def loss(
        self,
        loss_fn: RagLoss,
        contexts: Contexts,
        labels: Tensor,
        doc_scores: Tensor,
        *,
        normalizer: float | Tensor | None = None,
        example_weight: Tensor | None = None,
        posterior_scores: Tensor | None = None,
    ) -> RagLossOutput | Pruned:
        """Read contexts and return the loss of their answers.

        Args:
            loss_fn: the loss.
            contexts: those of `doc_scores`, `[B*K, L]`.
            labels: `[B, T]` int64.
            doc_scores: `[B, K]`, -inf at missing passages, differentiable.
            normalizer: as for `RagLoss`.
            example_weight: as for `RagLoss`.
            posterior_scores: as for `RagLoss`.

        Returns:
            `RagLossOutput`; in a pruned step `Pruned`.
        """
        given: dict[str, Any] = {
            "normalizer": normalizer,
            "example_weight": example_weight,
            "posterior_scores": posterior_scores,
        }
        if self.likelihoods is not None:
            pairs = self.likelihoods.pairs(self, loss_fn, contexts, labels, doc_scores.shape[1])
            return loss_fn.of_pairs(pairs, labels, doc_scores, **given)
        if self.prune is not None and self.training and torch.is_grad_enabled():
            given |= {"eps": self.prune, "unbiased": self.prune_unbiased}
            return pruned_loss(self, loss_fn, contexts, labels, doc_scores, **given)
        with stage("generator"):
            hidden = self(contexts.ids, contexts.mask, labels)  # [B, K, T, H]
        return loss_fn(hidden, self.head(), labels, doc_scores, **given)

    def _groups(self, mask: Tensor) -> list[Tensor]:
        """Return the rows of contexts to score together."""
        rows = torch.arange(len(mask), device=mask.device)
        # Padding costs as much time as text on a CPU. Ranks that gather shards read equally often.
        if mask.device.type != "cpu" or is_sharded(self):
            return [rows]
        return list(mask.sum(1).argsort(stable=True).split(_CONTEXTS_ON_CPU))

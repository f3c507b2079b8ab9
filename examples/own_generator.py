"""Train a generator that is not of transformers, through an adapter of one's own.

python examples/own_generator.py ENCODER GENERATOR    (only the tokenizer of GENERATOR is used)
"""

import sys

import torch
from capitals import rag_model, train
from torch import Tensor, nn

from fastrag import LMHead, Reader


class Copier(nn.Module):
    """Look up the next token in the context; the module is its own adapter."""

    def __init__(self, kind: str, n_vocab: int, width: int = 64) -> None:
        super().__init__()
        self.kind, self.n_vocab = kind, n_vocab
        self.embedding = nn.Embedding(n_vocab, width)
        self.attention = nn.MultiheadAttention(width, num_heads=4, batch_first=True)

    def hidden(self, context_ids: Tensor, context_mask: Tensor, labels: Tensor) -> Tensor:
        read, padding = self.embedding(context_ids), context_mask == 0
        before = nn.functional.pad(labels.clamp(min=0)[:, :-1], (1, 0))  # [B, T]
        asked = self.embedding(before).repeat_interleave(len(read) // len(labels), dim=0)
        states, _ = self.attention(asked, read, read, padding, need_weights=False)
        return (asked + states).unflatten(0, (len(labels), -1))  # [B, K, T, H]

    def head(self) -> LMHead:
        return LMHead(self.embedding.weight)


torch.manual_seed(0)
model, questions = rag_model(*sys.argv[1:3])
copier = Copier(model.reader.kind, model.reader.adapter.n_vocab)
model.reader = Reader(copier, adapter=copier)
losses = train(model, questions)

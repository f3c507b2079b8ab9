"""The registry's entries, one operation a module; `OPS` has them by name."""

from __future__ import annotations

from benchmarks.harness.registry import Op
from benchmarks.ops import (
    contexts,
    decode,
    doc_scores,
    first_token,
    marginal_loss,
    mips,
    rag_step,
    refresh,
    token_logp,
)

# The most important first: a run with a budget takes them in this order.
OPS: dict[str, Op] = {
    module.OP.name: module.OP
    for module in (
        marginal_loss,
        rag_step,
        mips,
        token_logp,
        doc_scores,
        contexts,
        decode,
        first_token,
        refresh,
    )
}

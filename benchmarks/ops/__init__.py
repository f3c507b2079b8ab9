"""The registry's entries, one operation a module; `OPS` has them by name."""

from __future__ import annotations

from benchmarks.ops import doc_scores, marginal_loss, mips, rag_step, token_logp
from benchmarks.registry import Op

OPS: dict[str, Op] = {
    op.name: op for op in (marginal_loss.OP, token_logp.OP, doc_scores.OP, mips.OP, rag_step.OP)
}

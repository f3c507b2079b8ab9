"""Which calls may go past torch's dispatcher.

There a custom op takes some ten microseconds, forward and backward each: nothing beside a product
with the head, but several times what a small op computes for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

# Each says that somebody wants to see the op itself. Without one of them, everybody does.
_asks = [
    getattr(torch._C, name, lambda: True)
    for name in ("_len_torch_dispatch_stack", "_are_functorch_transforms_active", "_is_tracing")
]
_MODES, _TRANSFORMS, _TRACES = _asks


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nobody traces, transforms or intercepts a call with these tensors.

    What it computes may then be called without the op, under a `torch.autograd.Function` of its own
    where a gradient is wanted.
    """
    if torch.compiler.is_compiling() or _MODES() or _TRANSFORMS() or _TRACES():
        return False
    for x in tensors:
        kind = type(x)
        if kind is not Tensor and kind is not Parameter and x is not None:
            return False
    return True

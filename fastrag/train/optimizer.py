"""Parameter groups of retriever and reader, and float32 copies of weights in fewer bits.

    master <- step(master, gradient);  weight <- master, rounded

bfloat16 has 8 significant bits: adding less than about 1/512 of a weight to it changes nothing, and
most updates of a pretrained model are smaller. In a float32 copy they add up.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

# Weight decay leaves out parameters of these names, and those with fewer than two dimensions.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|[._])norm(?:$|\.)")
# States of torch's optimisers that have the shape of their parameter.
_SHAPED_STATE = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
_PARTS = {"retriever": "retriever", "loss_fn": "retriever", "reader": "reader"}


def parameter_groups(
    model: nn.Module, *, retriever_lr: float, reader_lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Split the parameters that train into groups for a torch optimiser.

    The reader has one learning rate, the retriever with its temperature and the parameters of the
    objective another. Weight decay applies to matrices, except norms and biases.

    Args:
        model: a `RagModel`, also inside a wrapper such as DistributedDataParallel.
        retriever_lr: learning rate of encoders, temperature and objective.
        reader_lr: learning rate of the generator.
        weight_decay: decay of the matrices.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `part` ("reader" or "retriever"), the
        reader's first; empty groups are left out.

    Raises:
        ValueError: a parameter that trains belongs to neither part.

    Example:
        >>> groups = parameter_groups(model, retriever_lr=1e-5, reader_lr=5e-5)    # doctest: +SKIP
        >>> optimizer = torch.optim.AdamW(groups)                                  # doctest: +SKIP
    """
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((_PARTS[each] for each in name.split(".") if each in _PARTS), None)
            if part is None:
                raise ValueError(
                    "model: expected parameters of `retriever`, `reader` and `loss_fn`, as a "
                    f"RagModel has them, got {name}"
                )
            decays = parameter.dim() >= 2 and not _NO_DECAY.search(name.lower())
            members.setdefault((part, decays), []).append(parameter)
    rates = {"reader": reader_lr, "retriever": retriever_lr}
    return [
        {
            "params": members[part, decays],
            "lr": rate,
            "weight_decay": weight_decay if decays else 0.0,
            "part": part,
        }
        for part, rate in rates.items()
        for decays in (True, False)
        if (part, decays) in members
    ]


def needs_masters(groups: list[dict[str, Any]]) -> bool:
    """Return whether groups for an optimiser hold parameters of fewer bits than float32."""
    return any(_is_low(parameter) for group in groups for parameter in group["params"])


class MasterWeights(torch.optim.Optimizer):
    """Step an optimiser on float32 copies of the parameters that have fewer bits.

    With AdamW, the copies and their optimiser state take 12 bytes per parameter. The copies are
    taken from the parameters at the first step, and are part of the state.

    Args:
        kind: class of the optimiser.
        groups: its parameter groups.
        settings: its further arguments.

    Example:
        >>> weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> optimizer = MasterWeights(torch.optim.SGD, [{"params": [weight]}], lr=1e-3)
        >>> for _ in range(8):
        ...     weight.grad = torch.ones_like(weight)
        ...     optimizer.step()
        >>> weight.item()                                   # 1 - 1e-3 would be rounded to 1
        0.9921875
    """

    def __init__(
        self,
        kind: Callable[..., torch.optim.Optimizer],
        groups: list[dict[str, Any]],
        **settings: Any,
    ) -> None:
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._read = False
        inner_groups = [
            group | {"params": [self._master(each) for each in group["params"]]} for group in groups
        ]
        self.inner = kind(inner_groups, **settings)
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self._share()

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        if not _is_low(parameter):
            return parameter
        master = nn.Parameter(parameter.detach().float())
        self._pairs.append((parameter, master))
        return master

    def _share(self) -> None:
        """Share groups and state with the inner optimiser, which replaces both in loading."""
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the copies and round them into the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter, master in self._pairs:
            if not self._read:  # weights may be loaded before the first step
                master.copy_(parameter)
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self._read = True
        self.inner.step()
        for parameter, master in self._pairs:
            parameter.copy_(master)
            master.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the parameters."""
        self.inner.zero_grad(set_to_none)
        for parameter, _ in self._pairs:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimiser's state and the copies."""
        masters = [master.detach() for _, master in self._pairs] if self._read else []
        return self.inner.state_dict() | {"masters": masters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: the state belongs to other parameters, or to an optimiser without copies.
        """
        masters: list[Tensor] | None = state_dict.get("masters")
        shapes = [list(master.shape) for _, master in self._pairs]
        if masters is None or (masters and [list(each.shape) for each in masters] != shapes):
            raise ValueError(
                f"state_dict: expected float32 copies of {len(shapes)} parameters of fewer bits, "
                f"got {'none' if masters is None else 'those of other parameters'}"
            )
        self.inner.load_state_dict({k: v for k, v in state_dict.items() if k != "masters"})
        self._share()
        self._read = bool(masters)
        with torch.no_grad():
            for (_, master), each in zip(self._pairs, masters, strict=False):
                master.copy_(each)


def check_fits(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Refuse the state dict of an optimiser of other parameters.

    torch compares the sizes of the groups alone: another shape would fail in the next step.

    Args:
        optimizer: the optimiser that is to load the state.
        state: the state dict.

    Raises:
        ValueError: the groups have other sizes, a parameter has another shape, or only one of the
            two has float32 copies.
    """
    wrapped = getattr(optimizer, "optimizer", optimizer)  # by accelerate
    has_copies = isinstance(wrapped, MasterWeights)
    if has_copies != ("masters" in state):
        words = ("with", "without") if has_copies else ("without", "with")
        raise ValueError(
            f"expected an optimiser state {words[0]} float32 copies, got one {words[1]} them"
        )
    groups = [group["params"] for group in optimizer.param_groups]
    saved = [group["params"] for group in state.get("param_groups", ())]
    expected, got = ([len(group) for group in each] for each in (groups, saved))
    if expected != got:
        raise ValueError(
            f"expected the optimiser state of groups of {expected} parameters, got {got}"
        )
    for i, (parameter, key) in enumerate(zip(chain(*groups), chain(*saved), strict=True)):
        kept = state["state"].get(key, {})
        for name in sorted(_SHAPED_STATE & kept.keys()):
            if kept[name].shape != parameter.shape:
                raise ValueError(
                    f"expected {name} of shape {list(parameter.shape)} for parameter {i}, got "
                    f"{list(kept[name].shape)}"
                )


def _is_low(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.dtype.itemsize < 4

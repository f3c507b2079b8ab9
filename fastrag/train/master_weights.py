"""float32 copies of weights that are kept in fewer bits, which an optimiser updates in their place.

    master <- step(master, gradient);  weight <- master, rounded

bfloat16 has 8 significant bits: what is less than about 1/512 of a weight is lost when it is added
to it, and most updates of a pretrained model are less. In the copy they add up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def needs_masters(groups: list[dict[str, Any]]) -> bool:
    """Whether groups for an optimiser hold parameters of fewer bits than float32."""
    return any(_is_low(parameter) for group in groups for parameter in group["params"])


class MasterWeights(torch.optim.Optimizer):
    """Step an optimiser on float32 copies of the parameters that have fewer bits.

    The copies and what the optimiser keeps for them take 12 bytes a parameter with AdamW. They
    are read off the parameters at the first step, and are part of the state.

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
        """Make groups and state those of the inner optimiser, which loading a state replaces."""
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
            if not self._read:  # not when they are made: weights may be loaded since
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
            ValueError: the state is of other parameters, or of an optimiser without copies.
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


def _is_low(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.dtype.itemsize < 4

"""Who a plain call is plain for, and who has to see the op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastrag.ops.autograd import is_plain


class Subclass(Tensor):
    pass


def test_tensors_parameters_and_none_are_plain() -> None:
    x = torch.zeros(2)
    assert is_plain(x, None, torch.nn.Parameter(x), x.double().requires_grad_())
    assert is_plain()


def test_a_subclass_is_not() -> None:
    with FakeTensorMode() as mode:
        fake = torch.zeros(2)
    assert not is_plain(fake) and not is_plain(mode.from_tensor(torch.zeros(2)))
    assert not is_plain(torch.zeros(2), torch.zeros(2).as_subclass(Subclass))


def test_nothing_is_inside_a_mode() -> None:
    with FlopCounterMode(display=False):
        assert not is_plain(torch.zeros(2))
    assert is_plain(torch.zeros(2))


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_nothing_is_inside_a_transform(transform) -> None:
    seen = []
    transform(lambda x: seen.append(is_plain(x)) or (x * 2).sum())(torch.zeros(3))
    assert seen == [False]


def test_nothing_is_while_a_graph_is_made() -> None:
    compiled = torch.compile(lambda x: x + is_plain(x), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [0.0, 0.0]

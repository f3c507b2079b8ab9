"""A backend that is added from outside the package."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from fastrag import FlatIndex, reference
from fastrag.ops import backends
from fastrag.ops.backends import Backend, BackendError


def test_a_backend_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is preferred, can be forced or passed over, and leaves other operations alone."""
    monkeypatch.setattr(backends, "_backends", list(backends._backends))
    monkeypatch.setitem(backends._implemented, "mips_topk", {**backends._implemented["mips_topk"]})
    module: Any = ModuleType("mine")
    searched = []

    def search(query: Any, index_emb: Any, k: int, exclude: Any, scale: Any, offset: Any) -> Any:
        searched.append(k)
        return reference.mips_topk(query, index_emb, k, exclude=exclude)

    module.search = search
    monkeypatch.setitem(sys.modules, "mine", module)

    class Mine(Backend, name="mine", implements={"mips_topk": "mine:search"}):
        devices = ("cpu",)

        def refusal(self, device: torch.device, dtype: torch.dtype | None) -> str:
            return "it computes in float32" if dtype == torch.float64 else ""

    index = FlatIndex(2)
    index.add(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    assert index.search(torch.tensor([[1.0, 1.0]]), 1).rows.tolist() == [[1]] and searched == [1]
    assert backends.choose("mips_topk", torch.device("cpu"), torch.float64) != "mine"
    assert backends.choose("doc_scores", torch.device("cpu")) != "mine"
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "mine")
    with pytest.raises(BackendError, match="mine cannot run mips_topk: it computes in float32"):
        backends.choose("mips_topk", torch.device("cpu"), torch.float64)
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "yours")
    with pytest.raises(BackendError, match="no backend is called 'yours'; backends: mine, triton"):
        backends.choose("mips_topk", torch.device("cpu"))

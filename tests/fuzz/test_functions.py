"""Public functions with one argument spoilt: they work, or a ValueError names an argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastrag.functional as F
from tests.fuzz.effort import effort

B, K, T, H, V, D, N = 2, 3, 4, 5, 7, 6, 8


def _scores() -> dict[str, Any]:
    return {
        "query_emb": torch.randn(B, D),
        "passage_emb": torch.randn(N, D),
        "rows": torch.randint(N, (B, K)),
        "tau": 1.0,
        "scale": None,
        "offset": None,
        "return_log_prior": False,
    }


def _logp() -> dict[str, Any]:
    return {
        "hidden": torch.randn(B, K, T, H),
        "weight": torch.randn(V, H),
        "labels": torch.randint(V, (B, T)),
        "bias": torch.randn(V),
        "softcap": None,
        "logit_scale": 1.0,
        "ignore_index": -100,
    }


def _nll() -> dict[str, Any]:
    return _logp() | {
        "doc_scores": torch.randn(B, K),
        "label_smoothing": 0.1,
        "reduction": "mean",
        "normalizer": None,
        "example_weight": torch.rand(B),
        "valid_rows": None,
        "return_posterior": True,
    }


def _search() -> dict[str, Any]:
    return {
        "query_emb": torch.randn(B, D),
        "index_emb": torch.randn(N, D),
        "k": 3,
        "exclude": torch.randint(N, (B, 1)),
        "scale": None,
        "offset": None,
    }


ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "doc_scores": _scores,
    "token_logp": _logp,
    "rag_token_nll": _nll,
    "rag_sequence_nll": _nll,
    "mips_topk": _search,
}
DTYPES = [getattr(torch, name) for name in (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool",
    "complex64", "float8_e4m3fn",
)]  # fmt: skip
NUMBERS = [0, 1, -1, 3, 2**31, 2**63, 10**20, 10**400, -(10**400), 0.0, 0.5, -0.5, 1e308, 1e-320]
NUMBERS += [math.nan, math.inf, -math.inf, True, False, 3 + 1j]
NUMPY = [np.int64(2), np.float32(0.5), np.bool_(True), np.array(2), np.zeros((B, D)), np.float64(2)]
THINGS = [None, "mean", "x" * 10**5, b"x", [], [1.0] * 3, (), {}, {"a": 1}, object(), print]
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8]), max_size=5)


def _sparse(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_sparse()


def _csr(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_sparse_csr()


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "sparse": _sparse,
    "csr": _csr,
    "meta": lambda x: x.to("meta"),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "numpy": lambda x: x.numpy(),
    "list": lambda x: x.tolist(),
    "scalar": lambda x: x.flatten()[0],
    "nan": lambda x: x.double() * math.nan,
    "inf": lambda x: x.double() * math.inf,
    "huge": lambda x: x.double() * 1e300,
    "transposed": lambda x: x.t() if x.dim() == 2 else x.transpose(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
    "empty": lambda x: x[:0],
    "grad": lambda x: x.float().requires_grad_(),
    "subclass": lambda x: x.as_subclass(_Subclass),
    "negative": lambda x: -x - 2,
    "far": lambda x: x + 2**40,
}


class _Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("name", F.__all__)
def test_shapes_alone(name: str) -> None:
    """Tensors without values give results without values; mixed with others they are refused."""
    arguments = ARGUMENTS[name]()
    tensors = [each for each, value in arguments.items() if isinstance(value, torch.Tensor)]
    moved = {each: arguments[each].to("meta") for each in tensors}
    out = getattr(F, name)(**arguments | moved)
    expected = getattr(F, name)(**arguments)
    for got, wanted in zip(_tuple(out), _tuple(expected), strict=True):
        assert got.is_meta and got.shape == wanted.shape and got.dtype == wanted.dtype
    for each in tensors:
        with pytest.raises(
            ValueError, match=f"expected all tensors on one device.* {each} on meta"
        ):
            getattr(F, name)(**arguments | {each: moved[each]})


def _tuple(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


LAYOUTS = [("sparse", "sparse_coo"), ("csr", "sparse_csr")]


@pytest.mark.parametrize(("change", "layout"), LAYOUTS)
@pytest.mark.parametrize("name", F.__all__)
def test_sparse_tensors_are_named(name: str, change: str, layout: str) -> None:
    arguments = ARGUMENTS[name]()
    for each, value in arguments.items():
        if isinstance(value, torch.Tensor) and (change == "sparse" or value.dim() == 2):
            message = f"^{each}: expected a dense tensor, got .* of layout {layout}$"
            with pytest.raises(ValueError, match=message):
                getattr(F, name)(**arguments | {each: CHANGES[change](value)})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mips_topk", {"k": 10**20}, "k: expected a whole number of 64 bits, got 10{20}$"),
        ("mips_topk", {"k": 2**31}, "k: expected a whole number of at least 1, below 2.*31, got 2"),
        ("mips_topk", {"k": True}, "k: expected a whole number, got True$"),
        (
            "mips_topk",
            {"k": torch.tensor(3)},
            r"k: expected a whole number, got Tensor \[\] int64$",
        ),
        ("token_logp", {"ignore_index": 2**63}, "ignore_index: expected a whole number of 64 bits"),
        ("token_logp", {"logit_scale": 10**400}, "logit_scale: .* got an integer of about 401 dig"),
        ("token_logp", {"softcap": torch.ones(2)}, r"softcap: .* got Tensor \[2\] float32$"),
        ("token_logp", {"softcap": True}, "softcap: expected a positive number or None, got True$"),
        ("doc_scores", {"tau": np.ones(2)}, r"tau: .* got ndarray \[2\] float64$"),
        ("doc_scores", {"return_log_prior": torch.ones(2)}, "return_log_prior: expected True or F"),
        ("rag_token_nll", {"label_smoothing": torch.ones(2)}, r"label_smoothing: .* got Tensor"),
        ("rag_token_nll", {"normalizer": 10**400}, "normalizer: .* got an integer of about 401"),
        ("rag_token_nll", {"reduction": torch.ones(2)}, r"reduction: .* got Tensor \[2\] float32"),
        ("rag_sequence_nll", {"reduction": "x" * 10**5}, r"reduction: .* got 'x{196}\.\.\.$"),
    ],
)
def test_numbers_and_words(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(F, name)(**ARGUMENTS[name]() | change)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A function and its arguments, of which one or two are something else."""
    name = draw(st.sampled_from(sorted(ARGUMENTS)))
    torch.manual_seed(draw(st.integers(0, 3)))
    arguments = ARGUMENTS[name]()
    for _ in range(draw(st.integers(1, 2))):
        spoilt = draw(st.sampled_from(sorted(arguments)))
        value = arguments[spoilt]
        try:
            arguments[spoilt] = _other(draw, value)
        except (RuntimeError, TypeError, IndexError):  # torch has no such tensor
            continue
    return name, arguments


def _other(draw: st.DrawFn, value: Any) -> Any:
    how = draw(st.integers(0, 3))
    if how == 0:
        return draw(st.sampled_from(NUMBERS + NUMPY + THINGS))
    if how == 1 or not isinstance(value, torch.Tensor):
        return torch.ones(draw(SHAPES)).to(draw(st.sampled_from(DTYPES)))
    if how == 2:
        return value.to(draw(st.sampled_from(DTYPES)))
    return CHANGES[draw(st.sampled_from(sorted(CHANGES)))](value)


@pytest.mark.parametrize("examples", effort(quick=200, slow=5000))
def test_a_spoilt_argument_is_named(examples: int) -> None:
    @settings(derandomize=True, deadline=None, max_examples=examples)
    @given(calls())
    def check(call: tuple[str, dict[str, Any]]) -> None:
        name, arguments = call
        try:
            out = getattr(F, name)(**arguments)
        except ValueError as error:
            message = str(error)
            assert len(message) < 600 and "\n" not in message
            assert any(each in message for each in arguments), message
            return
        assert all(isinstance(each, torch.Tensor) for each in _tuple(out))

    check()

"""The yardsticks of the other tests: what they must let pass, and what they must not."""

from __future__ import annotations

import pytest
import torch

from fastrag.testing import assert_close, cpu_memory

ORACLE = torch.linspace(1.0, 2.0, 100, dtype=torch.float64)
# Largest relative error of a vector that passes though plain torch happens to be exact.
SLACK = {torch.float32: 4e-7, torch.float16: 9e-4, torch.bfloat16: 7e-3}


@pytest.mark.parametrize("dtype", SLACK, ids=str)
def test_floor(dtype: torch.dtype) -> None:
    exact = torch.ones(100, dtype=dtype)
    true = exact.double()
    assert_close((true * (1 + SLACK[dtype])).to(dtype), exact, true)
    with pytest.raises(AssertionError, match="norm of the error"):
        assert_close((true * (1 + 3 * SLACK[dtype])).to(dtype), exact, true)


def test_error_of_plain_torch_is_the_unit() -> None:
    plain = (ORACLE + 0.01).float()
    assert_close((ORACLE - 0.012).float(), plain, ORACLE)
    with pytest.raises(AssertionError, match="grad: norm of the error"):
        assert_close((ORACLE - 0.013).float(), plain, ORACLE, name="grad")
    one_wrong = ORACLE.float()
    one_wrong[7] += 0.021
    with pytest.raises(AssertionError, match="maximum of the error"):
        assert_close(one_wrong, plain, ORACLE)


def test_what_is_not_a_number() -> None:
    true = ORACLE.clone()
    true[3] = -torch.inf
    assert_close(true.float(), true.float(), true)
    for bad in (torch.nan, torch.inf, 0.0):
        wrong = true.float()
        wrong[3] = bad
        with pytest.raises(AssertionError, match="infinities or NaN"):
            assert_close(wrong, true.float(), true)
    wrong = true.float()
    wrong[4] = torch.nan
    with pytest.raises(AssertionError, match="infinities or NaN"):
        assert_close(wrong, true.float(), true)
    with pytest.raises(AssertionError, match="norm of the error"):  # plain torch failed: no unit
        assert_close(true.float(), wrong, true)


def test_shape_and_dtype() -> None:
    with pytest.raises(AssertionError, match=r"\[99\] torch.float32 against \[100\]"):
        assert_close(ORACLE.float()[1:], ORACLE.float(), ORACLE)
    with pytest.raises(AssertionError, match="torch.float32 against .* torch.float16"):
        assert_close(ORACLE.float(), ORACLE.half(), ORACLE)


def test_cpu_memory() -> None:
    def run() -> torch.Tensor:
        kept = torch.zeros(1 << 16)
        for _ in range(3):
            torch.zeros(1 << 18)
        return kept

    run()
    peak, largest = cpu_memory(run)
    assert largest == 4 << 18 and largest + (4 << 16) <= peak < largest + (4 << 16) + 4096

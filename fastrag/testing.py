"""Helpers for numerical tests: the three-way error bound and the peak memory of a CPU computation.

They are public because whoever adds a kernel needs them; nothing in fastrag itself imports them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def assert_close(
    actual: Tensor,
    plain: Tensor,
    oracle: Tensor,
    *,
    norm: float = 1.25,
    peak: float = 2.0,
    floor: float | None = None,
    scale: float = 0.0,
    name: str = "result",
) -> None:
    """Asserts that `actual` errs no more than plain torch in the same dtype, against an oracle.

        |actual - oracle|_2   <= norm * |plain - oracle|_2   + floor * (|oracle|_2 + scale sqrt(n))
        max|actual - oracle|  <= peak * max|plain - oracle|  + floor * (max|oracle| + scale)

    A fixed tolerance says little: too wide for one shape, too narrow for another. What plain torch
    loses in the same dtype is the natural unit.

    Args:
        actual: the result under test. Any shape.
        plain: what straightforward torch gives in the dtype of actual. Same shape.
        oracle: the same in float64. Infinities must agree in place and sign.
        norm: factor for the norm of the error.
        peak: factor for the largest error.
        floor: relative error that is always allowed, for where plain torch happens to be exact.
            Default: 4 units of rounding of the dtype of actual, 1 in 16 bits, where a unit is
            a percent and a result is rounded once, at the end.
        scale: size of the terms whose difference the result is, where they may cancel: no
            algorithm on rounded terms errs less than their rounding.
        name: what to call the result in the message.

    Raises:
        AssertionError: a bound is broken, or shape, dtype, NaN or infinity disagree.

    Example:
        >>> import torch
        >>> oracle = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> assert_close(oracle.float(), oracle.float(), oracle)
    """
    if actual.shape != oracle.shape or actual.dtype != plain.dtype:
        raise AssertionError(
            f"{name}: {list(actual.shape)} {actual.dtype} against {list(oracle.shape)} "
            f"{plain.dtype}"
        )
    if floor is None:
        info = torch.finfo(actual.dtype)
        floor = (1 if info.bits == 16 else 4) * info.eps
    got, base, true = (x.detach().double() for x in (actual, plain, oracle))
    infinite = true.isinf()
    if not torch.equal(got[infinite], true[infinite]) or not got[~infinite].isfinite().all():
        raise AssertionError(f"{name}: infinities or NaN where the oracle has none")
    if infinite.all():
        return
    got, base, true = (x[~infinite] for x in (got, base, true))
    error, allowed = (got - true).abs(), (base - true).abs()
    limits = (
        (
            "norm",
            error.norm(),
            norm * allowed.norm() + floor * (true.norm() + scale * error.numel() ** 0.5),
        ),
        (
            "maximum",
            error.max(),
            peak * allowed.max() + floor * (true.abs().max() + scale),
        ),
    )
    for what, have, limit in limits:
        if not have <= limit:
            raise AssertionError(
                f"{name}: {what} of the error is {have:.3e}, at most {limit:.3e} allowed "
                f"(plain torch: {(allowed.norm() if what == 'norm' else allowed.max()):.3e})"
            )


def cpu_memory(run: Callable[[], object]) -> tuple[int, int]:
    """Returns the peak of the CPU bytes that `run` allocates and the largest single allocation.

    Example:
        >>> import torch
        >>> cpu_memory(lambda: torch.zeros(1 << 18))[1]
        1048576
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = run()
    results = profile.profiler.kineto_results
    sizes = [event.nbytes() for event in results.events() if event.name() == "[memory]"]
    del kept
    total = peak = largest = 0
    for size in sizes:
        total += size
        peak, largest = max(peak, total), max(largest, size)
    return peak, largest

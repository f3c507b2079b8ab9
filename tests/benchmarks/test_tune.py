"""Tuning: jobs that give the right answer, and what is kept of what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastrag.kernels import tuning  # noqa: E402

from benchmarks import tune  # noqa: E402
from benchmarks.gpu.isolation import Record  # noqa: E402
from benchmarks.harness import measure  # noqa: E402
from fastrag.ops import backends  # noqa: E402

CPU = torch.device("cpu")
GRADIENT, STATISTICS = "row_gradient", "row_statistics with_mean=True"
FACTS = {name: name for name in ("device", "driver", "torch", "triton", "commit", "date")}


def test_every_tunable_kernel_has_jobs_in_known_regimes() -> None:
    kernels = {job.kernel for job in tune.JOBS.values()}
    assert kernels == {
        "group_max", "row_statistics", "row_gradient", "mixture_statistics", "mixture_gradient",
        "linear_logp", "mixture_logp",
    }  # fmt: skip
    assert len(tune.JOBS) == len(tune._jobs())
    for job in tune.JOBS.values():
        assert len(job.candidates(**job.regime)) >= 2, job.name
        assert tune.fits(job, CPU) == (job.kernel != "group_max")  # which is of descriptors


OF_ROWS = [name for name, job in tune.JOBS.items() if job.kernel.startswith(("row", "mixture"))]


@pytest.mark.skipif(not backends.interpreting(), reason="needs TRITON_INTERPRET=1 on a CPU")
@pytest.mark.parametrize("name", OF_ROWS)
def test_a_pass_over_rows_is_right(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(tune, "SMALL_HEAD", (4, 16, 333))  # an odd vocabulary: rows are padded
    job = tune.JOBS[name]
    call, error = job.problem(CPU, True)
    assert error(call(job.candidates(**job.regime)[0])) <= 1.0


@pytest.mark.skipif(not backends.interpreting(), reason="needs TRITON_INTERPRET=1 on a CPU")
def test_a_job_times_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "SMALL_HEAD", (3, 16, 1031))
    monkeypatch.setattr(tune, "ROUNDS", 2)
    monkeypatch.setattr(measure, "TURN_SECONDS", 0.0)
    job = tune.JOBS[STATISTICS]
    call, error = job.problem(CPU, True)
    for candidate in job.candidates(**job.regime):
        found = call(candidate)
        assert error(found) <= 1.0
        assert error((found[0] + 1e-3, *found[1:])) > 1.0
        assert error((found[0] * torch.nan, *found[1:])) == torch.inf

    turns = iter([5.0, 3.0, 4.0, 9.0, *[1.0] * 8])  # of the first and the second, then the second
    monkeypatch.setattr(tune.measure, "calls_per_turn", lambda call, device: 1)
    monkeypatch.setattr(
        tune.measure, "one_turn", lambda call, device, n: measure.Turn(next(turns), 0.0)
    )
    found = tune.run(job, CPU, small=True)
    first, second = job.candidates(**job.regime)
    # Turns rotate: 5 and 9 are those of the first.
    assert found["config"] == second and found["ms"] == 3.5 and found["first_ms"] == 7.0

    monkeypatch.setattr(tune, "_wrong", lambda problem, c: "off" if c == second else "")
    turns = iter([5.0, 9.0])
    found = tune.run(job, CPU, small=True)
    assert found["config"] == first and found["candidates"][1]["wrong"] == "off"
    monkeypatch.setattr(tune, "_wrong", lambda problem, c: "off")
    with pytest.raises(RuntimeError, match="no candidate is right"):
        tune.run(job, CPU, small=True)


def record(name: str, ms: float, first_ms: float | None) -> Record:
    job = tune.JOBS[name]
    last = tuning.as_entry(job.candidates(**job.regime)[-1])
    found = {"config": last, "ms": ms, "first_ms": first_ms, "candidates": []}
    return Record(name, "passed", 1.0, json.dumps(found))


def test_only_what_gains_is_chosen(tmp_path: Path) -> None:
    records = [
        record(GRADIENT, 0.9, 1.0),
        record(STATISTICS, 0.99, 1.0),
        record("linear_logp dtype=bfloat16", 1.0, None),  # the usual one is unfit there
        Record("linear_logp dtype=float16", "failed", 0.0, "RuntimeError"),
    ]
    found = tune.document(records, "sm_90", FACTS)
    assert set(found["choices"]) == {"row_gradient", "linear_logp"}
    assert found["choices"]["row_gradient"][""]["ms"] == 0.9
    assert set(found["measured"]) == {r.name for r in records[:3]}

    path = tune.install(found, tmp_path / "tuned")
    assert path.name == "sm_90.json" and tuning.read(path)["device"] == "device"
    # Measured again, and no gain any more: the choice goes, others stay.
    tune.install(tune.document([record(GRADIENT, 1.0, 1.0)], "sm_90", FACTS), tmp_path / "tuned")
    assert set(tuning.read(path)["choices"]) == {"linear_logp"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--out", str(tmp_path / "tuned.json")]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err

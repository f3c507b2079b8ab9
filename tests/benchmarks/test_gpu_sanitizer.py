"""What compute-sanitizer prints, in the shapes of its manual and of reports by its users."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import cases
from benchmarks.gpu.isolation import Record
from benchmarks.gpu_suite import Suite
from benchmarks.profiling import ncu

MEMCHECK = """\
========= COMPUTE-SANITIZER
case: a
case: b
========= Invalid __global__ write of size 4 bytes
=========     at _row_statistics_kernel+0x380 in row_pass.py:61
=========     by thread (65,0,0) in block (0,0,0)
=========     Access to 0x7bd889c03041 is misaligned
=========     and is inside the nearest allocation at 0x7bd889c03000 of size 1,024 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: c10::Error::Error() [0x1] in libc10.so
=========
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on \
CUDA API call to cudaDeviceSynchronize.
failed: b: AcceleratorError: CUDA error: unspecified launch failure
========= Target application returned an error
========= ERROR SUMMARY: 769 errors
========= ERROR SUMMARY: 669 errors were not printed. Use --print-limit option to adjust the \
number of printed errors
========= COMPUTE-SANITIZER
case: c
========= ERROR SUMMARY: 0 errors
"""

RACECHECK = """\
========= COMPUTE-SANITIZER
case: a
========= Error: Race reported between Write access at 0x1310 in sm90_xmma_gemm_f32f32_tn
=========     and Read access at 0x1710 in sm90_xmma_gemm_f32f32_tn [19968 hazards]
========= Error: Race reported between Write access at void at::native::reduce_kernel<(int)4>\
(T3)+0x3f0
=========     and Read access at void at::native::reduce_kernel<(int)4>(T3)+0x430 [8 hazards]
case: b
========= Error: Race reported between Write access at _join_kernel+0x5ad20 in standard.py:237
=========     and Write access at _join_kernel+0x5ad20 in standard.py:237 [6136 hazards]
=========
case: c
========= Warning: Race reported between Read access at _rest_kernel+0xf0
=========     and Write access at _rest_kernel+0x280 [4 hazards]
========= Warning: Detected overflow of tracked cuda::barrier structures. Results might be \
incorrect. Try using --num-cuda-barriers to fix the issue
case: d
========= Warning: Detected overflow of tracked cuda::barrier structures. Results might be wrong
========= RACECHECK SUMMARY: 4 hazards displayed (3 errors, 1 warning)
"""


def found(said: str, **outcomes: str) -> dict[str, Record]:
    records = [Record(name, how, 1.0, "CUDA" * (how == "failed")) for name, how in outcomes.items()]
    return {record.name: cases.with_reports(record, said) for record in records}


def test_a_fault_is_that_of_the_case_before_it() -> None:
    records = found(MEMCHECK, a="passed", b="failed", c="passed", d="not run")
    outcomes = [record.outcome for record in records.values()]
    assert outcomes == ["passed", "failed", "passed", "not run"]
    assert records["b"].text.splitlines() == [
        "Invalid __global__ write of size 4 bytes",
        "at _row_statistics_kernel+0x380 in row_pass.py:61",
        "by thread (65,0,0) in block (0,0,0)",
        "Access to 0x7bd889c03041 is misaligned",
        "CUDA",
    ]
    assert found(MEMCHECK, b="passed")["b"].bad  # also where the process came to its end


def test_races_of_libraries_are_not_ours() -> None:
    records = found(RACECHECK, **dict.fromkeys("abcd", "passed"))
    assert [record.bad for record in records.values()] == [False, True, True, False]
    assert records["b"].text.endswith("at _join_kernel+0x5ad20 in standard.py:237 [6136 hazards]")


@pytest.mark.parametrize(
    "report",
    [
        "ERROR: Potential WAW hazard detected at __shared__ 0x0 in block (0,0,0) :\n"
        "=========     Write Thread (0,0,0) at _join_kernel+0x2f0 in linear_logp.py:20",
        "Potential invalid __shared__ read of size 4 bytes\n=========     at k+0x170",
        "Malloc/Free error encountered : Double free\n=========     at 0x79d8",
        "Warp Illegal Instruction",
        "Leaked 64 bytes at 0x400200200",
        "Uninitialized __global__ memory read of size 4 bytes",
    ],
)
def test_what_has_no_name_here_is_a_fault(report: str) -> None:
    assert found(f"case: a\n========= {report}\n", a="passed")["a"].bad


def test_what_was_counted_and_not_told_is_told() -> None:
    records = list(found(RACECHECK, a="passed").values())
    assert cases.unexplained(records, RACECHECK) == (
        "counted, but not in our kernels: 4 hazards displayed (3 errors, 1 warning)"
    )
    assert cases.unexplained(found(RACECHECK, b="passed").values(), RACECHECK) == ""
    quiet = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert cases.unexplained(records, quiet + "========= ERROR SUMMARY: 0 errors\n") == ""


def test_kernels_are_known_by_their_names() -> None:
    folder = Path(__file__).resolve().parents[2] / "kernels"
    lines = [line for path in folder.glob("*.py") for line in path.read_text().splitlines()]
    kernels = [line for line in lines if line.startswith("def ") and "_kernel(" in line]
    assert len(kernels) > 10 and all(cases._OURS.search(line) for line in kernels)
    assert not cases._OURS.search("void at::native::vectorized_elementwise_kernel<(int)4>(T1)")


def test_options_are_those_of_the_tool() -> None:
    words = [cases.wrapper("tool", name) for name in ("memcheck", "racecheck")]
    assert [line[0] for line in words] == ["tool", "tool"]
    assert ["--report-api-errors" in line for line in words] == [True, False]


TOOL = """#!/bin/sh
while [ "$1" != {python} ]; do shift; done
echo ========= COMPUTE-SANITIZER
"$@"
echo ========= ERROR SUMMARY: 1 error
"""


def test_cases_run_under_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it prints after the last case is heard too."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        TOOL.replace("python ]", f"{sys.executable} ]").format(python=sys.executable)
    )
    program.chmod(0o755)
    monkeypatch.setattr(ncu, "find", lambda name: str(program))
    monkeypatch.setattr(cases, "CASES", {"no such case": None})
    said = Suite(tmp_path, 1, 1).sanitize("memcheck", time.monotonic() + 60)
    assert said == "failed: 1 failed"
    text = (tmp_path / "sanitizer.txt").read_text()
    assert "KeyError: 'no such case'" in text and "case: no such case" in text
    assert text.rstrip().endswith("ERROR SUMMARY: 1 error")


def test_programs_are_found_beside_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("2025.3.1", "2025.10.0", "2024.3.2"):
        program = tmp_path / "nsight" / version / "ncu"
        program.parent.mkdir(parents=True)
        program.touch(0o755)
    monkeypatch.setattr(ncu, "_NSIGHT", tmp_path / "nsight")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert ncu.find("ncu") == str(tmp_path / "nsight" / "2025.10.0" / "ncu")
    assert ncu.find("no-such-program") is None
    program = tmp_path / "cuda" / "bin" / "ncu"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    assert ncu.find("ncu") == str(program)

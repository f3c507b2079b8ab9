"""The profiles: a timeline with the stages in it, the commands, and what the parsers read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import profile
from benchmarks.harness import results
from benchmarks.ops import OPS
from benchmarks.profiling import ncu, roofline

ROOT = Path(__file__).resolve().parents[2]

# ----------------------------------------------------------------------------------- arguments


def test_run_by_path_says_how_to_run_it() -> None:
    """By path, this folder comes before the standard library, whose `profile` others import."""
    command = [sys.executable, "-c", "import sys; sys.path[0] = 'benchmarks'; import profile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "python -m benchmarks.NAME" in done.stderr


# ------------------------------------------------------------------------------------ timeline


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the profiler, where there is no GPU
def test_a_timeline_has_the_stages(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args = ["--op", "marginal_loss", "--shape", "2,2,3,8,50", "--device", "cpu"]
    assert profile.main([*args, "--out", str(tmp_path)]) == 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("ph") == "X"]
    assert names.count("call") == 3
    said = capfd.readouterr().out
    assert f"{tmp_path / 'trace.json'}" in said and "ui.perfetto.dev" in said
    for stage in ("marginal_nll/logits", "marginal_nll/products"):
        assert names.count(f"fastrag/{stage}") == 3
        assert f"fastrag/{stage} " in said


# -------------------------------------------------------------------------------------- Nsight


def test_ncu_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    args = ["--op", "doc_scores", "--ncu", "--kernel", "_fwd", "--shape", "2,3,4,8"]
    with pytest.raises(SystemExit) as caught:
        profile.main(args)
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out.startswith("FASTRAG_RANGES=nvtx ncu --clock-control none --nvtx ")
    for part in ("--profile-from-start off", "--set full", "-k regex:_fwd", "-o "):
        assert part in said.out
    tail = "--loop --op doc_scores --provider triton --mode forward --shape 2,3,4,8 "
    assert tail + "--dtype bfloat16 --device cuda --calls 3\n" in said.out
    assert "is not installed" in said.err and said.err.count("\n") == 1


NCU = """#!/bin/sh
case "$*" in
    *--import*) cat {exported} ;;
    *) echo '==PROF== Connected to process 7' ;;
esac
"""


@pytest.mark.parametrize("profiled", [True, False])
def test_ncu_runs(
    profiled: bool,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Measures, exports and reads; where nothing was profiled there is one line that says so."""
    program, exported = tmp_path / "ncu", tmp_path / "exported"
    program.write_text(NCU.format(exported=exported))
    program.chmod(0o755)
    exported.write_text(BASE if profiled else "==WARNING== No kernels were profiled.\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(ncu, "why_not", lambda: "")
    args = ["--op", "mips", "--ncu", "--kernel", "_rest", "--out", str(tmp_path / "out")]
    assert profile.main(args) == int(not profiled)
    said = capfd.readouterr()
    assert f"{program} --clock-control none" in said.out
    assert ("_rest_kernel" in said.out.splitlines()[-1]) == profiled
    assert ("No kernels were profiled" in said.err) != profiled


def test_nsys_command(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--op", "mips", "--nsys", "--provider", "torch", "--mode", "bfloat16"]
    assert profile.main(args) == 0
    said = capsys.readouterr().out
    assert said.startswith("FASTRAG_RANGES=nvtx nsys profile -t cuda,nvtx")
    assert "--loop --op mips --provider torch" in said


# As ncu prints the raw page: names, units, then launches; columns for each metric.
REPORT = """==PROF== Connected to process 7
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",\
"Grid Size","Device","CC","dram__bytes_read.sum","dram__bytes_write.sum",\
"dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum",\
"launch__registers_per_thread","sm__warps_active.avg.pct_of_peak_sustained_active",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_not_issued_per_issue_active.ratio"
"","","","","","","","","","","","byte","byte","%","nsecond","register/thread","%","inst","inst","inst","inst","inst"
"0","7","python3.12","127.0.0.1","_group_max_kernel","1","7","(128, 1, 1)","(99, 1, 1)","0","9.0",\
"1,500,000,000","500,000,000.00","61.5","1,000,000.00","168","25.0","9.5",\
"0","1.25","1.5","1.2"
"1","7","python3.12","127.0.0.1","void other<(int)4, float>(T1 *, int)","1","7","(32, 1, 1)",\
"(1, 1, 1)","0","9.0","n/a","0","","2500","16","","","","","",""
"""
# The same in the base units, and in the words, of newer versions.
BASE = """"ID","Process ID","Process Name","Host Name","Kernel Name","dram__bytes_read.sum",\
"dram__bytes_write.sum","gpu__time_duration.sum","launch__registers_per_thread"
"","","","","","byte","byte","ns","register/thread"
"0","7","python3.12","127.0.0.1","_rest_kernel","1,500,000,000","500,000,000","1,000,000","96"
"""


def test_ncu_report() -> None:
    first, second = ncu.read(REPORT)
    assert first.name == "_group_max_kernel"
    assert first.microseconds == pytest.approx(1000.0)
    assert first.gbps == pytest.approx(2000.0)  # 2 GB in a millisecond
    assert (first.memory, first.compute, first.occupancy) == (61.5, None, 25.0)
    assert first.registers == 168
    assert first.stalls == (("long_scoreboard", 9.5), ("wait", 1.25))
    assert second.microseconds == pytest.approx(2.5)
    assert (second.gbps, second.occupancy, second.stalls) == (None, None, ())
    table = ncu.table([first, second]).splitlines()
    assert len(table) == 3 and "2000" in table[1] and "long_scoreboard 9.5" in table[1]
    assert "?" in table[2]


def test_ncu_report_in_base_units() -> None:
    (kernel,) = ncu.read(BASE)
    assert kernel.microseconds == pytest.approx(1000.0) and kernel.gbps == pytest.approx(2000.0)
    assert ncu.export(Path("report"))[-2:] == ["--print-units", "base"]


@pytest.mark.parametrize("text", ["", "==ERROR== no kernels were profiled", '"ID","a"\n'])
def test_ncu_report_of_another_form(text: str) -> None:
    with pytest.raises(ValueError, match="expected a table of the raw page"):
        ncu.read(text)


# --------------------------------------------------------------------------- instructions, AOT

LISTING = """
.text._some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0020*/              @!P1 LDG.E.U8 R8, desc[UR6][R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR6][R2.64] ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0050*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0060*/             @!UP0 UTMALDG.2D [UR8], [UR4] ;
        /*0070*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
        /*0080*/                   STL.64 [R1+0x8], R4 ;
        /*0090*/                   LDL R4, [R1+0x8] ;
        /*00a0*/                   STG.E desc[UR6][R2.64], R4 ;
        /*00b0*/                   ATOMS.OR RZ, [UR5], R3 ;
        /*00c0*/                   REDG.E.ADD.F32 desc[UR6][R2.64], R4 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   NOP;
"""


def test_instructions_by_family() -> None:
    pytest.importorskip("triton")
    from benchmarks.profiling import sass

    total, families = sass.tally(LISTING)
    assert total == 14
    once = ("wgmma", "mma", "tcgen05", "tma", "ldgsts", "ldg.128", "stg", "atomic")
    assert families == dict.fromkeys(once, 1) | {"ldg": 2, "spill": 2}


def test_every_op_has_kernels() -> None:
    pytest.importorskip("triton")
    from benchmarks.profiling import sass

    files = (ROOT / "kernels").glob("*.py")
    modules = {path.stem for path in files if "def aot_configs(" in path.read_text()}
    named = {module for modules in sass.MODULES.values() for module in modules}
    assert named == modules


def test_compiled_kernels() -> None:
    """In a process of their own, since kernels decorated for the interpreter cannot be compiled."""
    pytest.importorskip("triton")
    pattern = "_fwd_kernel.fp32,.*HAS_ROWS=False.*BLOCK_K=8,"
    args = ["--op", "doc_scores", "--kernel", pattern, "--arch", "80", "--aligned"]
    code = (
        f"from benchmarks.profile import main\nfor mode in '--sass', '--aot': main({args} + [mode])"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    instructions, resources = done.stdout.splitlines()
    assert instructions.startswith("sm_80") and " instructions  ldg " in instructions
    assert "ldg.128" in instructions and "spill" not in instructions
    assert resources.startswith("sm_80") and " registers " in resources and "%" in resources


# ------------------------------------------------------------------------------------ roofline


def write(file: Path, op: str, device: str = "a machine", **times: float) -> Path:
    """Two rows of each provider, at shapes of different intensity, with these milliseconds."""
    found = []
    for provider, ms in times.items():
        for shape in ("1000,64,10,1", "1000,64,10,64"):
            row = {"op": op, "provider": provider, "shape": shape, "mode": "float32"}
            row |= {"dtype": "float32", "ms_p50": str(ms), "status": "ok", "device": device}
            found.append(row | {"threads": "2", "gbps": f"{10 / ms}", "tflops": f"{0.3 / ms}"})
    results.add(file, found)
    return file


def test_points_and_ceilings(tmp_path: Path) -> None:
    file = write(tmp_path / "mips.csv", "mips", cpp=2.0, gone=1.0, read=0.5)
    write(file, "mips", "another", read=0.1, fma=0.1)
    groups, others = roofline.groups_for(OPS["mips"], file)
    first, second = roofline.points_of(groups)
    assert first.provider == "cpp" and not others
    assert first.gflops == pytest.approx(2 * 1000 * 64 / 2e-3 / 1e9)
    assert second.gflops == pytest.approx(64 * first.gflops)
    assert second.intensity > first.intensity
    assert roofline.highest(groups, groups[0], ("read", "copy"), "gbps") == 20.0
    assert roofline.highest(groups, groups[0], ("gemms", "fma"), "tflops") == 0.0


def test_a_roofline_is_the_same_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write(tmp_path / "mips.csv", "mips", cpp=2.0, faiss=3.0, read=1.0)
    write(tmp_path / "loss.csv", "mips", fma=1.0)
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        args = ["--op", "mips", "--roofline", "--csv", str(table), "--out", str(folder)]
        assert profile.main(args) == 0
        written.append([(folder / f"roofline.{kind}").read_bytes() for kind in ("svg", "png")])
        assert str(folder / "roofline.svg") in capsys.readouterr().out
    assert written[0] == written[1]
    assert b"10 GB/s" not in written[0][1] and written[0][1].startswith(b"\x89PNG")

"""What the documentation shows is what the committed rows say, to the byte."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import matplotlib

from benchmarks import plot
from benchmarks.harness import committed
from benchmarks.harness.registry import Op
from benchmarks.harness.results import COLUMNS
from benchmarks.ops import OPS

ROOT = Path(__file__).resolve().parents[2]
PINNED = re.search(r"^matplotlib==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
# A number that says how fast something is.
SPEED = re.compile(r"\d\s*(?:×(?!\s*\d)|x\b(?!\s*\d)|ms\b|milliseconds|times (?:as|faster))")
BEFORE, SINCE, LAST = (f"2026-0{month}-01T00:00:00Z" for month in (1, 2, 3))


# One figure of each kind, the quickest to draw; the slow half draws all.
KINDS = {"contexts_peers", "contexts_memory", "mips_best_peer", "rag_step_stages"}
KINDS |= {"token_logp_roofline", "rag_step_over_N"}
pinned = pytest.mark.skipif(
    PINNED is None or matplotlib.__version__ != PINNED[1],
    reason="another matplotlib than the pinned one draws other bytes",
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    plot.draw_all(folder, KINDS.__contains__)
    return folder


def drawing(file: Path) -> bytes | str | None:
    """Return the content of a figure, equal on every processor.

    An SVG names its clip paths by a hash of their corners, whose last bit depends on the vector
    instructions that numpy's logarithm uses.
    """
    if not file.exists():
        return None
    if file.suffix != ".svg":
        return file.read_bytes()
    order: dict[str, int] = {}
    return re.sub(
        r"\bp[0-9a-f]{10}\b",
        lambda found: f"clip{order.setdefault(found[0], len(order))}",
        file.read_text(encoding="utf-8"),
    )


def files_of(folder: Path) -> set[Path]:
    return {f.relative_to(folder) for f in folder.rglob("*.[ps][nv]g")}


def stale(drawn: Path, figures: Path, files: set[Path] | None = None) -> set[Path]:
    """Return the files that differ between two folders, of those or of all."""
    files = files_of(drawn) | files_of(figures) if files is None else files
    return {file for file in files if drawing(drawn / file) != drawing(figures / file)}


@pinned
def test_figures_and_tables_are_made_of_the_committed_rows(drawn: Path) -> None:
    assert len(files_of(drawn)) == 2 * len(KINDS)
    assert stale(drawn, plot.FIGURES, files_of(drawn)) == set(), "`make plots` draws them again"
    for file in plot.TEXTS:
        text = file.read_text(encoding="utf-8")
        assert plot.filled(text, file.parent) == text, "`make plots` writes it again"
    names = {
        Path(device) / f"{name}.{kind}"
        for device in committed.devices()
        for name, _ in plot.figures_of(device)
        for kind in ("png", "svg")
    }
    assert files_of(plot.FIGURES) == names


@pinned
@pytest.mark.slow
def test_all_figures_are_made_of_the_committed_rows(tmp_path: Path) -> None:
    plot.draw_all(tmp_path)
    assert stale(tmp_path, plot.FIGURES) == set(), "`make plots` draws them again"


def test_a_stale_figure_is_found(drawn: Path, tmp_path: Path) -> None:
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    curve = next(tmp_path.rglob("*_over_N.svg"))
    corners = re.compile(r"\bp[0-9a-f]{10}\b")
    renamed = corners.sub(lambda found: f"p0{found[0][2:]}", curve.read_text())
    assert renamed != curve.read_text()
    curve.write_text(renamed)  # as another processor names clip paths
    assert stale(drawn, tmp_path) == set()

    changed, gone, *_ = sorted(tmp_path.rglob("*.svg"))
    changed.write_bytes(changed.read_bytes() + b"\n")
    gone.unlink()
    extra = changed.with_name("of_old.svg")
    extra.touch()
    wrong = {file.relative_to(tmp_path) for file in (changed, gone, extra)}
    assert stale(drawn, tmp_path) == wrong


def test_the_command_draws_and_fills(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(results / "mips.csv", SWEPT, ALL)
    text = tmp_path / "page.md"
    text.write_text("kept <!-- figures: begin mips -->\nold\n<!-- figures: end --> kept\n")
    monkeypatch.setattr(plot, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(plot, "TEXTS", (text,))
    assert plot.main([]) == 0
    names = ["mips_memory.png", "mips_memory.svg", "mips_peers.png", "mips_peers.svg"]
    assert sorted(file.name for file in (tmp_path / "figures" / "here").iterdir()) == names
    said = text.read_text()
    assert said.startswith("kept <!--") and said.endswith("--> kept\n")
    assert "numpy 17" in said and "old" not in said


def test_without_matplotlib_the_command_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from benchmarks import plot"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "figures need matplotlib: pip install 'fastrag[plots]'" in done.stderr


@pytest.mark.parametrize("file", plot.TEXTS, ids=lambda file: file.name)
def test_speeds_stand_between_markers_only(file: Path) -> None:
    text = plot.BLOCK.sub("", file.read_text())
    assert SPEED.findall(text) == []
    assert text != file.read_text()


@pytest.mark.parametrize("said", ["1.3 × as fast", "2x faster", "18 ms", "3 times as fast"])
def test_what_counts_as_a_speed(said: str) -> None:
    assert SPEED.search(said)
    assert not SPEED.search("200,000 x 768, 21,000,000 × 768, 12 models, 3 times")


def test_every_figure_is_shown() -> None:
    shown = (ROOT / "docs" / "performance.md").read_text()
    for device in committed.devices():
        for name, _ in plot.figures_of(device):
            assert f"](figures/{device}/{name}.png)" in shown


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(ValueError, match="expected all, not-won, others or an op, got 'mipps'"):
        plot.filled("<!-- figures: begin mipps -->\n<!-- figures: end -->", ROOT)


# ----------------------------------------------------------------------------- rows and groups


def write(
    file: Path,
    shape: str,
    times: dict[str, float],
    date: str = BEFORE,
    mode: str = "float32",
    mib: str = "1.0",
    dtype: str = "float32",
) -> None:
    facts = {"device": "a machine", "threads": "2", "torch": "2", "commit": "abc", "date": date}
    point = {"op": "mips", "mode": mode, "dtype": dtype, "shape": shape}
    new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        for provider, ms in times.items():
            ok = {"ms_p50": str(ms), "peak_mib": mib, "status": "ok"}
            writer.writerow({**point, **facts, "provider": provider, **ok})


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(committed, "RESULTS", tmp_path)
    return tmp_path / "here"


SWEPT = "200000,768,10,1"
ALL = {"read": 20.0, "fma": 1.0, "cpp": 18.0, "numpy": 17.0, "faiss": 30.0}


def test_ours_best_peer_and_tightest_ceiling(results: Path) -> None:
    write(results / "mips.csv", SWEPT, ALL)
    (group,) = committed.swept(committed.load("here"), OPS["mips"])
    assert group.own and group.best_peer and group.tightest_ceiling
    assert (group.own.provider, group.best_peer.provider) == ("cpp", "numpy")
    assert group.tightest_ceiling.provider == "read"
    assert group.times_as_fast(group.best_peer) == 17 / 18
    assert "| 18 | numpy 17 | 0.94 × | read 20 | 0.90 | 1.0 | 1.0 |" in committed.table([group])
    lost = committed.not_won([group])
    assert "at 0 of 1 points" in lost and "numpy takes 17 ms, fastrag 18." in lost


def test_points_of_another_dtype_come_last(results: Path) -> None:
    write(results / "a.csv", SWEPT, ALL, dtype="bfloat16")
    write(results / "a.csv", "1000000,768,10,64", ALL)
    found = committed.swept(committed.load("here"), OPS["mips"])
    assert [g.dtype for g in found] == ["float32", "bfloat16"]
    write(results / "a.csv", SWEPT, ALL)
    assert [g.dtype for g in committed.swept(committed.load("here"), OPS["mips"])][-1] == "bfloat16"


def test_a_run_of_more_providers_counts_and_then_the_newer(results: Path) -> None:
    write(results / "a.csv", SWEPT, ALL)
    write(results / "b.csv", SWEPT, {"cpp": 9.0, "numpy": 9.0}, SINCE)  # of a curve, perhaps
    (group,) = committed.load("here").values()
    assert group.own and group.own.ms == 18.0
    write(results / "c.csv", SWEPT, {**ALL, "cpp": 8.0}, SINCE)
    (group,) = committed.load("here").values()
    assert group.own and group.own.ms == 8.0


def test_stages_are_of_the_newest_whole_run_and_ops_without_a_block_get_one(results: Path) -> None:
    both = ("cpp", "numpy")
    for date, ms, names in ((SINCE, 3.0, both), (BEFORE, 9.0, both), (LAST, 1.0, both[:1])):
        file = results / f"{date[:7]}.csv"
        write(file, SWEPT, dict.fromkeys(names, ms), date)
        lines = file.read_text().splitlines()
        text = "\n".join(
            f"{line},{'stage' if i == 0 else 'search'}" for i, line in enumerate(lines)
        )
        file.write_text(text + "\n")
    (group,) = committed.load_stages("here")
    assert [t.ms for t in group.timings] == [3.0, 3.0] and not committed.load("here")
    assert [name for name, _ in plot.figures_of("here")] == ["mips_stages"]

    write(results / "mips.csv", SWEPT, ALL)
    page = "<!-- figures: begin {} -->\n<!-- figures: end -->\n"
    page_of_mips = plot.filled(page.format("mips") + page.format("others"), ROOT)
    assert page_of_mips.count("numpy 17") == 1 and "## `mips`" not in page_of_mips
    rest = plot.filled(page.format("doc_scores") + page.format("others"), ROOT)
    assert rest.count("numpy 17") == 1 and "## `mips`: the k rows" in rest
    assert "mips_stages.png" in rest and "## `token_logp`" not in rest


def test_files_of_other_columns_and_ops_are_left_alone(results: Path) -> None:
    (results / "stages.csv").write_text("op,stage,ms\nmips,search,3\n")
    write(results / "mips.csv", SWEPT, ALL)
    text = (results / "mips.csv").read_text()
    (results / "old.csv").write_text(text.replace("mips,", "no_longer_there,"))
    assert [key[0] for key in committed.load("here")] == ["mips"]


def test_a_curve_is_of_three_points_that_differ_in_one_dimension(results: Path) -> None:
    for n_rows in (100_000, 200_000, 400_000):
        write(results / "mips.csv", f"{n_rows},768,10,1", ALL)
    for shape in ("200000,768,10,64", "400000,768,10,64", "300000,384,10,1"):
        write(results / "mips.csv", shape, ALL)
    write(results / "mips.csv", "50000,768,10,1", ALL, mode="int8")
    (line,) = committed.along(committed.load_all("here"), OPS["mips"], "N")
    assert [g.shape[0] for g in line] == [100_000, 200_000, 400_000]
    assert committed.along(committed.load_all("here"), OPS["mips"], "B") == []


def test_a_curve_is_of_one_run(results: Path) -> None:
    write(results / "mips.csv", SWEPT, ALL, SINCE)  # the newer one, of more providers
    for n_rows in (50_000, 100_000, 200_000):
        write(results / "curve.csv", f"{n_rows},768,10,1", {"cpp": n_rows / 1e4, "numpy": 9.0})
    write(results / "more.csv", "400000,768,10,1", {"cpp": 40.0}, SINCE)
    (line,) = committed.along(committed.load_all("here"), OPS["mips"], "N")
    assert [g.own.ms for g in line if g.own] == [5.0, 10.0, 20.0, 40.0]


def test_a_curve_is_drawn_with_what_there_is_of_it(results: Path) -> None:
    """A provider may lack points, or all but one; memory may not have been measured."""
    for n_rows, times in ((50_000, ALL), (100_000, {"cpp": 9.0}), (200_000, {**ALL, "mm-xq": 1.0})):
        write(results / "mips.csv", f"{n_rows},768,10,1", times)
    drawn = dict(plot.figures_of("here"))
    time, memory = drawn["mips_over_N"]().axes
    labels = {text.get_text() for text in time.texts}
    assert labels == {"fastrag", "numpy", "read (ceiling)", "fma (ceiling)"}
    assert {text.get_text() for text in memory.texts} == {"fastrag", "numpy"}
    assert memory.get_xlabel() == "N, passages of the index" and "ms" in time.get_ylabel()

    (results / "mips.csv").unlink()
    for n_rows in (50_000, 100_000, 200_000):
        write(results / "mips.csv", f"{n_rows},768,10,1", ALL, mib="")
    assert len(dict(plot.figures_of("here"))["mips_over_N"]().axes) == 1


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_every_dimension_has_words(op: Op) -> None:
    assert set(op.dims) <= set(plot.WORDS)

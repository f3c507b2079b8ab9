"""The files of the suite: tests.txt, tests.xml, summary.md, and the text printed at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.isolation import FAILED, NOT_RUN, PASSED, SKIPPED, Record
from benchmarks.harness.rows import Row

MOST = 12_000  # characters that a terminal, or a reply that is cut, still shows
FIRST_LINES = 6
# XML 1.0 cannot represent these.
_UNWRITABLE = {i: None for i in range(32) if chr(i) not in "\t\n\r"}


def write(results: Any, steps: Sequence[tuple[str, str, float]], *, complete: bool) -> str:
    """Write what the `steps.Results` hold, and return the summary.

    `steps` are names, outcomes and seconds; `complete`: nothing will follow.
    """
    with results.lock:
        records = list(results.tests)
        write_tests(results.out, records)
    lines = ["# GPU suite" if complete else "# GPU suite (so far)", ""]
    lines += [f"- {name}: {how} ({seconds:.0f} s)" for name, how, seconds in steps]
    parts = ["\n".join(lines)]
    for title, of in {"Failed tests": records, **results.sanitizer}.items():
        bad = [_failure(record) for record in of if record.bad]
        if bad:
            parts.append(_block(title, "\n".join(bad)))
    if results.rows:
        parts.append(_block("Milliseconds", times(results.rows)))
    text = "\n\n".join(parts) + "\n"
    (results.out / "summary.md").write_text(text, encoding="utf-8")
    return text


def _block(title: str, text: str) -> str:
    return f"## {title}\n\n```\n{text}\n```"


def _failure(record: Record) -> str:
    lines = [line for line in record.text.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("E ")] or lines
    return "\n".join([record.name, *(f"    {line[:160]}" for line in told[:FIRST_LINES])])


def short(text: str) -> str:
    """Return the text, or as much of its beginning and of its end, with the times, as fits."""
    if len(text) <= MOST:
        return text
    half = MOST // 2 - 20
    return f"{text[:half]}\n[... more in summary.md ...]\n{text[-half:]}"


def count(records: Sequence[Record]) -> str:
    kinds = (PASSED, FAILED, SKIPPED, NOT_RUN)
    counts = {kind: sum(record.outcome == kind for record in records) for kind in kinds}
    word = "failed" if counts[FAILED] else "not all ran" if counts[NOT_RUN] else "ok"
    return f"{word}: " + ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)


def times(rows: Sequence[Row]) -> str:
    """Return a line for each problem: the medians, and their ratios to the first provider."""
    by_problem: dict[str, list[Row]] = {}
    for row in rows:
        key = " ".join(row[name] for name in ("op", "mode", "dtype", "shape"))
        by_problem.setdefault(key, []).append(row)
    lines = []
    for key, group in by_problem.items():
        first = next((float(row["ms_p50"]) for row in group if row["ms_p50"]), 0.0)
        cells = []
        for row in group:
            said = row["status"][:60]
            if row["ms_p50"]:
                ms = float(row["ms_p50"])
                said = f"{ms:.4g} ({ms / first:.2f})"
            cells.append(f"{row['provider']} {said}")
        lines.append(f"{key}: {', '.join(cells)}")
    return "\n".join(lines)


def tests_text(records: Sequence[Record]) -> str:
    """Return failures with their text, and then every test with its outcome."""
    failures = [f"FAILED {r.name}\n{r.text}\n" for r in records if r.bad]
    others = [
        f"{r.outcome:<8} {r.seconds:7.2f} s  {r.name}"
        + (f"  [{r.text.splitlines()[-1][:120]}]" if r.text and not r.bad else "")
        for r in records
    ]
    return "\n".join([*failures, *others]) + "\n"


def write_tests(out: Path, records: Sequence[Record]) -> None:
    """Write tests.txt, and tests.xml in the form of JUnit."""
    if not records:
        return
    (out / "tests.txt").write_text(tests_text(records), encoding="utf-8")
    suite = ElementTree.Element(
        "testsuite",
        name="gpu",
        tests=str(len(records)),
        failures=str(sum(r.outcome == FAILED for r in records)),
        skipped=str(sum(r.outcome not in (PASSED, FAILED) for r in records)),
        time=f"{sum(r.seconds for r in records):.3f}",
    )
    for record in records:
        file, _, name = record.name.partition("::")
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=file.removesuffix(".py").replace("/", "."),
            name=name or file,
            time=f"{record.seconds:.3f}",
        )
        if record.outcome != PASSED:
            tag = "failure" if record.bad else "skipped"
            text = record.text.translate(_UNWRITABLE)
            message = text.splitlines()[-1][:200] if text else record.outcome
            ElementTree.SubElement(case, tag, message=message).text = text
    ElementTree.ElementTree(suite).write(out / "tests.xml", encoding="utf-8", xml_declaration=True)

"""What the suite writes down: tests.txt, tests.xml, summary.md, and the table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.isolation import FAILED, PASSED, Record
from benchmarks.gpu.plan import Done
from benchmarks.gpu.steps import Results

# What a terminal, or a reply that is cut, still shows.
MOST = 12_000
FIRST_LINES = 6
# XML 1.0 has no way to write these.
_UNWRITABLE = {i: None for i in range(32) if chr(i) not in "\t\n\r"}


def write(results: Results, done: Sequence[Done], *, complete: bool) -> str:
    """Writes what is known, and returns the summary; `complete` tells that nothing will follow."""
    with results.lock:
        records = list(results.tests)
    if records:
        (results.out / "tests.txt").write_text(tests_text(records), encoding="utf-8")
        tests_xml(results.out / "tests.xml", records)
    text = summary(results, done, records, complete=complete)
    (results.out / "summary.md").write_text(text, encoding="utf-8")
    return text


def summary(
    results: Results, done: Sequence[Done], records: Sequence[Record], *, complete: bool
) -> str:
    lines = ["# GPU suite" if complete else "# GPU suite (so far)", ""]
    lines += [f"- {step.name}: {step.how} ({step.seconds:.0f} s)" for step in done]
    parts = ["\n".join(lines)]
    failures = [record for record in records if record.bad]
    if failures:
        parts.append("## Failed tests\n\n```\n" + "\n".join(map(_failure, failures)) + "\n```")
    for tool, cases in results.sanitizer.items():
        bad = [record for record in cases if record.bad]
        if bad:
            parts.append(f"## {tool}\n\n```\n" + "\n".join(map(_failure, bad)) + "\n```")
    if results.rows:
        parts.append("## Milliseconds\n\n```\n" + times(results.rows) + "\n```")
    return "\n\n".join(parts) + "\n"


def short(text: str) -> str:
    """The text, or what fits of its beginning and its end, where the times are."""
    if len(text) <= MOST:
        return text
    half = MOST // 2 - 20
    return f"{text[:half]}\n[... more in summary.md ...]\n{text[-half:]}"


def _failure(record: Record) -> str:
    lines = [line for line in record.text.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("E ")] or lines
    return "\n".join([record.name, *(f"    {line[:160]}" for line in told[:FIRST_LINES])])


def times(rows: Sequence[dict[str, str]]) -> str:
    """A line for each problem: providers with their medians, slower than the first by so much."""
    by_problem: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("op", "mode", "dtype", "shape"))
        by_problem.setdefault(key, []).append(row)
    lines = []
    for key, group in by_problem.items():
        first = next((float(row["ms_p50"]) for row in group if row["ms_p50"]), 0.0)
        cells = []
        for row in group:
            if row["ms_p50"]:
                ms = float(row["ms_p50"])
                cells.append(f"{row['provider']} {ms:.4g} ({ms / first:.2f})")
            else:
                cells.append(f"{row['provider']} {row['status'][:60]}")
        lines.append(f"{' '.join(key)}: {', '.join(cells)}")
    return "\n".join(lines)


def tests_text(records: Sequence[Record]) -> str:
    """Failures first, with their text; then every test with its outcome."""
    failures = [f"FAILED {r.name}\n{r.text}\n" for r in records if r.bad]
    others = [
        f"{r.outcome:<8} {r.seconds:7.2f} s  {r.name}"
        + (f"  [{r.text.splitlines()[-1][:120]}]" if r.text and not r.bad else "")
        for r in records
    ]
    return "\n".join([*failures, *others]) + "\n"


def tests_xml(path: Path, records: Sequence[Record]) -> None:
    """The form of JUnit, which pytest itself writes only when it comes to its end."""
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
    ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)

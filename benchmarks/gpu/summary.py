"""The files of the suite: tests.txt, tests.xml, summary.md, and the text printed at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.isolation import FAILED, NOT_RUN, PASSED, SKIPPED, Record
from benchmarks.harness.results import Row

FIRST_LINES = 6
# XML 1.0 cannot represent these.
_UNWRITABLE = {i: None for i in range(32) if chr(i) not in "\t\n\r"}
Done = tuple[str, str, float]  # name, outcome and seconds of a step


def write(suite: Any, *, complete: bool) -> str:
    """Write the results of a `gpu_suite.Suite` whose lock is held, and return the summary.

    `complete`: nothing will follow.
    """
    write_tests(suite.out, suite.tests)
    lines = ["# GPU suite" if complete else "# GPU suite (so far)", ""]
    parts = ["\n".join(lines + [f"- {line(done)}" for done in suite.done])]
    for title, records in {"Failed tests": suite.tests, **suite.sanitizer}.items():
        if bad := [_failure(record) for record in records if record.bad]:
            parts.append(_block(title, "\n".join(bad)))
    if suite.rows:
        parts.append(_block("Milliseconds", times(suite.rows)))
    text = "\n\n".join(parts) + "\n"
    (suite.out / "summary.md").write_text(text, encoding="utf-8")
    return text


def line(done: Done) -> str:
    name, how, seconds = done
    return f"{name}: {how} ({seconds:.0f} s)"


def _block(title: str, text: str) -> str:
    return f"## {title}\n\n```\n{text}\n```"


def _failure(record: Record) -> str:
    lines = [line for line in record.text.splitlines() if line.strip()]
    shown = [line for line in lines if line.startswith("E ")] or lines
    return "\n".join([record.name, *(f"    {line[:160]}" for line in shown[:FIRST_LINES])])


def count(records: Sequence[Record]) -> str:
    counts = Counter(record.outcome for record in records)
    word = "failed" if counts[FAILED] else "not all ran" if counts[NOT_RUN] else "ok"
    kinds = (PASSED, FAILED, SKIPPED, NOT_RUN)
    return f"{word}: " + ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind])


def times(rows: Sequence[Row]) -> str:
    """Return a line for each problem: the medians, and their ratios to the first provider."""
    problems: dict[str, list[str]] = {}
    first: dict[str, float] = {}
    for row in rows:
        key = " ".join(row[name] for name in ("op", "mode", "dtype", "shape"))
        text = row["status"][:60]
        if row["ms_p50"]:
            ms = float(row["ms_p50"])
            text = f"{ms:.4g} ({ms / first.setdefault(key, ms):.2f})"
        problems.setdefault(key, []).append(f"{row['provider']} {text}")
    return "\n".join(f"{key}: {', '.join(cells)}" for key, cells in problems.items())


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
        failures=str(sum(r.bad for r in records)),
        skipped=str(sum(r.outcome not in (PASSED, FAILED) for r in records)),
        time=f"{sum(r.seconds for r in records):.3f}",
    )
    for record in records:
        file, _, name = record.name.partition("::")
        where = file.removesuffix(".py").replace("/", ".")
        about = {"classname": where, "name": name or file, "time": f"{record.seconds:.3f}"}
        case = ElementTree.SubElement(suite, "testcase", about)
        if record.outcome != PASSED:
            tag = "failure" if record.bad else "skipped"
            text = record.text.translate(_UNWRITABLE)
            message = text.splitlines()[-1][:200] if text else record.outcome
            ElementTree.SubElement(case, tag, message=message).text = text
    ElementTree.ElementTree(suite).write(out / "tests.xml", encoding="utf-8", xml_declaration=True)

"""Manifests: what fits is returned; anything else is a ValueError that says where and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrag import manifests
from fastrag.manifests import flag, integer, items, number, one_of, optional, record, table, text

KIND = record(
    {"n": integer(1), "kind": one_of("a", "b")},
    {
        "scale": number(above=0),
        "flags": items(flag()),
        "files": table(record({"bytes": integer(0, 9)}), text(r"\w+\.npy", "the name of a file")),
        "note": optional(text()),
        "part": manifests.relative_path(),
        "sum": manifests.sha256(),
    },
    closed=True,
)
GOOD = '{"n": 1, "kind": "a"'


def read(tmp_path: Path, data: str | bytes) -> object:
    path = tmp_path / "m.json"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return manifests.read(path, KIND)


def test_what_fits_is_returned(tmp_path: Path) -> None:
    value = {
        "n": 2**63 - 1,
        "kind": "b",
        "scale": 1e-300,
        "flags": [True, False],
        "files": {"x.npy": {"bytes": 9, "of": "a newer reader"}},
        "note": "é",
        "part": "generator/config.json",
        "sum": "0" * 64,
    }
    manifests.write(tmp_path / "w.json", value)
    assert read(tmp_path, (tmp_path / "w.json").read_bytes()) == value
    assert read(tmp_path, '{"n": 1, "kind": "a", "note": null}')["note"] is None  # type: ignore[index]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (GOOD, r"m\.json:1: expected JSON, got "),
        ('{\n"n": 1\n"kind"', r"m\.json:3: expected JSON, got "),
        ("", r"m\.json:1: expected JSON, got "),
        (b'{"n": "\xff"}', r"m\.json: expected JSON in UTF-8, got "),
        ('{"n": "\\ud800"}', r"m\.json: expected JSON in UTF-8, got "),
        (GOOD + ', "n": 2}', r"m\.json: expected each key once, got 'n' twice"),
        ('{"n": NaN}', r"m\.json: expected finite numbers, got NaN"),
        ('{"n": -Infinity}', r"m\.json: expected finite numbers, got -Infinity"),
        ('{"n": 1e999}', r"m\.json: expected finite numbers, got '1e999'"),
        ('{"n": ' + "9" * 5000 + "}", r"m\.json: Exceeds the limit \(4300 digits\)"),
        ("[" * 100_000, r"m\.json: expected at most 50 lists and objects in each other"),
        ("[" * 51 + "]" * 51, r"m\.json: expected at most 50 lists and objects in each other"),
        ("[1]", r"m\.json: expected a mapping, got \[1\]"),
        ('{"n": 1}', r"m\.json: expected the keys .*'kind'.*, got \['n'\]"),
        (GOOD + ', "x": 1}', r"m\.json: expected the keys .*, got \['n', 'kind', 'x'\]"),
        (
            '{"n": true, "kind": "a"}',
            r"m\.json: n: expected a whole number of at least 1, got True",
        ),
        ('{"n": 1.0, "kind": "a"}', r"m\.json: n: expected a whole number of at least 1, got 1\.0"),
        ('{"n": 0, "kind": "a"}', r"m\.json: n: expected a whole number of at least 1, got 0"),
        ('{"n": 9223372036854775808, "kind": "a"}', r"m\.json: n: expected a whole number"),
        ('{"n": 1, "kind": ["a"]}', r"m\.json: kind: expected one of a, b, got \['a'\]"),
        (GOOD + ', "scale": 0}', r"m\.json: scale: expected a finite number above 0, got 0"),
        (GOOD + ', "scale": "1"}', r"m\.json: scale: expected a finite number above 0, got '1'"),
        (GOOD + ', "flags": [true, 0]}', r"m\.json: flags\[1\]: expected true or false, got 0"),
        (GOOD + ', "flags": {}}', r"m\.json: flags: expected a list, got \{\}"),
        (GOOD + ', "files": []}', r"m\.json: files: expected a mapping, got \[\]"),
        (
            GOOD + ', "files": {"../x.npy": {}}}',
            r"files key: expected the name of a file, got '\.\.",
        ),
        (
            GOOD + ', "files": {"x.npy": {"bytes": 10}}}',
            r"files\.x\.npy\.bytes: .*of 0 to 9, got 10",
        ),
        (GOOD + ', "note": 5}', r"m\.json: note: expected text, got 5"),
        (GOOD + ', "part": "a/../b"}', r"m\.json: part: expected a relative path, got 'a/\.\./b'"),
        (GOOD + ', "part": "/a"}', r"m\.json: part: expected a relative path, got '/a'"),
        (GOOD + ', "sum": "0"}', r"m\.json: sum: expected 64 hexadecimal digits, got '0'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, data: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, data)
    assert str(caught.value).startswith(str(tmp_path)) and len(str(caught.value)) < 600


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"{path.name}: expected a JSON file, got {reason}"):
            manifests.read(path, KIND)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "m.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"m\.json: expected at most 67108864 bytes, got more"):
        manifests.read(tmp_path / "m.json", KIND)


def test_only_what_can_be_read_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        manifests.write(tmp_path / "m.json", {"scale": float("nan")})
    assert not (tmp_path / "m.json").exists()


def test_a_seal_is_that_of_the_rest(tmp_path: Path) -> None:
    body = {"n": 1, "note": "é"}
    manifest = manifests.sealed(body)
    assert manifests.unsealed(tmp_path, manifest) == body
    for altered in ({**manifest, "n": 2}, {**manifest, manifests.SEAL: None}, body):
        with pytest.raises(ValueError, match="as it states, got [0-9a-f]{64}: the manifest was"):
            manifests.unsealed(tmp_path, altered)

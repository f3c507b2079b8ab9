"""`fastrag index build`, `info` and `verify`."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from fastrag import manifests
from fastrag.cli import main
from fastrag.index import FaissIndex, FlatIndex, PassageStore
from fastrag.index import faiss_support as support
from fastrag.train.indexing import load_index
from tests.cli.commands import BUILD


def test_verify_finds_an_altered_byte(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    assert main(["index", "verify", "idx"]) == 0
    assert "all checksums hold" in capsys.readouterr().out
    vectors = project / "idx" / "index" / "vectors.npy"
    data = vectors.read_bytes()
    try:
        vectors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert main(["index", "verify", "idx"]) == 2
        assert "vectors.npy: expected SHA-256" in (err := capsys.readouterr().err)
        assert "altered in block 0 (bytes 128 to 895)" in err
        vectors.write_bytes(data[:-10])
        assert main(["ask", "--model", "run", "x"]) == 2
        assert "vectors.npy" in capsys.readouterr().err
    finally:
        vectors.write_bytes(data)


def test_index_info(
    project: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(project)
    assert main(["index", "info", "idx"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert list(lines)[:6] == ["encoder", "template", "passage", "corpus", "built", "kind"]
    origin = {"encoder": "encoder", "corpus": "corpus.jsonl", "passage": "{title}: {text}"}
    assert origin.items() <= lines.items() and "{passage}" in lines["template"]
    assert datetime.now(UTC) - datetime.fromisoformat(lines["built"]) < timedelta(hours=1)
    index = FlatIndex.load(project / "idx" / "index")
    expected = {"kind": "FlatIndex", "dtype": "float32", "dim": "16", "rows": "12", "pitch": "64"}
    assert expected.items() <= lines.items() and lines["checksum"] == index.checksum()
    index.astype("int8").save(tmp_path / "small")
    assert main(["index", "verify", str(tmp_path / "small")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'small'}: 12 vectors, all checksums hold\n"
    probe = ["--probe", "100", "--k", "4"]
    assert main(["index", "info", str(tmp_path / "small"), *probe, "--exact", "idx"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[0] == "recall@4" and 0.7 < float(last[1]) <= 1.0
    assert last[2:] == ["(12", "queries,", "against", "idx)"]


def test_an_index_of_unknown_origin(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder from before origins were recorded, and an index without its passages."""
    old = tmp_path / "old"
    shutil.copytree(project / "idx", old)
    manifest = old / "passages" / "manifest.json"
    body = manifests.unsealed(manifest, manifests.load(manifest))
    assert body.pop("origin")
    manifests.write(manifest, manifests.sealed(body))
    shutil.copytree(old / "index", tmp_path / "bare")
    known = {"encoder": 0, "template": 1, "passage": 1, "corpus": 0, "built": 0}
    for folder, found in ((old, known), (tmp_path / "bare", dict.fromkeys(known, 0))):
        assert main(["index", "info", str(folder)]) == 0
        lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
        assert {name: int(lines[name] != "not recorded") for name in known} == found
        assert lines["rows"] == "12"


def test_the_index_of_a_run(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(project / "idx", tmp_path / "index")
    assert main(["index", "info", str(tmp_path)]) == 0
    assert "rows        12\n" in capsys.readouterr().out
    assert main(["index", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 12 passages, all checksums hold\n"


def test_index_info_of_faiss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    vectors = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    for name, index in (("exact", FlatIndex(8)), ("approximate", FaissIndex(8, "IVF8,SQ4"))):
        index.add(vectors)
        index.save(tmp_path / name)
    assert main(["index", "info", "approximate", "--probe", "50"]) == 0
    out = capsys.readouterr().out
    assert "factory     IVF8,SQ4\n" in out and "parameters  none\n" in out
    own = out.splitlines()[-1].split(None, 2)
    assert main(["index", "info", "approximate", "--probe", "50", "--exact", "exact"]) == 0
    against = capsys.readouterr().out.splitlines()[-1].split(None, 2)
    assert own[0] == against[0] == "recall@10"
    assert own[2] == "(50 queries, against its reconstructed vectors)"
    assert 0.1 < float(against[1]) < float(own[1]) < 1.0  # the codes lose something too


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "encoder"), "encoder: expected a fastrag index folder with manifest.json"),
        (("verify", "nowhere"), "nowhere: expected a fastrag index folder, got no such folder"),
        (("info", "idx", "--exact", "idx"), "--probe: expected a number of queries with --exact"),
        (("info", "idx", "--probe", "5"), "--exact: expected an index of the original vectors"),
        (
            ("info", "idx", "--probe", "5", "--exact", "idx", "--k", "12"),
            "k: expected 1 to 11 for 12 live rows, got 12",
        ),
    ],
)
def test_mistakes_with_an_index(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(project)
    assert main(["index", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastrag: error: ") and err.count("\n") == 1 and message in err


def test_index_of_codes(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Built by the command or by a run, it is trained on, saved and asked as any other."""
    monkeypatch.chdir(project)
    build = [*BUILD[:-1], "codes", "--corpus", "corpus.jsonl", "--dtype", "int8"]
    assert main(build) == 0
    assert FlatIndex.load(project / "codes" / "index").dtype == "int8"
    train = ["train", "train.yaml", "--training.max_steps=1", "--retriever.index_dtype=int8"]
    assert main([*train, "--retriever.index=codes", "--training.output_dir=on_codes"]) == 0
    assert main([*train, "--retriever.index=null", "--training.output_dir=own_codes"]) == 0
    assert FlatIndex.load(project / "own_codes" / "index" / "index").dtype == "int8"
    capsys.readouterr()
    assert main(["ask", "--model", "own_codes", "--device", "cpu", "what?"]) == 0
    assert main([*train, "--retriever.index_dtype=int4"]) == 2
    assert "index_dtype: expected" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["npy", "faiss", "dataset"])
def test_vectors_that_others_made(
    project: Path,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One command makes an index of them, which a run can train on; nothing is encoded."""
    monkeypatch.chdir(project)
    own, passages = load_index("idx")
    vectors, corpus = torch.randn(len(own), own.dim), "corpus.jsonl"
    source, n_bad = str(tmp_path / f"vectors.{kind}"), f"expected {len(own)} rows, got 3"
    if kind == "npy":
        np.save(source, vectors.numpy())
    elif kind == "faiss":
        pytest.importorskip("faiss")
        made = FaissIndex(own.dim, "Flat")
        made.add(vectors)
        support.load().write_index(made._index, source)
    else:
        datasets = pytest.importorskip("datasets")
        texts = [passages.passage(row) for row in range(len(own))]
        columns = {
            name: [getattr(each, name) for each in texts] for name in ("id", "title", "text")
        }
        columns["own"] = list(vectors.numpy())
        datasets.Dataset.from_dict(columns).save_to_disk(source)
        corpus = source
    build = [*BUILD[:-1], str(tmp_path / "made"), "--corpus", corpus, "--vectors", source]
    if kind == "dataset":
        build += ["--column", "own"]
    assert main(build) == 0
    index, store = load_index(tmp_path / "made", verify=True)
    assert type(index) is (FaissIndex if kind == "faiss" else FlatIndex)
    assert torch.equal(index.vectors(torch.arange(len(index))), vectors)
    assert store.checksum() == passages.checksum() == index.passages_checksum
    np.save(tmp_path / "few.npy", vectors.numpy()[:3])
    capsys.readouterr()
    assert main([*build[:10], "--vectors", str(tmp_path / "few.npy")]) == 2
    assert n_bad in capsys.readouterr().err


def test_index_with_a_template_of_its_own(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One mapping serves `index build` and the config; an index of another template is refused."""
    monkeypatch.chdir(project)
    template = '{context: "{passage} asked {question}", passage: "{title} {text}"}'
    build = [*BUILD[:-1], "own", "--corpus", "corpus.jsonl", "--max-passage", "4"]
    assert main([*build, "--template", template]) == 0
    store = PassageStore.load(project / "own" / "passages")
    assert store.gather(torch.tensor([0]), "encoder")[1].tolist() == [4]  # [CLS] ada likes [SEP]
    train = ["train", "train.yaml", "--retriever.index=own", "--training.max_steps=1"]
    assert main([*train, "--training.output_dir=own_run", f"--data.template={template}"]) == 0
    capsys.readouterr()
    assert main([*train, "--training.output_dir=other_run"]) == 2
    assert "template" in capsys.readouterr().err.splitlines()[-1]

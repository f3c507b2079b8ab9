"""Indexes of others read as ours: a datasets object, a saved custom index, DPR's files."""

from __future__ import annotations

import csv
import gzip

import datasets
import faiss
import numpy as np
import pytest
import torch

from fastrag import FaissIndex, FlatIndex, Index, PassageStore
from fastrag.hf import passages_of, read_dpr, read_hf_index
from tests import tiny
from tests.hf.models import DIM, TEXTS, TITLES, dataset, vectors

datasets.disable_progress_bars()


def save(tmp_path, columns=None, metric=faiss.METRIC_INNER_PRODUCT, factory=None):
    """A dataset and its faiss index, saved as RagRetriever's documentation says."""
    made = datasets.Dataset.from_dict(columns) if columns else dataset()
    made.save_to_disk(tmp_path / "dataset")
    made.add_faiss_index("embeddings", metric_type=metric, string_factory=factory)
    made.get_index("embeddings").save(tmp_path / "index.faiss")
    return tmp_path / "dataset", tmp_path / "index.faiss"


def check(index, passages) -> None:
    assert len(index) == len(passages) == 3 and index.passages_checksum == passages.checksum()
    rows = torch.tensor([[2, 0]])
    torch.testing.assert_close(index.vectors(rows)[0].numpy(), vectors()[[2, 0]])
    query = torch.from_numpy(vectors()[1:2])
    nearest = (query @ torch.from_numpy(vectors()).T)[0].argsort(descending=True)
    assert torch.equal(index.search(query, 3).rows[0], nearest)
    assert [passages.title(i) for i in range(3)] == list(TITLES)
    assert [passages.text(i) for i in range(3)] == TEXTS


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_flat_index_from_datasets(dtype):
    index = FlatIndex.from_datasets(dataset(), dtype=dtype)
    expected = FlatIndex(DIM, dtype)
    expected.add(vectors())
    assert index.checksum() == expected.checksum()
    many = datasets.Dataset.from_dict({"v": np.random.rand(2500, 4).astype(np.float32)})
    index = FlatIndex.from_datasets(many, "v")
    assert torch.equal(index.index_emb, torch.tensor(many["v"][:]))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, "dataset: expected one split with the column 'embeddings', got Dataset"),
        ({"embeddings": [[1.0], [1.0, 2.0]]}, "expected vectors of one width .* rows 0 to 1"),
        ({"embeddings": [1.0, 2.0]}, "expected vectors of one width"),
        ({"embeddings": [None, [1.0]]}, "expected vectors of one width .* rows 0 to 1"),
        ({"embeddings": [[1, 2]]}, "vectors: expected floating point"),
        ({"embeddings": [[1.0, float("nan")]]}, "vectors: expected finite .* nan in row 0"),
    ],
    ids=["column", "ragged", "numbers", "empty", "integers", "nan"],
)
def test_flat_index_refuses(columns, message):
    with pytest.raises(ValueError, match=message):
        FlatIndex.from_datasets(datasets.Dataset.from_dict(columns))
    empty = datasets.Dataset.from_dict({"embeddings": []})
    with pytest.raises(ValueError, match="dataset: expected at least one row"):
        FlatIndex.from_datasets(empty)
    with pytest.raises(ValueError, match="expected one split"):
        FlatIndex.from_datasets(datasets.DatasetDict({"train": empty}))


def test_a_custom_index(tmp_path):
    passages_path, index_path = save(tmp_path)
    index, passages = read_hf_index(passages_path, tiny.processor())
    assert isinstance(index, FlatIndex) and list(passages.ids) == ["0", "1", "2"]
    check(index, passages)
    index, passages = read_hf_index(
        passages_path, tiny.processor(), index_path=index_path, dir=tmp_path / "passages"
    )
    assert isinstance(index, FaissIndex) and index.factory == "Flat"
    check(index, passages)
    check(index, PassageStore.load(tmp_path / "passages"))
    index.save(tmp_path / "index")
    check(Index.load(tmp_path / "index"), passages)
    index.update(torch.tensor([0]), torch.ones(1, DIM))
    index.replace(torch.from_numpy(vectors()))
    check(index, passages)


def test_ids_and_quoted_titles(tmp_path):
    columns = {
        "id": [11, 12, 13],
        "title": ['"ada"', None, "cleo"],
        "text": TEXTS,
        "embeddings": vectors().tolist(),
    }
    passages_path, _ = save(tmp_path, columns)
    _, passages = read_hf_index(passages_path, tiny.processor())
    assert list(passages.ids) == ["11", "12", "13"]
    assert [passages.title(i) for i in range(3)] == ["ada", "", "cleo"]
    for wrong, message in (
        ({"id": [1, None, 3]}, "dataset: row 1: expected an id, got none"),
        ({"title": [1, 2, 3]}, "dataset: row 0: expected a title, got int"),
    ):
        with pytest.raises(ValueError, match=message):
            list(passages_of(datasets.Dataset.from_dict(columns | wrong)))


@pytest.mark.parametrize("factory", ["HNSW8", "SQfp16", "IVF2,Flat", "PCA8,Flat"])
def test_files_of_faiss(tmp_path, factory):
    expected = FaissIndex(DIM, factory)
    expected.add(vectors(400))
    faiss.write_index(expected._index, str(tmp_path / "x.faiss"))
    read = FaissIndex.from_file(tmp_path / "x.faiss")
    assert (read.factory, len(read)) == (factory, 400)
    query = torch.from_numpy(vectors(5, 1.0))
    for a, b in zip(read.search(query, 3), expected.search(query, 3), strict=True):
        assert torch.equal(a, b)
    rows = torch.tensor([3, 399, -1])
    assert torch.equal(read.vectors(rows), expected.vectors(rows))


def test_files_that_are_refused(tmp_path):
    path = tmp_path / "x.faiss"
    faiss.write_index(faiss.IndexFlatL2(4), str(path))
    with pytest.raises(ValueError, match="path: expected an index for inner .* got metric_type 1"):
        FaissIndex.from_file(path)
    faiss.write_index(faiss.IndexIDMap(faiss.IndexFlatIP(4)), str(path))
    with pytest.raises(ValueError, match="factory: expected rows numbered as they are added"):
        FaissIndex.from_file(path)
    faiss.write_index(faiss.IndexFlatIP(4), str(path))
    with pytest.raises(ValueError, match="factory: expected that of an IndexFlatIP"):
        FaissIndex.from_file(path, "HNSW8")
    with pytest.raises(ValueError, match="parameters: expected those of 'Flat': 'nprobe=x'"):
        FaissIndex.from_file(path, parameters="nprobe=x")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="path: expected an index that this faiss reads in"):
        FaissIndex.from_file(path)
    with pytest.raises(ValueError, match="path: expected an index that this faiss reads in"):
        FaissIndex.from_file(tmp_path / "none.faiss")
    faiss.write_index(faiss.IndexLattice(4, 2, 4, 4), str(path))
    with pytest.raises(ValueError):
        FaissIndex.from_file(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factory": "Flat"}, "factory: expected None without an index_path"),
        ({"index": True, "dtype": "int8"}, "dtype: expected 'float32' with a file of faiss"),
    ],
    ids=["factory", "dtype"],
)
def test_settings_that_would_be_ignored(tmp_path, settings, message):
    passages_path, index_path = save(tmp_path)
    if settings.pop("index", False):
        settings["index_path"] = index_path
    with pytest.raises(ValueError, match=message):
        read_hf_index(passages_path, tiny.processor(), **settings)


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="passages_path: expected a folder of save_to_disk"):
        read_hf_index(tmp_path / "none", tiny.processor())
    with pytest.raises(ValueError, match="passages_path: expected a folder of save_to_disk"):
        read_hf_index(tmp_path, tiny.processor())
    passages_path, _ = save(tmp_path)
    for name, content in (("state.json", "{}"), ("dataset_info.json", "[1]")):
        file = passages_path / name
        whole = file.read_text()
        file.write_text(content)
        with pytest.raises(ValueError, match="passages_path: expected a folder of save_to_disk, "):
            read_hf_index(passages_path, tiny.processor())
        file.write_text(whole)
    columns = {"text": TEXTS, "embeddings": vectors().tolist()}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "untitled")
    with pytest.raises(ValueError, match=r"dataset: expected columns \['title', 'text'\]"):
        read_hf_index(tmp_path / "untitled", tiny.processor())
    faiss.write_index(faiss.IndexFlatIP(DIM), str(tmp_path / "empty.faiss"))
    with pytest.raises(ValueError, match="index: expected one vector per passage, got 0 vectors"):
        read_hf_index(passages_path, tiny.processor(), index_path=tmp_path / "empty.faiss")


def dpr_file(tmp_path):
    path = tmp_path / "psgs_w100.tsv.gz"
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["id", "text", "title"])
        rows.writerows([str(i + 1), TEXTS[i], TITLES[i]] for i in range(3))
    return path


@pytest.mark.parametrize("kind", ["files", "arrays", "array", "tensor", "faiss"])
def test_dpr(tmp_path, kind):
    path = dpr_file(tmp_path)
    embeddings = {
        "array": vectors(),
        "arrays": [vectors()[:1], vectors()[1:]],
        "tensor": torch.from_numpy(vectors()).requires_grad_(),
    }.get(kind)
    if kind == "files":
        np.save(tmp_path / "a.npy", vectors()[:2])
        np.save(tmp_path / "b.npy", vectors()[2:])
        embeddings = [tmp_path / "a.npy", str(tmp_path / "b.npy")]
    elif kind == "faiss":
        index = FaissIndex(DIM, "Flat")
        index.add(vectors())
        embeddings = tmp_path / "wiki.index"
        faiss.write_index(index._index, str(embeddings))
    index, passages = read_dpr(path, embeddings, tiny.processor())
    assert list(passages.ids) == ["1", "2", "3"]
    check(index, passages)


def test_dpr_refuses(tmp_path):
    path, processor = dpr_file(tmp_path), tiny.processor()
    np.save(tmp_path / "flat.npy", vectors()[0])
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "wiki_0.pkl").write_bytes(b"")
    for embeddings, message in (
        (tmp_path / "wiki_0.pkl", "embeddings: expected files ending in .npy, .*`numpy.save"),
        (tmp_path / "objects.npy", "embeddings: expected an array .* Python objects"),
        (tmp_path / "none.npy", "embeddings: expected an array"),
        (tmp_path / "flat.npy", r"embeddings: expected arrays \[n, D\], got \[\[16\]\]"),
        ([], r"embeddings: expected arrays \[n, D\], got \[\]"),
        (vectors()[:2], "index: expected one vector per passage, got 2 vectors and 3 passages"),
    ):
        with pytest.raises(ValueError, match=message):
            read_dpr(path, embeddings, processor)

from __future__ import annotations

import json
import os
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrag.data import Passage, RagProcessor, Template
from fastrag.index import PassageStore, passage_writer
from fastrag.ops import backends

BACKENDS = ["cpp", "torch"]
TEMPLATE = Template.default("causal")


@pytest.fixture
def build(encoder_tokenizer, generator_tokenizer):
    def made(passages, **kwargs):
        settings = {"template": TEMPLATE, "kind": "causal", "max_passage": 24} | kwargs
        own = {name: settings.pop(name) for name in ("dir", "origin") if name in settings}
        processor = RagProcessor(encoder_tokenizer, generator_tokenizer, **settings)
        return PassageStore.build(passages, processor, **own)

    return made


def use_backend(name, monkeypatch):
    if reason := backends.why_not(name):
        pytest.skip(reason)
    if name == "torch":
        monkeypatch.setattr(backends, "why_not", lambda _: "not built")


@pytest.fixture(params=BACKENDS)
def gatherer(request, monkeypatch):
    use_backend(request.param, monkeypatch)
    return request.param


@pytest.fixture
def store(build, passages):
    return build(passages)


def rows_of(store, stream):
    ids, lengths = store.gather(torch.arange(len(store)), stream)
    return [row[:n].tolist() for row, n in zip(ids, lengths.tolist(), strict=True)]


def test_streams_are_the_tokenizers_own(store, passages, encoder_tokenizer, generator_tokenizer):
    encoder, generator = rows_of(store, "encoder"), rows_of(store, "generator")
    bound = TEMPLATE.bind(generator_tokenizer, "causal")
    for row, passage in enumerate(passages):
        text = TEMPLATE.render_passage(passage)
        ids = encoder_tokenizer(text, truncation=True, max_length=24, split_special_tokens=True)[
            "input_ids"
        ]
        assert encoder[row] == ids
        assert generator[row] == bound.passage_ids(passage)
    assert store.max_tokens("encoder") == 24
    assert store.max_tokens("generator") == max(map(len, generator)) > 24
    assert store.lengths("generator").tolist() == [len(ids) for ids in generator]
    eos = generator_tokenizer.eos_token_id
    assert all(eos not in ids for ids in generator)
    assert store.ids[2] == "id-2" and "</s>" in store.text(2)


def test_texts(store, passages):
    assert len(store) == len(store.ids) == 5
    assert [store.passage(row) for row in range(5)] == passages
    assert list(store.ids) == [f"id-{i}" for i in range(5)] and store.ids[1:3] == ["id-1", "id-2"]
    assert [store.row_of(f"id-{i}") for i in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="id: expected the id of one of 5 passages, got 'no'"):
        store.row_of("no")
    with pytest.raises(IndexError):
        store.title(5)


@pytest.mark.usefixtures("gatherer")
def test_gather_pads_and_cuts(store):
    rows = torch.tensor([[[1, -1], [3, 1]]])
    full = rows_of(store, "generator")
    ids, lengths = store.gather(rows, "generator", max_length=6)
    assert ids.shape == (1, 2, 2, 6) and ids.dtype == lengths.dtype == torch.int64
    for index in np.ndindex(1, 2, 2):
        expected = full[rows[index]][:6] if rows[index] >= 0 else []
        assert lengths[index] == len(expected)
        assert ids[index].tolist() == expected + [0] * (6 - len(expected))
    ids, lengths = store.gather(torch.tensor([-1, -1]), "encoder")
    assert ids.tolist() == [[0], [0]] and lengths.tolist() == [0, 0]
    assert store.gather(torch.zeros(0, 3, dtype=torch.int64), "encoder")[0].shape == (0, 3, 1)


@pytest.mark.usefixtures("gatherer")
def test_gather_takes_any_rows(store):
    wide = torch.tensor([[3, 0], [-1, 0], [1, 0], [3, 0]])
    expected = store.gather(wide[:, 0].contiguous(), "generator")
    assert not expected[0][1].any()
    for rows in (wide[:, 0], wide[:, 0].int(), wide.numpy()[:, 0]):
        found = store.gather(torch.as_tensor(rows), "generator")
        assert all(map(torch.equal, found, expected))
    nested = store.gather(wide.t().reshape(2, 2, 2)[0], "generator")
    assert torch.equal(nested[0].flatten(0, 1), expected[0])
    assert torch.equal(nested[1].flatten(), expected[1])
    ids, lengths = store.gather(torch.tensor(4), "generator", max_length=3)
    assert ids.tolist() == rows_of(store, "generator")[4][:3] and lengths.item() == 3


def test_gather_inside_a_compiled_function(store):
    rows = torch.tensor([[1, -1], [3, 1]])
    compiled = torch.compile(lambda rows: store.gather(rows, "generator"), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compiled(rows)
    assert all(map(torch.equal, found, store.gather(rows, "generator")))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(derandomize=True, deadline=None, max_examples=40)
@given(data=st.data())
def test_gather_property(backend, data, property_store):
    with pytest.MonkeyPatch.context() as patch:
        use_backend(backend, patch)
        check_gather(data, *property_store)


def check_gather(data, store, full):
    shape = data.draw(st.sampled_from([(3,), (2, 2), (1, 2, 3)]))
    n = int(np.prod(shape))
    rows = torch.tensor(data.draw(st.lists(st.integers(-1, 4), min_size=n, max_size=n)))
    cut = data.draw(st.none() | st.integers(1, 200))
    ids, lengths = store.gather(rows.reshape(shape), "generator", max_length=cut)
    assert ids.shape[:-1] == lengths.shape == shape
    for row, found, length in zip(
        rows.tolist(), ids.flatten(0, -2), lengths.flatten(), strict=True
    ):
        expected = full[row][:cut] if row >= 0 else []
        assert found[:length].tolist() == expected and not found[length:].any()
    assert ids.shape[-1] == max(1, int(lengths.max()))


@pytest.fixture(scope="module")
def property_store(encoder_tokenizer, generator_tokenizer):
    store = PassageStore.build(
        [Passage(str(i), "", "river " * (3**i)) for i in range(5)],
        RagProcessor(encoder_tokenizer, generator_tokenizer, kind="causal"),
    )
    return store, rows_of(store, "generator")


def test_a_streamed_build_equals_one_in_memory(build, passages, tmp_path, monkeypatch):
    monkeypatch.setattr(passage_writer, "_BATCH", 2)
    in_memory = build(passages)
    on_disk = build((passage for passage in passages), dir=tmp_path / "store")
    in_memory.save(tmp_path / "saved")
    stores = [on_disk, PassageStore.load(tmp_path / "saved", verify=True)]
    stores.append(PassageStore.load(tmp_path / "store", mmap=False))
    for other in stores:
        for stream in ("encoder", "generator"):
            assert rows_of(other, stream) == rows_of(in_memory, stream)
            assert other.fingerprint(stream) == in_memory.fingerprint(stream)
        assert [other.passage(row) for row in range(5)] == passages
        assert other.row_of("id-4") == 4 and other.template == TEMPLATE
    manifests = [
        json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("store", "saved")
    ]
    assert manifests[0] == manifests[1]  # the SHA-256 of every file among it
    assert sorted(os.listdir(tmp_path)) == ["saved", "store"]


def test_the_checksum_names_the_content(build, passages, tmp_path):
    in_memory = build(passages)
    on_disk = build(passages, dir=tmp_path / "store")
    checksum = on_disk.checksum()
    assert len(checksum) == 32 and in_memory.checksum() == checksum
    in_memory.save(tmp_path / "saved")
    assert PassageStore.load(tmp_path / "saved").checksum() == checksum
    known = build(passages, dir=tmp_path / "known", origin={"corpus": "rivers.jsonl"})
    known.save(tmp_path / "copy")
    copy = PassageStore.load(tmp_path / "copy")
    assert copy.checksum() == checksum and copy.origin == {"corpus": "rivers.jsonl"}
    others = [
        build(passages[:-1]),
        build([*passages[:-1], Passage("another id", passages[-1].title, passages[-1].text)]),
        build(passages, max_passage=9),
        build(passages, passage_prefix="river "),
    ]
    assert len({checksum, *(each.checksum() for each in others)}) == 5


def test_prefix_and_no_limit(build, passages, encoder_tokenizer):
    store = build(passages, passage_prefix="river ", max_passage=None)
    assert store.prefix == "river "
    text = "river " + TEMPLATE.render_passage(passages[4])
    assert rows_of(store, "encoder")[4] == encoder_tokenizer(text)["input_ids"]


def test_another_tokenizer_or_template_is_refused(store, encoder_tokenizer, generator_tokenizer):
    store.check_tokenizer("encoder", encoder_tokenizer)
    store.check_tokenizer("generator", generator_tokenizer)
    store.check_tokenizer("generator", generator_tokenizer, TEMPLATE)
    # a template that differs beside the passage slot only, reads the same stream
    same = Template(TEMPLATE.context.replace("Answer:", "A:"), answer=" {answer}")
    store.check_tokenizer("generator", generator_tokenizer, same)
    with pytest.raises(ValueError, match="encoder stream was built with another tokenizer"):
        store.check_tokenizer("encoder", generator_tokenizer)
    with pytest.raises(ValueError, match="generator stream was built with another tokenizer or"):
        store.check_tokenizer("generator", encoder_tokenizer)
    for other in (
        Template(TEMPLATE.context, passage="{text} ({title})"),
        Template("Context:{passage}\nQuestion: {question}"),
    ):
        with pytest.raises(ValueError, match="or template: expected fingerprint .*, got"):
            store.check_tokenizer("generator", generator_tokenizer, other)


def test_to_moves_the_streams(store):
    assert store.to("cpu") is store and store.device.type == "cpu"
    on_meta = store.to("meta")
    assert on_meta.device.type == "meta"
    with pytest.raises(ValueError, match="device: expected one that torch can use, got cuda:99"):
        store.to("cuda:99")


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "passages: expected at least one passage, got an empty corpus"),
        ([{"id": "a", "text": "x"}], "passages: row 0: expected a Passage .* got dict"),
        ("p.jsonl", "passages: row 0: expected a Passage .* got str"),
        ([Passage("a", "", None)], "passages: row 0: text: expected text, got NoneType"),
        ([Passage(1, "", "x")], "passages: row 0: id: expected text, got int"),
        ([Passage("a", "t", " ")], r"passages: row 0 \(id 'a'\): expected text, got an empty one"),
        (
            [Passage("a", "", "x"), Passage("b", "", "y"), Passage("a", "", "z")],
            "passages: expected unique ids, got rows 0 and 2 with one id",
        ),
    ],
)
def test_rejects_bad_corpora(build, tmp_path, items, message):
    with pytest.raises(ValueError, match=message):
        build(items)
    with pytest.raises(ValueError, match=message):
        build(items, dir=tmp_path / "store")
    assert not os.listdir(tmp_path)


def test_a_failed_build_keeps_the_old_store(build, passages, tmp_path):
    build(passages, dir=tmp_path / "store")
    with pytest.raises(ValueError, match="empty corpus"):
        build([], dir=tmp_path / "store")
    assert len(PassageStore.load(tmp_path / "store", verify=True)) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_passage": 2}, "max_passage: expected more than the tokenizer's 2 special tokens"),
        ({"max_passage": 0}, "max_passage: expected at least 1 token or None, got 0"),
    ],
)
def test_rejects_bad_limits(build, passages, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(passages, **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.gather(torch.tensor([5]), "encoder"), "rows: expected -1 to 4, got 5"),
        (lambda s: s.gather(torch.tensor([-2]), "encoder"), "rows: expected -1 to 4, got -2"),
        (lambda s: s.gather(torch.tensor([0.0]), "encoder"), "rows: expected int64"),
        (lambda s: s.gather([0], "encoder"), "rows: expected a tensor, got list"),
        (lambda s: s.gather(torch.tensor([0]), "reader"), "stream: expected one of .*'reader'"),
        (lambda s: s.gather(torch.tensor([0]), "encoder", 0), "max_length: expected at least 1"),
        (lambda s: s.fingerprint("x"), "stream: expected one of"),
        (
            lambda s: s.gather(torch.tensor([0, 9, -7]), "encoder"),
            "rows: expected -1 to 4, got 9",
        ),
    ],
)
@pytest.mark.usefixtures("gatherer")
def test_rejects_bad_calls(store, call, message):
    with pytest.raises(ValueError, match=message):
        call(store)


@pytest.mark.usefixtures("gatherer")
@pytest.mark.parametrize(
    ("at", "offset"),
    [(0, -1), (2, -(2**63)), (2, 2**63 - 1), (2, 100_000), (5, 100_000), (2, 1)],
    ids=["negative", "lowest", "highest", "beyond", "beyond-last", "descending"],
)
def test_gather_refuses_damaged_offsets(build, passages, tmp_path, at, offset):
    whole = build(passages, dir=tmp_path / "store")
    rows = torch.arange(-1, 5)
    expected = whole.gather(rows, "generator")
    start = whole._offsets["generator"][1].item()
    assert start > 1  # what "descending" stands below
    store = PassageStore.load(tmp_path / "store")
    offsets = store._offsets["generator"].clone()
    good = offsets[at].item()
    offsets[at] = offset
    store._offsets["generator"] = offsets
    message = (
        rf"offsets: expected a part of the \d+ tokens for row {max(at - 1, 0)}, got .*{offset}"
    )
    with pytest.raises(ValueError, match=message):
        store.gather(rows, "generator")
    assert store.gather(torch.tensor([-1]), "generator")[1].tolist() == [0]
    offsets[at] = good
    assert all(map(torch.equal, store.gather(rows, "generator"), expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros(4, np.int64)}, r"tokens: expected int32 \[n\], got format '[lq]'"),
        ({"offsets": np.zeros(0, np.int64)}, "offsets: expected at least one, got none"),
        ({"rows": np.zeros((1, 1), np.int64)}, r"rows: expected int64 \[n\]"),
        ({"lengths": np.zeros(2, np.int64)}, r"lengths: expected int64 \[1\]"),
        ({"max_length": -1}, "max_length: expected at least 0, got -1"),
    ],
)
def test_extension_checks_what_it_is_handed(change, message):
    native = pytest.importorskip("fastrag._C", reason="the extension module is not built")
    good = {
        "tokens": np.arange(4, dtype=np.int32),
        "offsets": np.array([0, 1, 4]),
        "rows": np.array([1]),
        "lengths": np.full(1, 7),
        "max_length": 2,
    }
    assert native.passage_lengths(**good) == good["lengths"][0] == 2
    with pytest.raises(ValueError, match=message):
        native.passage_lengths(**{**good, **change})
    frozen = np.zeros((1, 2), np.int64)
    frozen.flags.writeable = False
    arrays = [good[name] for name in ("tokens", "offsets", "rows")]
    with pytest.raises(ValueError, match="read-only"):
        native.gather_tokens(*arrays, frozen)
    ids = np.full((1, 5), 7)
    native.gather_tokens(*arrays, ids)
    assert ids.tolist() == [[1, 2, 3, 0, 0]]


def test_damaged_stores_are_refused(build, passages, tmp_path):
    folder = tmp_path / "store"
    build(passages, dir=folder)
    path = folder / "generator_tokens.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(ValueError, match=r"generator_tokens\.npy: expected \d+ bytes, got"):
        PassageStore.load(folder)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"generator_tokens\.npy: expected SHA-256"):
        PassageStore.load(folder, verify=True)
    with pytest.raises(ValueError, match=r"expected format 'fastrag.FlatIndex', got 'fastrag.Pas"):
        from fastrag.index import FlatIndex

        FlatIndex.load(folder)

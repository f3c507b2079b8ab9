from __future__ import annotations

import pytest
import torch

from fastrag.data import Passage, RagProcessor
from fastrag.index import FaissIndex, FlatIndex, PassageStore, encode_passages
from fastrag.index.encoding import EncodedBlocks


def ivf():
    pytest.importorskip("faiss")
    return FaissIndex(2, "IVF2,Flat")


class Encoder(torch.nn.Module):
    """Sums token ids; in training mode it would add noise."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.drop = torch.nn.Dropout(0.5)
        self.widths = []

    def forward(self, input_ids, attention_mask):
        assert not self.training and not torch.is_grad_enabled()
        self.widths.append(input_ids.shape[1])
        ids = (input_ids * attention_mask).double()
        sums = torch.stack([ids.sum(dim=1), attention_mask.sum(dim=1).double()], dim=1)
        return self.drop(self.scale * sums)


@pytest.fixture(scope="module")
def store(encoder_tokenizer, generator_tokenizer):
    return PassageStore.build(
        [Passage(str(i), "", "river in Paris " * (1 + 7 * i % 5)) for i in range(11)],
        RagProcessor(encoder_tokenizer, generator_tokenizer, kind="causal"),
    )


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_encodes_every_passage_in_row_order(store, batch_size):
    encoder = Encoder().train()
    vectors = encode_passages(encoder, store, batch_size=batch_size)
    ids, lengths = store.gather(torch.arange(11), "encoder")
    assert vectors.dtype == torch.float32 and not vectors.requires_grad
    assert vectors[:, 0].tolist() == ids.sum(dim=1).tolist()
    assert vectors[:, 1].tolist() == lengths.tolist()
    assert encoder.training and encoder.drop.training
    assert encoder.widths == sorted(encoder.widths, reverse=True)  # like lengths together


def test_mode_is_restored(store):
    encoder = Encoder().eval()
    encode_passages(encoder, store)
    assert not encoder.training
    encoder.train().drop.eval()  # a part that the user holds in eval mode
    encode_passages(encoder, store)
    assert encoder.training and not encoder.drop.training

    class Broken(Encoder):
        def forward(self, input_ids, attention_mask):
            raise RuntimeError("broken")

    broken = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        encode_passages(broken, store)
    assert broken.training


def test_chosen_rows(store):
    seen = []
    whole = encode_passages(Encoder(), store)
    rows = torch.tensor([7, 0, 7])
    some = encode_passages(Encoder(), store, batch_size=2, rows=rows, on_batch=seen.append)
    assert torch.equal(some, whole[rows]) and seen == [2, 1]


def test_block_by_block(store):
    """The vectors of all rows; between two blocks the encoder is in the mode of the user."""
    whole = encode_passages(Encoder(), store)
    encoder = Encoder().train()
    blocks = EncodedBlocks(encoder, store, 3, block_size=4, start=2)
    assert blocks.n_rows == 9
    found = []
    for block in blocks:
        assert encoder.training and encoder.drop.training and not block.requires_grad
        found.append(block)
    assert [len(block) for block in found] == [4, 4, 1] and torch.equal(torch.cat(found), whole[2:])
    with pytest.raises(ValueError, match="encoder: expected vectors of the index's width 3, got"):
        next(EncodedBlocks(encoder, store, dim=3))


@pytest.mark.parametrize("make", [lambda: FlatIndex(2), lambda: FlatIndex(2, "int8"), ivf])
def test_an_index_takes_blocks_as_it_takes_an_array(store, make):
    whole = encode_passages(Encoder(), store)
    by_array, by_blocks = make(), make()
    for change in ("add", "replace"):
        getattr(by_array, change)(whole)
        getattr(by_blocks, change)(EncodedBlocks(Encoder(), store, block_size=4))
        assert by_blocks.checksum() == by_array.checksum()


def test_progress_bar(store, capsys):
    encode_passages(Encoder(), store, progress=True)
    err = capsys.readouterr().err
    assert "11/11" in err and "tokens/s" in err and " passages/s" in err
    encode_passages(Encoder(), store)
    assert not capsys.readouterr().err


def test_encode_rejects(store):
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        encode_passages(Encoder(), store, batch_size=0)
    with pytest.raises(ValueError, match=r"rows: expected \[n\] with n > 0"):
        encode_passages(Encoder(), store, rows=torch.zeros(0, dtype=torch.int64))

    class Flat(Encoder):
        def forward(self, input_ids, attention_mask):
            return input_ids.float().sum(dim=1)

    with pytest.raises(ValueError, match=r"encoder: expected \[11, D\], got \[11\]"):
        encode_passages(Flat(), store)

"""TextEncoder: poolings against a literal computation, padding sides, folders of three kinds."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    DPRConfig,
    DPRContextEncoder,
    DPRQuestionEncoder,
    GPT2Config,
    GPT2Model,
    T5Config,
    T5EncoderModel,
    T5Model,
)

from fastrag import TextEncoder

BERT = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
IDS = torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0], [10, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
LENGTHS = [4, 2, 1]


def bert(seed=0, **settings):
    torch.manual_seed(seed)
    return BertModel(BertConfig(**BERT), **settings).double().eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return GPT2Model(config).double().eval()


def literal(model, pooling, row, length):
    """Pool one text alone, without padding."""
    out = model(input_ids=IDS[row : row + 1, :length])
    states = out.last_hidden_state[0]
    return {
        "cls": lambda: states[0],
        "last": lambda: states[-1],
        "mean": lambda: states.mean(dim=0),
        "pooler": lambda: out.pooler_output[0],
    }[pooling]()


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last", "pooler"])
def test_pooling_of_a_padded_batch(pooling, normalize):
    model = bert()
    vectors = TextEncoder(model, pooling, normalize=normalize)(IDS, MASK)
    for row, length in enumerate(LENGTHS):
        expected = literal(model, pooling, row, length)
        if normalize:
            expected = expected / expected.norm()
        torch.testing.assert_close(vectors[row], expected)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_padding_side_does_not_matter_to_a_decoder(pooling):
    """A left-padded batch of a decoder-type encoder equals each text alone."""
    model = gpt2()
    left = torch.stack([ids.roll(4 - n) for ids, n in zip(IDS, LENGTHS, strict=True)])
    mask = torch.stack([row.roll(4 - n) for row, n in zip(MASK, LENGTHS, strict=True)])
    encoder = TextEncoder(model, pooling)
    right = encoder(IDS, MASK)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(right[row], literal(model, pooling, row, length))
    if pooling == "last":  # the pooling of decoders: positions are counted under the mask
        torch.testing.assert_close(encoder(left, mask), right)


def test_no_mask_is_no_padding():
    encoder = TextEncoder(bert())
    torch.testing.assert_close(encoder(IDS), encoder(IDS, torch.ones_like(IDS)))


def test_low_precision_models_give_fp32():
    for dtype in (torch.bfloat16, torch.float16):
        encoder = TextEncoder(bert().to(dtype), normalize=True)
        vectors = encoder(IDS, MASK)
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert TextEncoder(bert())(IDS, MASK).dtype == torch.float64


def test_gradient_ignores_padding():
    model = bert()
    TextEncoder(model)(IDS, MASK).square().sum().backward()
    grad = model.embeddings.word_embeddings.weight.grad
    assert grad[0].abs().max() == 0 and grad[9].any()


def test_widths():
    assert TextEncoder(bert()).dim == 16
    torch.manual_seed(0)
    dpr = DPRQuestionEncoder(DPRConfig(**BERT, projection_dim=6)).eval()
    encoder = TextEncoder(dpr, "pooler")
    assert encoder(IDS, MASK).shape == (3, encoder.dim) == (3, 6)
    config = T5Config(vocab_size=30, d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=3)
    assert TextEncoder(T5EncoderModel(config)).dim == 12


# Folders


def sentence_transformers(folder, *, modules=("Transformer", "Pooling", "Normalize"), pooling=None):
    """Write a folder as sentence-transformers lays it out."""
    model = bert().float()
    model.save_pretrained(folder)
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    entries = [
        {
            "idx": i,
            "name": str(i),
            "path": paths.get(kind, f"{i}_{kind}"),
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir()
    pooling = pooling or {
        "word_embedding_dimension": 16,
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_max_tokens": False,
        "pooling_mode_lasttoken": False,
        "include_prompt": True,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    length = {"max_seq_length": 24, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(length))
    prompts = {"query": "query: ", "document": "passage: "}
    config = {"__version__": {"sentence_transformers": "5.0.0"}, "prompts": prompts}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    return model


def test_sentence_transformers_folder(tmp_path):
    model = sentence_transformers(tmp_path)
    encoder = TextEncoder.from_pretrained(tmp_path)
    assert (encoder.pooling, encoder.normalize, encoder.max_length) == ("cls", True, 24)
    assert encoder.prefix == ""
    assert TextEncoder.from_pretrained(tmp_path, role="query").prefix == "query: "
    assert TextEncoder.from_pretrained(tmp_path, role="passage").prefix == "passage: "
    expected = model(input_ids=IDS, attention_mask=MASK).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(IDS, MASK), expected / expected.norm(dim=1, keepdim=True))
    assert not any(p.requires_grad for p in encoder.model.pooler.parameters())
    override = TextEncoder.from_pretrained(tmp_path, pooling="mean", normalize=False, prefix="q ")
    assert (override.pooling, override.normalize, override.prefix) == ("mean", False, "q ")


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_cls_token": False}, "last"),
        ({"embedding_dimension": 16, "pooling_mode": "mean"}, "mean"),
        ({"embedding_dimension": 16, "pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_sentence_transformers_poolings(tmp_path, config, pooling):
    sentence_transformers(tmp_path, modules=("Transformer", "Pooling"), pooling=config)
    encoder = TextEncoder.from_pretrained(tmp_path)
    assert (encoder.pooling, encoder.normalize) == (pooling, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules": ("Transformer", "Pooling", "Dense")}, "got 'sentence_transformers.*Dense'"),
        ({"pooling": {"pooling_mode_max_tokens": True}}, r"poolings cls, mean, last, got \['max_"),
        (
            {"pooling": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}},
            "expected one of the poolings",
        ),
        (
            {"pooling": {"pooling_mode_mean_tokens": True, "include_prompt": False}},
            "include_prompt",
        ),
    ],
)
def test_sentence_transformers_refusals(tmp_path, changes, message):
    sentence_transformers(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        TextEncoder.from_pretrained(tmp_path)


def test_own_folder(tmp_path):
    encoder = TextEncoder(
        bert(add_pooling_layer=False), "last", normalize=True, prefix="query: ", max_length=20
    )
    encoder.save_pretrained(tmp_path)
    again = TextEncoder.from_pretrained(tmp_path, dtype="auto")
    assert again.extra_repr() == encoder.extra_repr()
    assert again.state_dict().keys() == encoder.state_dict().keys()  # no new, random pooler
    torch.testing.assert_close(again(IDS, MASK), encoder(IDS, MASK))
    assert TextEncoder.from_pretrained(tmp_path)(IDS, MASK).dtype == torch.float32


def test_plain_folder(tmp_path):
    bert().save_pretrained(tmp_path / "bert")
    encoder = TextEncoder.from_pretrained(tmp_path / "bert", pooling="pooler", dtype="auto")
    torch.testing.assert_close(encoder(IDS, MASK), TextEncoder(bert(), "pooler")(IDS, MASK))
    assert TextEncoder.from_pretrained(tmp_path / "bert").pooling == "mean"
    DPRQuestionEncoder(DPRConfig(**BERT)).save_pretrained(tmp_path / "dpr")
    assert TextEncoder.from_pretrained(tmp_path / "dpr").pooling == "pooler"


T5 = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    "make",
    [
        lambda: DPRContextEncoder(DPRConfig(**BERT, projection_dim=6)),
        lambda: T5EncoderModel(T5Config(**T5)),
    ],
    ids=["DPRContextEncoder", "T5EncoderModel"],
)
def test_a_folder_of_a_class_that_automodel_does_not_take(tmp_path, make):
    model = make().eval()
    model.save_pretrained(tmp_path)
    pooling = "pooler" if isinstance(model, DPRContextEncoder) else "mean"
    encoder = TextEncoder.from_pretrained(tmp_path)
    torch.testing.assert_close(encoder(IDS, MASK), TextEncoder(model, pooling)(IDS, MASK))


def test_an_encoder_decoder_is_refused(tmp_path):
    T5Model(T5Config(**T5)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected an encoder, got the encoder-decoder 't5'"):
        TextEncoder.from_pretrained(tmp_path)


@pytest.fixture
def reports(caplog):
    """What transformers warns of while it loads, whatever an earlier test told it."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


@pytest.mark.parametrize("shard", ["1GB", "2KB"], ids=["one_file", "shards"])
@pytest.mark.parametrize("stored", [False, True], ids=["without_pooler", "with_pooler"])
def test_a_pooler_that_is_not_stored_is_not_made_up(tmp_path, reports, stored, shard):
    model = bert(add_pooling_layer=stored)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    encoder = TextEncoder.from_pretrained(tmp_path, dtype="auto")
    assert (encoder.model.pooler is not None) == stored
    assert not reports.records
    torch.testing.assert_close(encoder(IDS, MASK), TextEncoder(model)(IDS, MASK))
    if not stored:  # asked for, it is missed, and transformers is not kept from saying so
        with pytest.raises(ValueError, match=r"missing \['pooler.dense.bias'"):
            TextEncoder.from_pretrained(tmp_path, pooling="pooler")
        assert "pooler" in reports.text


def test_peft_encoder_is_saved_merged(tmp_path):
    model = bert(add_pooling_layer=False)
    wrapped = get_peft_model(
        model, LoraConfig(target_modules=["query"], init_lora_weights=False)
    ).double()
    encoder = TextEncoder(wrapped.eval())
    assert encoder.dim == 16
    encoder.save_pretrained(tmp_path)
    again = TextEncoder.from_pretrained(tmp_path, dtype="auto")
    torch.testing.assert_close(again(IDS, MASK), encoder(IDS, MASK))
    assert isinstance(AutoModel.from_pretrained(tmp_path), BertModel)
    assert hasattr(encoder.model, "peft_config")


def test_rejects(tmp_path):
    with pytest.raises(ValueError, match=r"pooling: expected one of .* got 'max'"):
        TextEncoder(bert(), "max")
    with pytest.raises(ValueError, match="attention_mask: expected"):
        TextEncoder(bert())(IDS, MASK[:, :2])
    with pytest.raises(ValueError, match=r"input_ids: expected int64 .* float32"):
        TextEncoder(bert())(IDS.float(), MASK)
    with pytest.raises(ValueError, match=r"input_ids: expected \[B, S\], got \[5\]"):
        TextEncoder(bert())(torch.ones(5, dtype=torch.int64))
    n_vocab, positions = bert().config.vocab_size, bert().config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"ids in \[0, {n_vocab}\), .*, got {n_vocab}"):
        TextEncoder(bert())(torch.full((1, 2), n_vocab))
    with pytest.raises(ValueError, match=f"at most the encoder's {positions} positions, got"):
        TextEncoder(bert())(torch.ones(1, positions + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected a model with a pooler_output"):
        TextEncoder(bert(add_pooling_layer=False), "pooler")(IDS, MASK)
    with pytest.raises(ValueError, match="path: .* 'no/such/folder': there is no such folder"):
        TextEncoder.from_pretrained("no/such/folder")
    with pytest.raises(ValueError, match="role: expected"):
        bert().save_pretrained(tmp_path)
        TextEncoder.from_pretrained(tmp_path, role="answer")


def test_rejects_damaged_folders(tmp_path):
    encoder = TextEncoder(bert())
    folder = tmp_path / "own"
    encoder.save_pretrained(folder)
    settings = json.loads((folder / "fastrag_encoder.json").read_text())
    (folder / "fastrag_encoder.json").write_text(json.dumps({**settings, "pool": 1}))
    with pytest.raises(ValueError, match="expected the keys"):
        TextEncoder.from_pretrained(folder)
    (folder / "fastrag_encoder.json").write_text(json.dumps({**settings, "version": 7}))
    with pytest.raises(ValueError, match="fastrag_encoder.json: version: expected 1, got 7"):
        TextEncoder.from_pretrained(folder)
    (folder / "fastrag_encoder.json").write_text("{")
    with pytest.raises(ValueError, match="fastrag_encoder.json:1: expected JSON"):
        TextEncoder.from_pretrained(folder)
    encoder.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="expected the weights of its config.json, missing"):
        TextEncoder.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 8}))
    with pytest.raises(ValueError, match="own"):
        TextEncoder.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="path: expected a readable model folder"):
        TextEncoder.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="path: expected a readable model folder"):
        TextEncoder.from_pretrained(folder)

"""The short examples, each run as it stands on tiny models, and what it leaves behind."""

from __future__ import annotations

import itertools
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from fastrag.nn.index_reference import IndexReference
from tests import tiny

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHORT = (
    *("bare_loop", "hf_trainer", "accelerate_loop", "lightning_module"),
    *("peft_lora", "compiled", "sentence_encoder", "own_generator"),
)


@pytest.fixture(autouse=True)
def beside_the_examples(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script finds its neighbours; what accelerate keeps for a process is thrown away."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    monkeypatch.syspath_prepend(EXAMPLES)
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of an encoder and of a generator that know the words of the capitals."""
    folder = tmp_path_factory.mktemp("parts")
    sys.path.insert(0, str(EXAMPLES))
    passages, questions = runpy.run_path(str(EXAMPLES / "capitals.py"))["capitals"]()
    sys.path.remove(str(EXAMPLES))
    split = pre_tokenizers.Whitespace()
    texts = [f"{each.title} {each.text}" for each in passages]
    texts += [f"{each.question} {' '.join(each.answers)}" for each in questions]
    texts.append("question: context: answer:")
    words = sorted({word.lower() for text in texts for word, _ in split.pre_tokenize_str(text)})

    def tokenizer(specials: dict[str, str], frame: str) -> PreTrainedTokenizerFast:
        vocabulary = {token: i for i, token in enumerate([*specials.values(), *words])}
        made = Tokenizer(models.WordLevel(vocabulary, unk_token=specials["unk_token"]))
        made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), split
        around = [(token, vocabulary[token]) for token in set(frame.split()) - {"$A"}]
        made.post_processor = processors.TemplateProcessing(single=frame, special_tokens=around)
        return PreTrainedTokenizerFast(tokenizer_object=made, **specials)

    size = {"vocab_size": len(words) + 4}
    torch.manual_seed(0)
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = BertModel(BertConfig(**tiny.BERT | size | plain), add_pooling_layer=False)
    with torch.no_grad():
        bert.embeddings.word_embeddings.weight.mul_(10.0)
    bert.save_pretrained(folder / "encoder")
    tokenizer(tiny.ENCODER_SPECIALS, "[CLS] $A [SEP]").save_pretrained(folder / "encoder")
    T5ForConditionalGeneration(T5Config(**tiny.T5 | size)).save_pretrained(folder / "generator")
    tokenizer(tiny.GENERATOR_SPECIALS, "$A </s>").save_pretrained(folder / "generator")
    return str(folder / "encoder"), str(folder / "generator")


def run(name: str, *arguments: str) -> dict[str, Any]:
    """Run an example as a script; return its global names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.fixture(scope="module")
def expected(parts: tuple[str, str]) -> list[float]:
    """Losses of the bare loop."""
    sys.path.insert(0, str(EXAMPLES))
    done = run("bare_loop", *parts)
    sys.path.remove(str(EXAMPLES))
    assert learned(done)
    return done["losses"]


def learned(done: dict[str, Any]) -> bool:
    """Whether ten steps have made the answers of the first batch likelier."""
    model = done["model"].eval()
    with torch.no_grad():
        loss = model(**model.processor.collate(done["questions"][:16])).loss
    return loss.item() < done["losses"][0] - 0.1


def test_bare_loop(expected):
    assert len(expected) == 10


@pytest.mark.parametrize("name", SHORT)
def test_at_most_40_lines(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 40


def test_hf_trainer(parts, tmp_path):
    done = run("hf_trainer", *parts, str(tmp_path))
    logged = [each for each in done["second"].state.log_history if "loss" in each]
    assert [each["step"] for each in logged] == [*range(1, 21)]  # ten before the resume
    assert learned(done | {"losses": [logged[0]["loss"]]})
    found = done["metrics"]["eval_recall"]
    hits = (
        done["model"]
        .eval()
        .retrieve(*itertools.islice(done["model"].processor.collate(done["questions"]).values(), 2))
    )
    wanted = torch.arange(len(done["questions"]))[:, None]
    assert 0.0 < found == pytest.approx((hits.rows == wanted).any(1).float().mean().item())


def test_accelerate_loop(parts, expected, tmp_path):
    done = run("accelerate_loop", *parts, str(tmp_path))
    assert done["losses"] == pytest.approx(expected, rel=1e-5)
    state, stored = done["model"].state_dict(), load_file(tmp_path / "model.safetensors")
    assert state.keys() == stored.keys()
    reference = IndexReference.unpack(stored["retriever._extra_state"])
    assert reference == IndexReference.of(done["model"].index)


def test_lightning_module(parts, expected, tmp_path):
    pytest.importorskip("lightning")
    done = run("lightning_module", *parts, str(tmp_path))
    assert done["module"].losses == pytest.approx(expected, rel=1e-4)
    tiny.same_weights(done["again"].model, done["model"])
    stored = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    reference = IndexReference.unpack(stored["model.retriever._extra_state"])
    assert reference.source == str(tmp_path / "index")
    assert reference.checksum == done["model"].index.checksum()


def test_peft_lora(parts, tmp_path):
    done = run("peft_lora", *parts, str(tmp_path / "model"))
    assert learned(done)
    model, again = done["model"].eval(), done["again"]
    trained = {name for name, each in model.generator.named_parameters() if each.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    batch = model.processor.collate(done["questions"][:4])
    torch.testing.assert_close(again(**batch).loss, model(**batch).loss)


@pytest.mark.slow
def test_compiled(parts, expected):
    torch._dynamo.reset()
    done = run("compiled", *parts, "aot_eager")
    assert done["losses"] == pytest.approx(expected, rel=1e-4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 2 <= graphs <= 12  # loss and reader; not others at each of ten steps


def test_sentence_encoder(parts, tmp_path):
    pytest.importorskip("sentence_transformers")
    done = run("sentence_encoder", *parts, str(tmp_path / "model"))
    assert learned(done)
    assert (tmp_path / "model" / "question_encoder" / "modules.json").is_file()


def test_own_generator(parts):
    done = run("own_generator", *parts)
    assert done["model"].generator is done["copier"]
    assert learned(done)

"""Stages: off by default, in the hands of a factory, and where a step is expected to have them."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from fastrag import functional as F
from fastrag import profiling
from fastrag.nn import LMHead, RagLoss
from fastrag.ops import backends
from fastrag.profiling import set_ranges, stage
from fastrag.train import RagTrainer
from tests import tiny


class Recorder:
    """A factory that writes down the path of stages at each beginning."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.paths: list[str] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.open.append(name)
        self.paths.append(" > ".join(self.open))
        try:
            yield
        finally:
            self.open.pop()


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    found = Recorder()
    set_ranges(found)
    yield found
    set_ranges(None)


def marginal_loss(marginal: str, smoothing: float = 0.0) -> None:
    hidden = torch.randn(2, 3, 4, 8, requires_grad=True)
    weight = torch.randn(16, 8, requires_grad=True)
    labels, scores = torch.randint(16, (2, 4)), torch.randn(2, 3, requires_grad=True)
    nll = {"token": F.rag_token_nll, "sequence": F.rag_sequence_nll}[marginal]
    loss = nll(hidden, weight, labels, scores, label_smoothing=smoothing)
    loss.backward()


def test_off_by_default() -> None:
    assert stage("a") is stage("b")
    with stage("outer"), stage("inner"):
        pass
    with pytest.raises(KeyError), stage("raises"):
        raise KeyError


def test_factory(recorder: Recorder) -> None:
    with stage("outer"), stage("inner"):
        pass
    set_ranges(None)
    with stage("unseen"):
        pass
    assert recorder.paths == ["outer", "outer > inner"]


def test_torch_ranges() -> None:
    set_ranges("torch")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            marginal_loss("token")
    finally:
        set_ranges(None)
    assert "fastrag/marginal_nll/logits" in {event.key for event in profile.key_averages()}


def test_nvtx_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: said.append(name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: said.append("pop"))
    set_ranges("nvtx")
    try:
        with stage("score"):
            pass
    finally:
        set_ranges(None)
    assert said == ["fastrag/score", "pop"]


def test_unknown_word() -> None:
    with pytest.raises(ValueError, match="factory: expected 'nvtx' or 'torch', got 'nsight'"):
        set_ranges("nsight")


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(profiling.RANGES_VARIABLE, "nsight")
    with pytest.raises(ValueError, match="FASTRAG_RANGES: expected 'nvtx' or 'torch', got 'nsight"):
        importlib.reload(profiling)
    monkeypatch.setenv(profiling.RANGES_VARIABLE, "torch")
    importlib.reload(profiling)
    with profiling.stage("a") as opened:
        assert isinstance(opened, torch.profiler.record_function)
    monkeypatch.delenv(profiling.RANGES_VARIABLE)
    importlib.reload(profiling)
    assert isinstance(profiling.stage("a"), contextlib.nullcontext)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_stages_of_the_loss(
    marginal: str,
    smoothing: float,
    backend: str,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTRAG_BACKEND", backend)
    marginal_loss(marginal, smoothing)
    steps = ("gather", "logits", "statistics", "group_pass", "gradient", "products")
    expected = ["marginal_nll", *(f"marginal_nll > marginal_nll/{step}" for step in steps)]
    assert recorder.paths == expected


def test_stages_of_slices_of_words(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRAG_WORKSPACE_BYTES", "1")
    marginal_loss("token")
    found = {path.rpartition(" > ")[2] for path in recorder.paths}
    assert {"vocab_major/logits", "vocab_major/gradient", "vocab_major/products"} <= found


def test_stages_of_token_logp(recorder: Recorder) -> None:
    hidden, weight = torch.randn(2, 3, 4, 8, requires_grad=True), torch.randn(16, 8)
    labels = torch.randint(16, (2, 4))
    F.token_logp(hidden, weight, labels).sum().backward()
    F.token_logp(hidden.detach(), weight.requires_grad_(), labels).sum().backward()
    steps = {path.rpartition(" > ")[2] for path in recorder.paths}
    once = {f"token_logp/{step}" for step in ("logits", "statistics", "gradient", "products")}
    assert once | {"token_logp", "token_logp_backward", "vocab_major/logits"} <= steps


@pytest.mark.parametrize(("backend", "steps"), [("cpp", ["scan"]), ("torch", ["scan", "choose"])])
def test_stages_of_the_search(
    backend: str, steps: list[str], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRAG_BACKEND", backend)
    F.mips_topk(torch.randn(2, 8), torch.randn(32, 8), 3)
    assert recorder.paths == ["mips_topk", *(f"mips_topk > mips_topk/{step}" for step in steps)]


def test_stages_of_the_search_on_a_gpu(recorder: Recorder) -> None:
    pytest.importorskip("triton")
    from fastrag.ops import triton_mips

    device = "cpu" if backends.interpreting() else "cuda"
    query, index = torch.randn(1, 16, device=device), torch.randn(300, 16, device=device)
    triton_mips.search(query, index, 1, None)
    steps = ("prepare", "scan", "choose", "rescore", "search_rest")
    assert recorder.paths == [f"mips_topk/{step}" for step in steps]


def test_stages_of_the_model(recorder: Recorder) -> None:
    model = tiny.rag_model(train_passage_encoder=True)
    model.train()
    model(**tiny.batch()).loss.backward()
    outermost = [path for path in recorder.paths if " > " not in path]
    assert [path for path in outermost if not path.startswith("refresh")] == [
        "encode_questions",
        "search",
        "encode_passages",
        "score",
        "contexts",
        "generator",
        "loss",
        "doc_scores_backward",
    ]
    assert "search > index/search > mips_topk" in recorder.paths
    assert "loss > marginal_nll" in recorder.paths


def test_stages_of_a_refresh(recorder: Recorder) -> None:
    tiny.rag_model(train_passage_encoder=True).refresh_index()
    assert recorder.paths[:2] == ["refresh/gather", "refresh/encode"]


@pytest.mark.parametrize("objective", ["emdr2", "replug"])
def test_stages_of_an_objective(objective: str, recorder: Recorder) -> None:
    labels = torch.randint(16, (2, 4))
    head = LMHead(torch.randn(16, 8))
    RagLoss(objective=objective)(torch.randn(2, 3, 4, 8), head, labels, torch.randn(2, 3))
    assert [path for path in recorder.paths if " > " not in path] == ["loss", "objective"]


def test_stages_of_training(recorder: Recorder, tmp_path: Path) -> None:
    model = tiny.rag_model(train_passage_encoder=True)
    args = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, **args)
    questions = tiny.questions(2)
    RagTrainer(model, arguments, tiny.collator(), questions, refresh="every:1").train()
    for path in ("training_step > loss > marginal_nll", "refresh > refresh/encode"):
        assert path in recorder.paths


@pytest.mark.slow
def test_no_graph_breaks_at_a_stage() -> None:
    model = tiny.rag_model(train_passage_encoder=True)
    found = torch._dynamo.explain(model)(**tiny.batch())
    torch.compiler.reset()
    for broken in found.break_reasons:
        assert "with stage" not in str(broken.user_stack[-1].line), broken.reason
        assert not broken.user_stack[-1].filename.endswith("profiling.py"), broken.reason


@pytest.mark.parametrize("ranges", [None, "torch", "nvtx"])
def test_compiled_graphs_have_no_stages(ranges: str | None) -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        with stage("twice"):
            return 2 * x

    set_ranges(ranges)
    try:
        compiled = torch.compile(twice, fullgraph=True, backend="eager")
        assert compiled(torch.ones(1)).item() == 2.0
    finally:
        set_ranges(None)
        torch.compiler.reset()


def test_stages_are_documented() -> None:
    root = Path(__file__).resolve().parents[1]
    text = (root / "docs" / "profiling.md").read_text(encoding="utf-8")
    code = "".join(file.read_text(encoding="utf-8") for file in (root / "fastrag").rglob("*.py"))
    names = set(re.findall(r'with stage\("([a-z_/]+)"\)', code)) - {"rerank"}
    assert len(names) > 20
    for name in names:
        whole, slash, part = name.partition("/")
        assert f"`{name}`" in text or (f"`{whole}" in text and f"`{slash}{part}`" in text), name

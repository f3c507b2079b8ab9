"""Measured choices: looked up by architecture and regime, refused where they are none of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastrag.kernels import (  # noqa: E402
    linear_logp,
    mips,
    mixture_logp,
    mixture_pass,
    row_pass,
    tuning,
)

from fastrag.ops import backends  # noqa: E402

CPU = torch.device("cpu")
# kernel -> its candidates, and every regime that its launcher asks for
KERNELS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "group_max": (
        mips.tiles,
        [
            {"stored": stored, "n_queries": n, "has_low": has_low, "use_tma": use_tma}
            for stored in mips.STORAGES
            for n in mips.QUERIES
            for has_low in {stored != torch.float32, stored == torch.int8}
            for use_tma in (True, False)
        ],
    ),
    "row_statistics": (row_pass.statistics_blocks, [{"with_mean": m} for m in (False, True)]),
    "row_gradient": (row_pass.gradient_blocks, [{}]),
    "mixture_statistics": (mixture_pass.tiles, [{"block_k": k} for k in (4, 16, 64, 256)]),
    "mixture_gradient": (mixture_pass.tiles, [{"block_k": k} for k in (4, 16, 64, 256)]),
    "mixture_logp": (mixture_pass.tiles, [{"block_k": k} for k in (4, 16, 64, 256)]),
    "linear_logp": (
        linear_logp.blocks,
        [{"dtype": d} for d in (torch.float32, torch.float16, torch.bfloat16)],
    ),
}
in_the_interpreter = pytest.mark.skipif(
    not backends.interpreting(), reason="the launchers take CPU tensors under TRITON_INTERPRET=1"
)


def document(kernel: str, key: str, config: dict[str, Any], arch: str = "sm_90") -> dict[str, Any]:
    return {"architecture": arch, "choices": {kernel: {key: {"config": config}}}}


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    tuning.forget()
    yield
    tuning.forget()


@pytest.fixture
def on_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")


def candidates(width: int) -> tuple[dict[str, int], ...]:
    return tuple({"BLOCK": width * n} for n in (1, 2, 3))


def choose(width: int = 16) -> dict[str, int]:
    return tuning.choose("a kernel", candidates, CPU, width=width)


def test_without_measurements_the_first_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose() == {"BLOCK": 16}
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_123")
    assert choose() == {"BLOCK": 16}


@pytest.mark.usefixtures("on_sm_90")
def test_what_was_measured_is_chosen_in_its_regime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = json.dumps(document("a kernel", "width=16", {"BLOCK": 48}))
    (tmp_path / "sm_90.json").write_text(text)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)  # where the project's own lie
    assert choose(16) == {"BLOCK": 48}
    assert choose(32) == {"BLOCK": 32}


@pytest.mark.usefixtures("on_sm_90")
def test_the_variable_names_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.json"
    monkeypatch.setenv("FASTRAG_TUNED", str(file))
    for arch, chosen in (("sm_90", 32), ("sm_80", 16)):  # of another architecture nothing is taken
        file.write_text(json.dumps(document("a kernel", "width=16", {"BLOCK": 32}, arch)))
        tuning.forget()
        assert choose() == {"BLOCK": chosen}


@pytest.mark.usefixtures("on_sm_90")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "expected JSON"),
        ("[]", 'expected {"architecture"'),
        ('{"architecture": "sm_90"}', 'expected {"architecture"'),
        ('{"architecture": "sm_90", "choices": {"a kernel": {"x": 3}}}', 'expected {"architecture'),
        (json.dumps(document("a kernel", "width=16", {"BLOCK": 17})), "expected one of the"),
        (None, "cannot be read: No such file"),
    ],
    ids=["cut off", "a list", "no choices", "no config", "no candidate", "no file"],
)
def test_a_bad_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, said: str
) -> None:
    file = tmp_path / "mine.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("FASTRAG_TUNED", str(file))
    with pytest.raises(ValueError, match="mine.json: ") as caught:
        choose()
    assert said in str(caught.value)


@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_differ(kernel: str) -> None:
    offer, regimes = KERNELS[kernel]
    for regime in regimes:
        entries = [tuning.as_entry(candidate) for candidate in offer(**regime)]
        assert len(entries) >= (1 if regime.get("use_tma") is False else 2)
        assert all(entries.count(entry) == 1 for entry in entries)


def test_shipped_choices_are_candidates() -> None:
    """Of every file that is there, which also says what it was measured on."""
    for file in tuning.FOLDER.glob("*.json"):
        found = tuning.read(file)
        assert found["architecture"] == file.stem and found["device"] and found["triton"]
        for kernel, regimes in found["choices"].items():
            offer, known = KERNELS[kernel]
            by_key = {tuning.regime_key(regime): regime for regime in known}
            for key, entry in regimes.items():
                offered = [tuning.as_entry(c) for c in offer(**by_key[key])]
                assert entry["config"] in offered, (file.name, kernel, key)


@in_the_interpreter
def test_another_choice_gives_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, gold = torch.randn(3, 5000), torch.tensor([0, 4999, 7])
    prior = torch.randn(1, 3).log_softmax(1)

    def answers() -> list[torch.Tensor]:
        logp, log_z, mean = row_pass.row_statistics(raw, gold, None, 1.0, None, with_mean=True)
        gradient = torch.empty_like(raw)
        row_pass.row_gradient(raw, gold, None, 1.0, None, log_z, torch.ones(3), 0.1, 5000, gradient)
        mixture = mixture_pass.mixture_statistics(raw, None, 1.0, None, *log_z, prior)
        step = mixture_logp.mixture_logp(raw, prior, None, 1.0, None, vocab_size=5000)
        x, weight = torch.ones(2, 16), torch.randn(40, 16)
        linear, _ = linear_logp.linear_logp(
            x, [(slice(0, 40), weight)], gold[:2] % 40, None, 1.0, None, 2
        )
        return [logp, mean, gradient, *mixture, *step, linear]

    def seeded() -> list[torch.Tensor]:
        torch.manual_seed(0)
        return answers()

    launched: list[str] = []
    usual = tuning.choose

    def other(kernel: str, offer: Any, device: torch.device, **regime: Any) -> Any:
        launched.append(kernel)
        return offer(**regime)[-1]

    before = seeded()
    for module in (row_pass, mixture_pass, linear_logp):
        assert module.choose is usual
        monkeypatch.setattr(module, "choose", other)
    after = seeded()
    assert set(launched) == set(KERNELS) - {"group_max", "mixture_gradient"}
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@in_the_interpreter
@pytest.mark.usefixtures("on_sm_90")
def test_the_search_takes_the_measured_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regime = {"stored": torch.bfloat16, "n_queries": 64, "has_low": True, "use_tma": True}
    first, second, *_ = mips.tiles(**regime)
    file = tmp_path / "mine.json"
    text = document("group_max", tuning.regime_key(regime), tuning.as_entry(second))
    file.write_text(json.dumps(text))
    arguments = (torch.bfloat16, 33, True, True)
    assert mips.tile_for(*arguments) == first
    monkeypatch.setenv("FASTRAG_TUNED", str(file))
    assert mips.tile_for(*arguments) == second
    assert mips.tile_for(torch.bfloat16, 65, True, True) == mips.tiles(torch.bfloat16, 128, 1, 1)[0]


def test_forced() -> None:
    with tuning.forced("a kernel", {"BLOCK": 5}):
        assert choose() == {"BLOCK": 5}
    assert choose() == {"BLOCK": 16}


@pytest.mark.slow
def test_candidates_compile_without_spilling() -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastrag.kernels.aot", "--candidates", "--arch", "90"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) > 100
    for row in rows:
        if row["name"].startswith(("_group_max_kernel[", "_linear_logp_kernel[bf16")):
            assert "wgmma" in row["instructions"], row["name"]

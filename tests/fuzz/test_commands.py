"""Command lines of any words: help, or one line on stderr and exit status 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrag.cli import main
from tests.fuzz.effort import effort

COMMANDS = [
    ["train", "c.yaml"],
    ["train", "c.yaml", "--resume"],
    ["index", "build", "--corpus", "c.jsonl", "--encoder", "e", "--generator", "g", "--out", "o"],
    ["index", "verify", "folder"],
    ["index", "info", "folder"],
    ["evaluate", "--model", "m", "--questions", "q.jsonl"],
    ["inspect", "--model", "m", "--questions", "q.jsonl", "--out", "o.html"],
    ["ask", "--model", "m", "q"],
    ["ask"],
    ["serve", "--port", "0"],
    ["serve", "--port", "0", "--index", "i"],
    [],
]
FLAGS = [
    *(
        "--retriever.n_docs",
        "--retriever.tau",
        "--evaluation.ks",
        "--data.template",
        "--training.lr_scheduler_kwargs.num_cycles",
        "--training.n_docs",
        "--print_config",
        "--resume",
        "--corpus",
        "--encoder",
        "--generator",
        "--out",
        "--template",
        "--dtype",
        "--retriever",
        "--marginal",
    ),
    *("--max-passage", "--batch-size", "--device", "--probe", "--k", "--exact", "--model"),
    *("--vectors", "--column", "--block-size"),
    *("--port", "--topk", "--max-wait-ms", "--timeout", "--retrieval-only"),
    *("--questions", "--limit", "--max-new-tokens", "--index", "--json", "--", "--nonsense", "-x"),
]
WORDS = [
    *("0", "-1", "5", "1.5", "9" * 20, "9" * 5000, "²", "٣", "1e3", "nan", "", " ", "x" * 10**4),
    *(
        "--lr=1",
        "--retriever.n_docs=",
        "=",
        "--a.b.c=1",
        "[1",
        "--reader.lora.r=8",
        "--" + "." * 100,
    ),
    *(
        "--retriever.n_docs=" + "9" * 5000,
        "--retriever.tau=&a [*a]",
        "{context: a}",
        "{{",
        "&a [*a]",
        "!!int x",
        "chat",
    ),
    *("cpu", "meta", "cuda:99999999999999999999", "cpu:-1", "\ud800", "a\nb", "é", "c.yaml", "."),
    *("bad.yaml", "deep.jsonl", "int4", "float32", "default:nix", "/", "/dev/null", "\x1b[31m"),
]
LINES = st.tuples(
    st.sampled_from(COMMANDS),
    st.lists(st.sampled_from([*FLAGS, *WORDS]) | st.text(max_size=6), max_size=6),
).map(lambda parts: [*parts[0], *(word for word in parts[1] if "\0" not in word)])


@pytest.mark.parametrize("examples", effort(quick=100, slow=3000))
def test_any_words(
    examples: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The files that the words name are not there or hold mistakes, so that nothing is computed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("n_docs: &a [*a]\n")
    (tmp_path / "c.yaml").write_text(
        "retriever: {question_encoder: e, tau: 0}\nreader: {generator: g}\n"
    )

    @settings(derandomize=True, deadline=None, max_examples=examples)
    @given(LINES)
    def check(words: list[str]) -> None:
        try:
            code = main(words)
        except SystemExit as stopped:
            code = stopped.code
        out, err = capsys.readouterr()
        if code == 0:
            assert "usage: " in out or out.startswith("fastrag ")
            return
        assert code == 2 and out == ""
        lines = [line for line in err.splitlines() if not line.startswith("fastrag: warning: ")]
        assert len(lines) == 1 and len(lines[0]) < 1000, err
        assert ": error: " in lines[0]

    check()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bad.yaml", "c.yaml"]

"""Commands on a terminal of 80 columns, and a conversation at a prompt."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrag.cli import main
from fastrag.generation import answers
from fastrag.nn import RagModel
from fastrag.nn.outputs import RagGeneration
from fastrag.terminal import Flow
from tests import tiny
from tests.cli.terminal import COLUMNS, Terminal, shown, widest
from tests.settings import options

# A passage as people have them, longer than a line, of letters of every width; and one that would
# colour the rest of the screen.
LONG = "likes red 東京都は日本の首都である and " + 30 * "so " + "\x1b[31m" + 100 * "x"


def test_no_line_is_wider_than_the_terminal(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train with evaluations, then run every command that describes the result."""
    monkeypatch.chdir(project)
    rows = [{"id": p.id, "title": p.title, "text": LONG} for p in tiny.passages()]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build = ("--corpus", "long.jsonl", "--encoder", "encoder", "--generator", "generator")
    settings = {
        "retriever.index": "long",
        "data.max_context": 32,
        "training.output_dir": "shown",
        "training.load_best_model_at_end": "true",
        "training.metric_for_best_model": "em",
    }
    commands = [
        ("index", "build", *build, "--out", "long"),
        ("train", "train.yaml", *options(settings)),
        ("index", "info", "long"),
        ("evaluate", "--model", "shown", "--questions", "questions.jsonl"),
        ("ask", "--model", "shown", "ada"),
    ]
    printed = {command[0:2]: shown(*command) for command in commands}
    assert {name: widest(text) for name, text in printed.items() if widest(text) > COLUMNS} == {}
    trained = printed["train", "train.yaml"]
    assert re.search(r"step 1  loss \d\.\d{4}  entropy .*  cut \d+ %\r?\n", trained)
    for raw in ("runtime", "per_second", "n_questions", "eval_", "Loading", "Writing"):
        assert raw not in trained, raw
    assert "\x1b" not in printed["ask", "--model"] and "東京" in printed["ask", "--model"]


def test_info_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    assert main(["info"]) == 0
    assert widest(capsys.readouterr().out) <= COLUMNS


def test_several_questions_of_one_process(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As arguments and from a pipe the answers are those of one question at a time."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    ask = ["ask", "--model", "run", "--device", "cpu", "--max-new-tokens", "3"]
    alone = []
    for question in ("ada", "bob"):
        assert main([*ask, "--json", question]) == 0
        alone += capsys.readouterr().out.splitlines()
    assert [json.loads(line)["question"] for line in alone] == ["ada", "bob"]
    assert main([*ask, "--json", "ada", "bob"]) == 0
    assert capsys.readouterr().out.splitlines() == alone
    monkeypatch.setattr("sys.stdin", io.StringIO("ada\n\n  bob \n"))
    assert main([*ask, "--json"]) == 0
    assert capsys.readouterr().out.splitlines() == alone
    assert main([*ask, "ada", "bob"]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    assert [block.split("\n")[0].split() for block in blocks[:2]] == [
        ["question", "ada"],
        ["question", "bob"],
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(ask) == 2
    assert "question: expected one as an argument or on" in capsys.readouterr().err


def test_the_words_of_an_answer(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    ask = ["ask", "--model", "run", "--device", "cpu", "--max-new-tokens", "3", "ada"]
    assert main([*ask, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(ask) == 0
    shown_lines = capsys.readouterr().out.splitlines()
    line = next(each for each in shown_lines if each.startswith("probability"))
    a_token, whole = (float(x) for x in re.findall(r"[\d.e-]+(?= a token| for all 3)", line))
    assert a_token == pytest.approx(found["probability"] ** (1 / 3), rel=0.01)
    assert whole == pytest.approx(found["probability"], rel=0.01)
    assert found["probability_per_token"] == pytest.approx(a_token, rel=0.01)
    [cited] = [each for each in found["citations"] if each["supports"]]
    shares = f"prior {cited['prior']:.3g}, posterior {cited['posterior']:.3g}"
    line = f"passage      {cited['document']['title']} ({cited['document']['id']}): {shares}"
    assert line in shown_lines
    generate = RagModel.generate

    def ended(*arguments: Any, **settings: Any) -> RagGeneration:
        found: Any = generate(*arguments, **settings)
        found.sequences = torch.full_like(found.sequences[:, :1], tiny.EOS)
        found.lengths = torch.ones_like(found.lengths)
        return found

    monkeypatch.setattr(RagModel, "generate", ended)
    assert main(ask) == 0
    out = capsys.readouterr().out
    assert "answer       (empty: " in out and "the answer is one token" in out


def test_a_conversation(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C drops the question at hand, a question that fails is no end either, Ctrl-D is."""
    monkeypatch.chdir(project)
    typed: list[Any] = ["ada", KeyboardInterrupt(), "", "bob", "ada", EOFError()]
    answer_questions = answers.answer_questions
    outcomes = [None, KeyboardInterrupt(), ValueError("context_ids: too long")]

    def read(prompt: str) -> str:
        if isinstance(key := typed.pop(0), BaseException):
            raise key
        return key

    def answer(*arguments: Any, **settings: Any) -> Any:
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome
        return answer_questions(*arguments, **settings)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(answers, "answer_questions", answer)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert main(["ask", "--model", "run", "--device", "cpu", "--max-new-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.count("answer  ") == 1 and not typed and not outcomes
    assert err.split() == ["fastrag:", "error:", "context_ids:", "too", "long"]


@pytest.mark.slow
def test_a_conversation_on_a_terminal(project: Path) -> None:
    with Terminal(project, "ask", "--model", "run", "--max-new-tokens", "3") as terminal:
        terminal.read_to("question: ")
        terminal.type("ada\n")
        assert "answer" in terminal.read_to("question: ")
        terminal.type("who")
        terminal.read_to("who")
        terminal.interrupt(then="question: ")
        terminal.type("bob\n")
        terminal.read_to("answer")
        assert widest(terminal.read_to("question: ")) <= COLUMNS
        terminal.type("\x04")  # Ctrl-D
        terminal.read_all()
    # the questions of this conversation are there in the next one
    history = project / "state" / "fastrag" / "questions"
    assert history.read_text().split() == ["ada", "bob"]
    assert history.stat().st_mode & 0o777 == 0o600
    with Terminal(project, "ask", "--model", "run", "--max-new-tokens", "3") as terminal:
        terminal.read_to("question: ")
        terminal.type("\x1b[A")  # arrow up
        terminal.read_to("bob")
        terminal.type("\n")
        assert "answer" in terminal.read_to("question: ")
        terminal.type("\x04")
        terminal.read_all()


def test_words_of_an_answer_are_printed_as_they_come(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal, for RAG-Token; what is printed is what is printed elsewhere."""
    monkeypatch.chdir(project)
    pieces: list[str] = []
    generate, write = RagModel.generate, Flow.write

    def of_words(model: RagModel, **settings: Any) -> Any:
        words = {"suppress_tokens": list(range(len(tiny.GENERATOR_SPECIALS)))}
        return generate(model, **settings, **words)

    def seen(flow: Flow, text: str) -> None:
        pieces.append(text)
        write(flow, text)

    monkeypatch.setattr(RagModel, "generate", of_words)
    monkeypatch.setattr(Flow, "write", seen)
    ask = ("ask", "--model", "run", "--device", "cpu", "--max-new-tokens", "9", "ada")
    printed = shown(*ask).replace("\r", "")
    assert len(pieces) > 5
    with contextlib.redirect_stdout(io.StringIO()) as plain:
        monkeypatch.setenv("COLUMNS", str(COLUMNS))
        assert main(ask) == 0
    assert plain.getvalue() == printed
    assert json.loads(_json(ask))["answer"] == "".join(pieces).strip()


def _json(ask: tuple[str, ...]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*ask, "--json"]) == 0
    return printed.getvalue()

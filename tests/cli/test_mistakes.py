"""A user's mistake is one line and exit status 2, and nothing on disk changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from fastrag.cli import index, main
from tests.cli.commands import BUILD, SETTINGS, fastrag
from tests.settings import nested


def damaged(project: Path, tmp_path: Path) -> dict[str, str]:
    """Files with mistakes in them, by name."""
    texts = {
        "unknown.yaml": yaml.safe_dump(nested(SETTINGS | {"n_doc": 3})),
        "cut.jsonl": '{"id": "a", "text": "x"}\n{"id": "b", "te\n',
        "twice.jsonl": '{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n',
        "blank.jsonl": '{"id": "a", "text": " "}\n',
        "empty.jsonl": "",
        "twice.csv": "id,text,text\n1,a,b\n",
        "torn.jsonl.gz": "no archive",
        "bomb.yaml": "a: &a [" + "x, " * 200 + "]\nb: &b [" + "*a, " * 200 + "]\n",
    }
    paths = {}
    for name, text in texts.items():
        path = tmp_path / name
        path.write_text(text)
        paths[name] = str(path)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"id": "a", "text": "é"}\n'.encode("latin-1"))
    paths["latin.jsonl"] = str(latin)
    for name, damage in (("holed", drop_a_weight), ("torn", tear)):
        shutil.copytree(project / "generator", tmp_path / name)
        damage(tmp_path / name / "model.safetensors")
        paths[f"--reader.generator={name}"] = f"--reader.generator={tmp_path / name}"
    mute = tmp_path / "mute.jsonl"
    mute.write_text('{"id": "a", "question": "who?"}\n')
    return paths | {"mute": f"--data.train_questions={mute}"}


def drop_a_weight(path: Path) -> None:
    weights = load_file(path)
    weights.pop(max(weights, key=lambda name: weights[name].numel()))
    save_file(weights, path, metadata={"format": "pt"})


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "none.yaml"), "none.yaml: no such file or directory"),
        (("train", "unknown.yaml"), "n_doc: unknown setting; did you mean retriever.n_docs?"),
        (
            ("train", "train.yaml", "--retriever.n_docs=0"),
            "n_docs: expected an integer >= 1, got 0",
        ),
        (("train", "train.yaml"), "run holds checkpoints"),
        (("train", "train.yaml", "--training.output_dir=plain"), "the model of a finished run"),
        (
            ("train", "train.yaml", "--training.metric_for_best_model=exact"),
            "recall@5, got 'exact'",
        ),
        (
            ("train", "train.yaml", "--training.output_dir=o", "--training.report_to=[nothing]"),
            "report_to: expected reporters that are installed here",
        ),
        (
            ("evaluate", "--model", "run", "--questions", "questions.jsonl", "--out", "no/p.jsonl"),
            "--out: expected a file in an existing folder, got 'no/p.jsonl'",
        ),
        (
            ("evaluate", "--model", "run", "--questions", "questions.jsonl", "--out", "run"),
            "--out: expected a name ending in ['.md', '.csv', '.json', '.jsonl'], got 'run'",
        ),
        (("train", "train.yaml", "--resume", "--retriever.n_docs=2"), "n_docs: expected 3 as in"),
        (
            ("train", "train.yaml", "--resume", "--training.output_dir=nix"),
            "nix/config.yaml is missing",
        ),
        (
            ("train", "train.yaml", "--training.output_dir=o", "--reader.generator=nix"),
            "generator: expected a model folder or a Hub id, got 'nix': there is no such folder",
        ),
        (
            ("train", "train.yaml", "--training.output_dir=o", "--reader.generator=holed"),
            "got missing_keys",
        ),
        (
            ("train", "train.yaml", "--training.output_dir=o", "--reader.generator=torn"),
            "expected a readable generator",
        ),
        (
            ("train", "train.yaml", "--training.output_dir=o", "--retriever.question_encoder=idx"),
            "question_encoder: expected a model folder with config.json",
        ),
        (
            ("train", "train.yaml", "--training.output_dir=o", "--retriever.index=encoder"),
            "index: expected a folder from `fastrag index build`",
        ),
        ((*BUILD, "--corpus", "cut.jsonl"), "cut.jsonl:2: "),
        ((*BUILD, "--corpus", "twice.jsonl"), "'a'"),
        ((*BUILD, "--corpus", "blank.jsonl"), "blank.jsonl:1: "),
        ((*BUILD, "--corpus", "empty.jsonl"), "expected at least one passage"),
        (
            (*BUILD, "--corpus", "corpus.jsonl", "--template", "{contxt: a}"),
            "template: expected the keys ['add_special_tokens', 'answer'",
        ),
        (
            (*BUILD, "--corpus", "corpus.jsonl", "--template", "{context: '{passage}'}"),
            "context: expected {question} exactly once",
        ),
        (
            ("train", "train.yaml", "--training.output_dir=o", "--data.max_passage=64"),
            "max_passage: expected null with retriever.index = 'idx'",
        ),
        ((*BUILD, "--corpus", "latin.jsonl"), "latin.jsonl:1: "),
        ((*BUILD[:-1], "encoder", "--corpus", "corpus.jsonl"), "encoder is neither"),
        (("evaluate", "--model", "run", "--questions", "empty.jsonl"), "at least one question"),
        (
            ("evaluate", "--model", "idx", "--questions", "questions.jsonl"),
            "has no rag_config.json",
        ),
        (("ask", "--model", "run", "  "), "question: expected a text, got an empty one"),
        (("ask", "--model", "run", "--index", "no", "x"), "no/index is missing"),
        (("ask", "--model", "run", "--device", "nonsense", "x"), "--device nonsense"),
        (
            ("ask", "--model", "run", "--device", "meta", "x"),
            "--device: expected one that computes",
        ),
        (
            ("ask", "--model", "run", "--prefix-cache-mib", "1", "x"),
            "prefix_cache: expected a causal generator",
        ),
        (
            ("serve", "--index", "idx", "--prefix-cache-mib", "1"),
            "prefix_cache_mib: expected a model with its generator, got none",
        ),
        (
            ("train", "train.yaml", "--lr=1"),
            "did you mean retriever.learning_rate, training.learning_rate?",
        ),
        (("train", "train.yaml", "--reader.lora=x"), "lora: unknown setting; did you mean reader"),
        (("train", "train.yaml", "--evaluation.ks+=3"), "ks+: unknown setting; did you mean eval"),
        (("train", "bomb.yaml"), "expected no aliases, got one"),
        (
            (*BUILD, "--corpus", "twice.csv"),
            "twice.csv:1: expected distinct columns, got 'text' tw",
        ),
        ((*BUILD, "--corpus", "torn.jsonl.gz"), "torn.jsonl.gz:1: expected readable data"),
        ((*BUILD, "--corpus", "none.jsonl"), "none.jsonl: no such file or directory"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(project)
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*") if path.is_file()}
    files = damaged(project, tmp_path)
    assert main([files.get(argument, argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("fastrag")]
    assert len(errors) == 1 and errors[0] == err.splitlines()[-1]
    assert errors[0].startswith("fastrag: error: ") and message in errors[0]
    assert "Traceback" not in err
    after = {path: path.stat().st_mtime_ns for path in project.rglob("*") if path.is_file()}
    assert before == after  # nothing on disk is lost or left behind
    assert not (project / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: command"),
        (("trian",), "invalid choice: 'trian'"),
        (("evaluate", "--model", "m", "--questions", "q", "--k", "0"), "an integer >= 1, got '0'"),
        (("ask", "x"), "the following arguments are required: --model"),
        (
            (*BUILD, "--corpus", "corpus.jsonl", "--template", "chatty"),
            "--template: expected one of plain, chat, or a YAML mapping of a template's fields, "
            "got 'chatty'",
        ),
        (
            (*BUILD, "--corpus", "corpus.jsonl", "--dtype", "int4"),
            "--dtype: expected one of float32, float16, bfloat16, int8, got 'int4'",
        ),
        (
            ("evaluate", "--model", "m", "--questions", "q", "--k", "1" * 400),
            "below 2**31, got '1111",
        ),
        (
            (*BUILD, "--corpus", "corpus.jsonl", "--template", "{context: "),
            "a YAML mapping of a template's fields, got '{context: '",
        ),
    ],
)
def test_usage_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err


def test_a_long_argument_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ("x" * 10**5,),
        ("info", "x" * 10**5),
        ("ask", "--model", "m", "--k" * 10**5),
    ):
        with pytest.raises(SystemExit, match="^2$"):
            main(arguments)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and len(err) < 800


def test_ctrl_c_while_arguments_are_parsed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    # as the import of torch, which the type of --dtype waits for, would be
    monkeypatch.setattr(index, "_dtype", interrupted)
    assert main([*BUILD, "--corpus", "corpus.jsonl", "--dtype", "int8"]) == 130
    assert capsys.readouterr().err == "fastrag: interrupted\n"


def test_a_process_ends_with_that_code_and_line(project: Path) -> None:
    done = fastrag(project, "ask", "--model", "nowhere", "x")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(
        "fastrag: error: model: expected a model folder, a run, a checkpoint or a Hub id, got "
        "'nowhere': there is no such folder, no copy in the cache "
    )
    assert done.stderr.count("\n") == 1


def test_questions_without_answers_do_not_train(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(project)
    questions = damaged(project, tmp_path)["mute"]
    arguments = ["train", "train.yaml", f"--training.output_dir={tmp_path}/run", questions]
    assert main(arguments) == 2
    assert "expected questions with answers" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("name", "reason"), [("triton", "cannot run"), ("zzz", "no backend")])
def test_forced_backend_that_cannot_run(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    reason: str,
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("FASTRAG_BACKEND", name)
    assert main(["ask", "--model", "run", "--device", "cpu", "what?"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fastrag: error: ") and reason in line


def test_debug_shows_the_traceback(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRAG_DEBUG", "1")
    monkeypatch.chdir(project)
    with pytest.raises(FileNotFoundError):
        main(["train", "none.yaml"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optimizer.pt", "optimizer.pt: expected the optimiser state of this configuration: "),
        ("scheduler.pt", "scheduler.pt: expected the optimiser state of this configuration: "),
        ("rng_state.pth", "rng_state.pth: expected the random state of a run on these devices: "),
        ("trainer_state.json", "trainer_state.json: expected the state of a trainer: "),
    ],
)
@pytest.mark.parametrize(
    "content", [b"", b"garbage \xff", b'{"a": 1}'], ids=["empty", "bytes", "{}"]
)
@pytest.mark.filterwarnings("ignore:.*this checkpoint has no manifest.json")
def test_resume_from_a_damaged_checkpoint(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    message: str,
    content: bytes,
) -> None:
    monkeypatch.chdir(project)
    shutil.copytree(project / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoint-3" / name).write_bytes(content)
    (tmp_path / "run" / "checkpoint-3" / "manifest.json").unlink()  # which tells before it is read
    resume = ("--resume", f"{tmp_path}/run/checkpoint-3", f"--training.output_dir={tmp_path}/run")
    assert main(["train", "train.yaml", *resume]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fastrag: error: ") and "checkpoint-3" in line and message in line

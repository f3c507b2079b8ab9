"""The command line as a user meets it: real processes for the main path, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fastrag.cli import main
from fastrag.index import FaissIndex, FlatIndex, PassageStore
from fastrag.train.callbacks import read_metrics
from fastrag.train.checkpoints import checkpoints
from tests import tiny

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SETTINGS: dict[str, Any] = {
    "question_encoder": "encoder",
    "generator": "generator",
    "index": "idx",
    "train_questions": "questions.jsonl",
    "eval_questions": "questions.jsonl",
    "output_dir": "run",
    "n_docs": 3,
    "max_context": 64,
    "steps": 6,
    "eval_steps": 3,
    "save_steps": 3,
    "log_steps": 1,
    "eval_max_new_tokens": 3,
    "device": "cpu",
}


def fastrag(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastrag.cli", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def write_files(folder: Path) -> None:
    """Model parts, corpus, questions and config, as a user has them."""
    tiny.save_parts(folder)
    passages = [{"id": p.id, "title": p.title, "text": p.text} for p in tiny.passages()]
    questions = [
        {"id": q.id, "question": q.question, "answers": list(q.answers), "positive": q.positive}
        for q in tiny.questions()
    ]
    for name, rows in (("corpus", passages), ("questions", questions)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "train.yaml").write_text(yaml.safe_dump(SETTINGS))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files, an index, and a finished run."""
    folder = tmp_path_factory.mktemp("project")
    write_files(folder)
    parts = ("--encoder", "encoder", "--generator", "generator", "--device", "cpu")
    built = fastrag(folder, "index", "build", "--corpus", "corpus.jsonl", *parts, "--out", "idx")
    assert built.returncode == 0, built.stderr
    assert built.stdout == "idx: 12 passages, 16 dimensions\n"
    trained = fastrag(folder, "train", "train.yaml")
    assert trained.returncode == 0, trained.stderr
    assert "model: run/model" in trained.stdout and "recall@1" in trained.stdout
    (folder / "plain" / "model").mkdir(parents=True)  # a run without checkpoints
    return folder


def test_training_leaves_a_run_folder(project: Path) -> None:
    names = {path.name for path in (project / "run").iterdir()}
    assert names == {
        "checkpoint-3",
        "checkpoint-6",
        "config.yaml",
        "curve.png",
        "metrics.jsonl",
        "model",
        "predictions.jsonl",
        "tensorboard",
        "versions.json",
    }
    entries = read_metrics(project / "run" / "metrics.jsonl")
    assert [each["step"] for each in entries if "loss" in each] == [1, 2, 3, 4, 5, 6]
    assert [each["step"] for each in entries if "eval_em" in each] == [0, 3, 6, 6]
    resolved = yaml.safe_load((project / "run" / "config.yaml").read_text())
    assert resolved["n_docs"] == 3 and resolved["marginal"] == "token"
    assert len((project / "run" / "predictions.jsonl").read_text().splitlines()) == 12


def test_evaluate_and_ask_find_the_model_and_its_index(project: Path) -> None:
    done = fastrag(
        project,
        *("evaluate", "--model", "run", "--questions", "questions.jsonl", "--device", "cpu"),
        *("--k", "1", "12", "--max-new-tokens", "3", "--out", "predictions.jsonl"),
    )
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert rows["recall@12"] == ["1.000", "1.000", "–", "1.000"]
    final = [e for e in read_metrics(project / "run" / "metrics.jsonl") if "eval_em" in e][-1]
    assert float(rows["loss"][0]) == pytest.approx(final["eval_loss"], abs=1e-3)
    predictions = [json.loads(each) for each in (project / "predictions.jsonl").open()]
    asked = fastrag(
        project,
        *("ask", "--model", "run/model", "--json", "--device", "cpu", "--max-new-tokens", "3"),
        tiny.questions()[4].question,
    )
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert answer["answer"] == predictions[4]["prediction"]
    assert answer["passage"]["id"] == predictions[4]["passage_id"]
    assert answer["passage"]["text"].startswith("likes ")
    assert 0.0 < answer["probability"] <= 1.0


@pytest.mark.slow
def test_ctrl_c_exits_130_and_says_how_to_resume(project: Path) -> None:
    command = ["train", "train.yaml", "--set", "output_dir=cut", "--set", "steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastrag.cli", *command],
        cwd=project,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while not checkpoints(project / "cut"):  # step 3 is done
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    last = checkpoints(project / "cut")[-1]
    step = int(last.name.split("-")[1])
    assert err.splitlines()[-2:] == [
        f"fastrag: interrupted by SIGINT after step {step}; resume from cut/{last.name}",
        "fastrag: resume with: fastrag train train.yaml --set output_dir=cut --set steps=100000 "
        "--resume",
    ]
    assert "Traceback" not in err
    steps = f"steps={step + 2}"
    command = ["train", "train.yaml", "--set", "output_dir=cut", "--set", steps, "--resume"]
    resumed = fastrag(project, *command)
    assert resumed.returncode == 0, resumed.stderr
    entries = read_metrics(project / "cut" / "metrics.jsonl")
    logged = [each["step"] for each in entries if "loss" in each]
    assert logged == list(range(1, step + 3))


def damaged(project: Path, tmp_path: Path) -> dict[str, str]:
    """Files with mistakes in them, by name."""
    texts = {
        "unknown.yaml": yaml.safe_dump(SETTINGS | {"n_doc": 3}),
        "cut.jsonl": '{"id": "a", "text": "x"}\n{"id": "b", "te\n',
        "twice.jsonl": '{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n',
        "blank.jsonl": '{"id": "a", "text": " "}\n',
        "empty.jsonl": "",
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
        paths[f"generator={name}"] = f"generator={tmp_path / name}"
    mute = tmp_path / "mute.jsonl"
    mute.write_text('{"id": "a", "question": "who?"}\n')
    return paths | {"train_questions=mute": f"train_questions={mute}"}


def drop_a_weight(path: Path) -> None:
    weights = load_file(path)
    weights.pop(max(weights, key=lambda name: weights[name].numel()))
    save_file(weights, path, metadata={"format": "pt"})


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


BUILD = ("index", "build", "--encoder", "encoder", "--generator", "generator", "--out", "new")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "none.yaml"), "none.yaml: No such file or directory"),
        (("train", "unknown.yaml"), "n_doc: unknown setting; did you mean n_docs?"),
        (("train", "train.yaml", "--set", "n_docs=0"), "n_docs: expected an integer >= 1, got 0"),
        (("train", "train.yaml"), "run holds checkpoints"),
        (("train", "train.yaml", "--set", "output_dir=plain"), "the model of a finished run"),
        (("train", "train.yaml", "--set", "best_metric=exact"), "recall@5, got 'exact'"),
        (
            ("train", "train.yaml", "--set", "output_dir=o", "--set", "report_to=[nothing]"),
            "report_to: expected reporters that are installed here",
        ),
        (
            ("evaluate", "--model", "run", "--questions", "questions.jsonl", "--out", "no/p.jsonl"),
            "--out: expected a file in an existing folder, got no/p.jsonl",
        ),
        (("train", "train.yaml", "--resume", "--set", "n_docs=2"), "n_docs: expected 3 as in"),
        (
            ("train", "train.yaml", "--resume", "--set", "output_dir=nix"),
            "nix/config.yaml is missing",
        ),
        (
            ("train", "train.yaml", "--set", "output_dir=o", "--set", "generator=nix"),
            "generator: expected a local model folder, got 'nix'",
        ),
        (
            ("train", "train.yaml", "--set", "output_dir=o", "--set", "generator=holed"),
            "got missing_keys",
        ),
        (
            ("train", "train.yaml", "--set", "output_dir=o", "--set", "generator=torn"),
            "expected a readable generator",
        ),
        (
            ("train", "train.yaml", "--set", "output_dir=o", "--set", "index=encoder"),
            "index: expected a folder from `fastrag index build`",
        ),
        ((*BUILD, "--corpus", "cut.jsonl"), "cut.jsonl:2: "),
        ((*BUILD, "--corpus", "twice.jsonl"), "'a'"),
        ((*BUILD, "--corpus", "blank.jsonl"), "blank.jsonl:1: "),
        ((*BUILD, "--corpus", "empty.jsonl"), "expected at least one passage"),
        (
            (*BUILD, "--corpus", "corpus.jsonl", "--template", "{contxt: a}"),
            "template: expected keys ['context'",
        ),
        (
            (*BUILD, "--corpus", "corpus.jsonl", "--template", "{context: '{passage}'}"),
            "context: expected {question} exactly once",
        ),
        (
            ("train", "train.yaml", "--set", "output_dir=o", "--set", "max_passage=64"),
            "max_passage: expected null with index = 'idx'",
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
        (("ask", "--model", "m"), "the following arguments are required: question"),
        (
            (*BUILD, "--corpus", "corpus.jsonl", "--template", "chatty"),
            "--template: expected one of plain, chat, or a YAML mapping of a template's fields, "
            "got 'chatty'",
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


def test_a_process_ends_with_that_code_and_line(project: Path) -> None:
    done = fastrag(project, "ask", "--model", "nowhere", "x")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "fastrag: error: model: expected a model, a run or a checkpoint, nowhere has no "
        "rag_config.json\n"
    )


def test_questions_without_answers_do_not_train(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(project)
    questions = damaged(project, tmp_path)["train_questions=mute"]
    arguments = ["train", "train.yaml", "--set", f"output_dir={tmp_path}/run", "--set", questions]
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


def test_verify_finds_an_altered_byte(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    assert main(["index", "verify", "idx"]) == 0
    assert "all checksums hold" in capsys.readouterr().out
    vectors = project / "idx" / "index" / "vectors.npy"
    data = vectors.read_bytes()
    try:
        vectors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert main(["index", "verify", "idx"]) == 2
        assert "vectors.npy: expected SHA-256" in (err := capsys.readouterr().err)
        assert "altered in block 0 (bytes 128 to 895)" in err
        vectors.write_bytes(data[:-10])
        assert main(["ask", "--model", "run", "x"]) == 2
        assert "vectors.npy" in capsys.readouterr().err
    finally:
        vectors.write_bytes(data)


def test_index_info(
    project: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(project)
    assert main(["index", "info", "idx"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    index = FlatIndex.load(project / "idx" / "index")
    expected = {"kind": "FlatIndex", "dtype": "float32", "dim": "16", "rows": "12", "pitch": "64"}
    assert expected.items() <= lines.items() and lines["checksum"] == index.checksum()
    index.astype("int8").save(tmp_path / "small")
    assert main(["index", "verify", str(tmp_path / "small")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'small'}: 12 vectors, all checksums hold\n"
    probe = ["--probe", "100", "--k", "4"]
    assert main(["index", "info", str(tmp_path / "small"), *probe, "--exact", "idx"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[0] == "recall@4" and 0.7 < float(last[1]) <= 1.0
    assert last[2:] == ["(12", "queries,", "against", "idx)"]


def test_index_info_of_faiss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    vectors = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    for name, index in (("exact", FlatIndex(8)), ("approximate", FaissIndex(8, "IVF8,SQ4"))):
        index.add(vectors)
        index.save(tmp_path / name)
    assert main(["index", "info", "approximate", "--probe", "50"]) == 0
    out = capsys.readouterr().out
    assert "factory     IVF8,SQ4\n" in out and "parameters  none\n" in out
    own = out.splitlines()[-1].split(None, 2)
    assert main(["index", "info", "approximate", "--probe", "50", "--exact", "exact"]) == 0
    against = capsys.readouterr().out.splitlines()[-1].split(None, 2)
    assert own[0] == against[0] == "recall@10"
    assert own[2] == "(50 queries, against its reconstructed vectors)"
    assert 0.1 < float(against[1]) < float(own[1]) < 1.0  # the codes lose something too


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "encoder"), "encoder: expected a fastrag index folder with manifest.json"),
        (("verify", "nowhere"), "nowhere: expected a fastrag index folder, got no such folder"),
        (("info", "idx", "--exact", "idx"), "--probe: expected a number of queries with --exact"),
        (("info", "idx", "--probe", "5"), "--exact: expected an index of the original vectors"),
        (
            ("info", "idx", "--probe", "5", "--exact", "idx", "--k", "12"),
            "k: expected 1 to 11 for 12 live rows, got 12",
        ),
    ],
)
def test_mistakes_with_an_index(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(project)
    assert main(["index", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastrag: error: ") and err.count("\n") == 1 and message in err


def test_index_of_codes(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Built by the command or by a run, it is trained on, saved and asked as any other."""
    monkeypatch.chdir(project)
    build = [*BUILD[:-1], "codes", "--corpus", "corpus.jsonl", "--dtype", "int8"]
    assert main(build) == 0
    assert FlatIndex.load(project / "codes" / "index").dtype == "int8"
    train = ["train", "train.yaml", "--set", "steps=1", "--set", "index_dtype=int8"]
    assert main([*train, "--set", "index=codes", "--set", "output_dir=on_codes"]) == 0
    assert main([*train, "--set", "index=null", "--set", "output_dir=own_codes"]) == 0
    assert FlatIndex.load(project / "own_codes" / "index" / "index").dtype == "int8"
    capsys.readouterr()
    assert main(["ask", "--model", "own_codes", "--device", "cpu", "what?"]) == 0
    assert main([*train, "--set", "index_dtype=int4"]) == 2
    assert "index_dtype: expected" in capsys.readouterr().err.splitlines()[-1]


def test_index_with_a_template_of_its_own(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One mapping serves `index build` and the config; an index of another template is refused."""
    monkeypatch.chdir(project)
    template = '{context: "{passage} asked {question}", passage: "{title} {text}"}'
    build = [*BUILD[:-1], "own", "--corpus", "corpus.jsonl", "--max-passage", "4"]
    assert main([*build, "--template", template]) == 0
    store = PassageStore.load(project / "own" / "passages")
    assert store.gather(torch.tensor([0]), "encoder")[1].tolist() == [4]  # [CLS] ada likes [SEP]
    train = ["train", "train.yaml", *("--set", "index=own", "--set", "steps=1")]
    assert main([*train, "--set", "output_dir=own_run", "--set", f"template={template}"]) == 0
    capsys.readouterr()
    assert main([*train, "--set", "output_dir=other_run"]) == 2
    assert "template" in capsys.readouterr().err.splitlines()[-1]


def test_checkpoint_of_a_run_answers(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    answers = []
    for model in ("run", "run/checkpoint-6", "run/checkpoint-3"):
        code = main(["ask", "--model", model, "--json", "--max-new-tokens", "3", "ada"])
        assert code == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]  # the last step's weights
    assert answers[0]["probability"] != answers[2]["probability"]


def test_training_with_an_index_that_changes(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No prebuilt index, a passage encoder that trains, LoRA on the generator, resumed."""
    monkeypatch.chdir(project)
    settings = SETTINGS | {
        "index": None,
        "corpus": "corpus.jsonl",
        "output_dir": "joint",
        "train_passage_encoder": True,
        "refresh": "every:2",
        "lora": {"rank": 2},
        "steps": 3,
        "eval_questions": None,
    }
    (project / "joint.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "joint.yaml"]) == 0
    assert main(["train", "joint.yaml", "--resume", "--set", "steps=5"]) == 0
    entries = read_metrics(project / "joint" / "metrics.jsonl")
    assert [each["step"] for each in entries if "loss" in each] == [1, 2, 3, 4, 5]
    capsys.readouterr()
    assert main(["ask", "--model", "joint", "ada"]) == 0
    assert "likes " in capsys.readouterr().out


def test_the_model_is_the_best_one_and_the_curve_that_of_the_run(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    drawn: list[list[dict[str, Any]]] = []
    monkeypatch.setattr(
        "fastrag.train.plots.plot_curve", lambda entries, path: drawn.append(entries)
    )
    # of equal values the first is the best one: with every passage retrieved they all are
    best = ("best_metric=recall@12", "eval_ks=[12]", "n_docs=12", "output_dir=best")
    assert main(["train", "train.yaml", *(word for each in best for word in ("--set", each))]) == 0
    out = capsys.readouterr().out
    assert "step 0  recall@12 1  em" in out  # before training, when there is no bar yet
    assert "model: best/model (of step 3, the best by recall@12)" in out
    entries = read_metrics(project / "best" / "metrics.jsonl")
    by_step = {each["step"]: each["eval_loss"] for each in entries if "eval_loss" in each}
    assert by_step.keys() == {0, 3, 6}
    assert entries[-1]["eval_best_loss"] == pytest.approx(by_step[3])
    assert entries[-1]["eval_best_loss"] != pytest.approx(by_step[6])
    last = ("eval_steps=null", "save_steps=null", "output_dir=last")
    assert main(["train", "train.yaml", *(word for each in last for word in ("--set", each))]) == 0
    entries = read_metrics(project / "last" / "metrics.jsonl")
    assert [each["step"] for each in entries if "eval_em" in each] == [0, 6]
    assert drawn[-1] == entries  # with the evaluation after training


def test_index_of_another_encoder_is_noticed(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    other = tiny.encoder(seed=5)
    other.save_pretrained("other")
    tiny.tokenizer("encoder").save_pretrained("other")
    settings = ("question_encoder=other", "output_dir=foreign", "steps=1", "eval_questions=null")
    command = ["train", "train.yaml", *(w for each in settings for w in ("--set", each))]
    assert main(command) == 0
    assert (
        "index: its vectors are not those of the passage encoder other" in capsys.readouterr().err
    )
    again = ("--set", "output_dir=known", "--set", "passage_encoder=encoder")
    assert main([*command, *again]) == 0
    assert "its vectors" not in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "torch 2." in out and "backend triton" in out


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys, fastrag.cli\n"
        "try: fastrag.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr.strip() == "[]"
    assert "index build or verify" not in done.stderr and "evaluate" in done.stdout

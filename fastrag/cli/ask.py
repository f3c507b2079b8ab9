"""`fastrag ask`: answer a question with a model."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from fastrag.cli.options import add_model, load_model, positive


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    ask = commands.add_parser("ask", help="answer one question")
    add_model(ask)
    ask.add_argument("question")
    ask.add_argument("--max-new-tokens", type=positive, default=32, metavar="N")
    ask.add_argument("--json", action="store_true", help="print JSON")
    ask.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if not arguments.question.strip():
        raise ValueError("question: expected a text, got an empty one")
    model = load_model(arguments)
    from fastrag.eval import evaluate
    from fastrag.train.build import collator_for

    result = evaluate(
        model,
        [{"id": "asked", "question": arguments.question}],
        collator_for(model),
        ks=(model.n_docs,),
        max_new_tokens=arguments.max_new_tokens,
        progress=False,
    )
    [prediction] = result.predictions
    passage: dict[str, str] = {"id": prediction.passage_id, "title": "", "text": ""}
    if prediction.passage_id:
        row = model.passages.row_of(prediction.passage_id)
        passage |= {"title": model.passages.title(row), "text": model.passages.text(row)}
    probability = math.exp(prediction.log_prob)
    if arguments.json:
        answer = {"answer": prediction.prediction, "probability": probability, "passage": passage}
        print(json.dumps(answer, ensure_ascii=False))
        return 0
    print(f"answer       {prediction.prediction}")
    print(f"probability  {probability:.3g}")
    print(f"passage      {passage['id']}  {passage['title']}")
    print(f"             {passage['text']}")
    return 0

"""Train under transformers.Trainer: evaluation with a metric of one's own, checkpoints, a resume.

python examples/hf_trainer.py ENCODER GENERATOR [FOLDER]
"""

import sys

import numpy as np
from capitals import rag_model
from transformers import EvalPrediction, Trainer, TrainingArguments

encoder, generator, folder = [*sys.argv[1:], "runs/hf_trainer"][:3]
model, questions = rag_model(encoder, generator)


def recall(prediction: EvalPrediction) -> dict[str, float]:
    doc_scores, rows = prediction.predictions[:2]
    wanted = np.arange(len(rows))[:, None]  # question i is about passage i
    return {"recall": float((rows == wanted).any(axis=1).mean())}


def trainer(epochs: int) -> Trainer:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        save_strategy="epoch",
        logging_steps=1,
        remove_unused_columns=False,  # questions are objects, which the collator reads
        report_to="none",
    )
    collate = model.processor.collate
    return Trainer(model, arguments, collate, questions, questions, compute_metrics=recall)


trainer(epochs=1).train()
second = trainer(epochs=2)
second.train(resume_from_checkpoint=True)
metrics = second.evaluate()

"""Train LoRA adapters on the generator, together with the question encoder.

python examples/peft_lora.py ENCODER GENERATOR [FOLDER]
"""

import sys

import torch
from capitals import rag_model, train
from peft import LoraConfig, get_peft_model

from fastrag import RagModel

torch.manual_seed(0)
encoder, generator, folder = [*sys.argv[1:], "runs/peft"][:3]
model, questions = rag_model(encoder, generator)
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
model.generator = get_peft_model(model.generator, lora)  # the reader uses it from now on
losses = train(model, questions, reader_lr=1e-2)
model.save_pretrained(folder)  # the adapter alone; merge_adapter=True merges it
again = RagModel.from_pretrained(folder, model.index, model.passages)

"""Train under accelerate: prepare, accumulate, save_state and load_state.

accelerate launch examples/accelerate_loop.py ENCODER GENERATOR [FOLDER]
"""

import sys

import torch
from accelerate import Accelerator
from capitals import rag_model
from torch.utils.data import DataLoader

from fastrag.train import count_label_tokens, parameter_groups

torch.manual_seed(0)
encoder, generator, folder = [*sys.argv[1:], "runs/accelerate"][:3]
accelerator = Accelerator(gradient_accumulation_steps=2)
model, questions = rag_model(encoder, generator)
loader = DataLoader(questions, batch_size=8, collate_fn=model.processor.collate)
groups = parameter_groups(model, retriever_lr=1e-4, reader_lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(groups), loader)
# accelerate divides by both, and the loss is divided by the tokens of all batches already
factor = accelerator.gradient_accumulation_steps * accelerator.num_processes
losses, batches = [], list(loader)
for pair in zip(batches[::2], batches[1::2], strict=True):
    count = count_label_tokens(pair, device=accelerator.device)
    losses.append(0.0)
    for batch in pair:
        with accelerator.accumulate(model):
            loss = model(**batch, num_items_in_batch=count).loss
            accelerator.backward(loss * factor)
            losses[-1] += accelerator.reduce(loss.detach(), "sum").item()
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(f"step {len(losses)}: loss {losses[-1]:.4f}")
accelerator.save_state(folder)  # names the index by its checksum, and does not copy it
accelerator.load_state(folder)  # warns if the model has another index by now

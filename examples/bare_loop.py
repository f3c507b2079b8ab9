"""Train in a loop of one's own, with accumulated gradients that equal those of one large batch.

python examples/bare_loop.py ENCODER GENERATOR
"""

import sys

import torch
from capitals import rag_model
from torch.utils.data import DataLoader

from fastrag.train import count_label_tokens, parameter_groups

torch.manual_seed(0)
model, questions = rag_model(*sys.argv[1:3])
groups = parameter_groups(model, retriever_lr=1e-4, reader_lr=1e-3)
optimizer = torch.optim.AdamW(groups)
batches = list(DataLoader(questions, batch_size=8, collate_fn=model.processor.collate))
losses = []
for pair in zip(batches[::2], batches[1::2], strict=True):
    count = count_label_tokens(pair)
    losses.append(0.0)
    for batch in pair:
        loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
        losses[-1] += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {len(losses)}: loss {losses[-1]:.4f}")

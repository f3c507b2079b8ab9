"""Compile the reader and the loss with torch.compile; losses and gradients stay the same.

python examples/compiled.py ENCODER GENERATOR [BACKEND]
"""

import sys

import torch
from capitals import rag_model, train

torch.manual_seed(0)
encoder, generator, backend = [*sys.argv[1:], "inductor"][:3]
model, questions = rag_model(encoder, generator)
model.reader.compile(backend=backend, dynamic=True)  # the generator's forward is one graph
model.loss_fn.compile(backend=backend, dynamic=True, fullgraph=True)
losses = train(model, questions)

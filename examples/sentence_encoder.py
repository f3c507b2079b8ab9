"""Train a live SentenceTransformer as the encoder: its own modules and prompts, saved with them.

python examples/sentence_encoder.py ENCODER GENERATOR [FOLDER]
"""

import sys

import torch
from capitals import capitals, read_generator, train
from sentence_transformers import SentenceTransformer

from fastrag import FlatIndex, PassageStore, RagModel, SentenceEncoder
from fastrag.data import RagProcessor

torch.manual_seed(0)
encoder, generator, folder = [*sys.argv[1:], "runs/sentence_encoder"][:3]
passages, questions = capitals()
st = SentenceTransformer(encoder, device="cpu")
encoders = SentenceEncoder(st, "query"), SentenceEncoder(st, "passage")  # one model, two prompts
reader, tokenizer, kind = read_generator(generator)
processor = RagProcessor.for_encoders(*encoders, st.tokenizer, tokenizer, kind=kind)
store = PassageStore.build(passages, processor)
model = RagModel(*encoders, reader, FlatIndex(encoders[0].dim), store, processor, n_docs=4)
model.refresh_index()
losses = train(model.train(), questions)
model.save_pretrained(folder)

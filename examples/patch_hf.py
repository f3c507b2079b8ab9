"""A training step of a Hugging Face RAG model: its own loss and fastrag's, side by side.

python examples/patch_hf.py [FOLDER]     # of a RAG-Token model; without one, a small random BART
"""

import sys
import time
from pathlib import Path

import torch
from transformers import BartConfig, DPRConfig, RagConfig, RagTokenForGeneration

import fastrag

B, K, L, T = 4, 5, 64, 32  # questions, passages, tokens of a context and of an answer
if sys.argv[1:]:
    model = RagTokenForGeneration.from_pretrained(sys.argv[1])
else:
    body = {"d_model": 256, "encoder_layers": 2, "decoder_layers": 2, "decoder_start_token_id": 2}
    parts = DPRConfig(num_hidden_layers=1), BartConfig(**body)  # BART's vocabulary of 50,265
    model = RagTokenForGeneration(RagConfig.from_question_encoder_generator_configs(*parts))
model.train()
vocabulary = model.config.generator.vocab_size
context = torch.randint(4, vocabulary, (B * K, L))  # of passages that a retriever would find
given = {"context_input_ids": context, "context_attention_mask": torch.ones_like(context)}
given |= {"doc_scores": torch.randn(B, K), "labels": torch.randint(4, vocabulary, (B, T))}


def peak() -> int:
    """Bytes; the kernel's own count, which a write to clear_refs sets back (Linux)."""
    status = Path("/proc/self/status").read_text().split()
    return 1024 * int(status[status.index("VmHWM:") + 1])


def step() -> tuple[float, float, float]:
    torch.manual_seed(0)
    model.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = peak(), time.perf_counter()
    loss = model(**given, n_docs=K, reduce_loss=True).loss / (B * (T - 1))
    loss.backward()
    return loss.item(), time.perf_counter() - start, (peak() - before) / 2**20


results = {}
for name, change in (("transformers", lambda model: model), ("fastrag", fastrag.patch_hf_rag)):
    change(model)
    step()  # warm up
    results[name] = step()
    print("{:>12}: loss {:.4f}, {:.2f} s, peak {:.0f} MiB".format(name, *results[name]))

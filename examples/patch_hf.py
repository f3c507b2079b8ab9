"""A training step of a Hugging Face RAG model: its own loss and fastrag's, side by side (Linux).

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
n_vocab = model.config.generator.vocab_size
context = torch.randint(4, n_vocab, (B * K, L))  # of passages that a retriever would find
given = {"context_input_ids": context, "context_attention_mask": torch.ones_like(context)}
given |= {"doc_scores": torch.randn(B, K), "labels": torch.randint(4, n_vocab, (B, T))}
memory = Path("/proc/self/status")
for name, change in (("transformers", torch.nn.Module.train), ("fastrag", fastrag.patch_hf_rag)):
    change(model)
    for _ in range(2):  # the first step warms up
        torch.manual_seed(0)
        model.zero_grad()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak in KiB, starts from here
        before, start = memory.read_text(), time.perf_counter()
        loss = model(**given, n_docs=K, reduce_loss=True).loss / (B * (T - 1))
        loss.backward()
        seconds, after = time.perf_counter() - start, memory.read_text()
    low, high = (int(text.split("VmHWM:")[1].split()[0]) // 1024 for text in (before, after))
    print(f"{name:>12}: loss {loss:.4f}, {seconds:.2f} s, peak {high - low} MiB")

"""The demo: question encoder, passage encoder and generator trained jointly from scratch.

`python -m examples.demo.run` trains on the facts that ship with fastrag, `python -m
examples.demo.ablation` compares it with its ablations.
"""

"""One operation a module: schema, fake, autograd, choice of backend and the torch implementation.

`fastrag.functional` validates, documents and calls what is here; nothing else should.

    doc_scores    inner products of queries with K passages, and log p(z|x)
    token_logp    log p(y_t | x, z_k, y_<t) from hidden states, with one gradient weight per row
    marginal_nll  RAG-Token and RAG-Sequence loss, its gradients made in the forward
    mips_topk     exact maximum inner product search

    chunk_logits  what token_logp and marginal_nll share: one chunk's logits and their gradients
    group_pass    from a chunk's log-probabilities to marginal, posterior and row weights
    linear_head   and the language model head with the gradients that chunks add up to
    positions     what they share too: which labels count, and the rows behind them
    workspace     how large a chunk may be
    checks        shapes, dtypes and devices, with messages
    grads         refusal of double backward
    backends      which implementations exist, which can run here, and why others cannot
"""

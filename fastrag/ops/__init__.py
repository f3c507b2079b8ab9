"""One operation a module: schema, fake, autograd, choice of backend and the torch implementation.

`fastrag.functional` validates, documents and calls the operations; nothing else should.

    doc_scores    inner products of queries with K passages, and log p(z|x)
    token_logp    log p(y_t | x, z_k, y_<t) from hidden states, with one gradient weight per row
    marginal_nll  RAG-Token and RAG-Sequence loss, its gradients made in the forward
    mips_topk     exact maximum inner product search

    chunks        head, logits, posterior and gradients of a chunk of rows: both losses
    positions     which labels count, and their rows of hidden states
    vocab_major   gradients by slices of the vocabulary
    workspace     how large a chunk may be
    keys          score and row of a hit in one number
    checks        shapes, dtypes and devices, with messages
    late_errors   errors that only values on a GPU can tell
    autograd      no double backward, scaling in place, calls past the dispatcher
    backends      which backends exist, which can run here, and why others cannot

    cpp           the backend of a CPU          triton_chunks, triton_mips    that of a GPU
"""

"""One operation per module: schema, fake, autograd, choice of backend and torch implementation.

`fastrag.functional` checks the arguments, documents the operations and calls them. Other code
should call `fastrag.functional`.

    doc_scores    inner products of queries with K passages, and log p(z|x)
    token_logp    log p(y_t | x, z_k, y_<t) from hidden states, with one gradient weight per row
    marginal_nll  RAG-Token and RAG-Sequence loss, with gradients computed in the forward
    mips_topk     exact maximum inner product search

    chunks        head, logits, posterior and gradients of a chunk of rows, for all losses
    positions     label positions that count, and their hidden states
    vocab_major   gradients slice by slice of the vocabulary
    workspace     size of a chunk, and the buffer of its logits on a CPU
    keys          score and row of a hit in one integer
    checks        checks of shapes, dtypes and devices, and their messages
    late_errors   errors that depend on values on a GPU, raised by a later call
    autograd      rejection of double backward, scaling in place, calls without the dispatcher
    backends      registry of backends, which can run on this machine, and why others cannot

    cpp           backend for CPUs              triton_chunks, triton_mips    backend for GPUs
"""

"""Mistakes that are planted one at a time, to see that the quick tests find each of them.

A mistake replaces a piece of source by another one; the piece must occur once in its file. The
tests named with it are those that should fail: the nearest ones of `make test`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mistake:
    """One wrong line.

    Attributes:
        name: what goes wrong.
        file: the source file, from the root of the checkout.
        right: the piece that is replaced.
        wrong: what stands there then.
        tests: where it should be found; arguments of pytest.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: str


OPS = (
    Mistake(
        "the gradient of RAG-Token ignores the posterior",
        "fastrag/ops/chunks.py",
        "hit = upstream.unsqueeze(1) * posterior",
        "hit = upstream.unsqueeze(1) * call.log_prior[chunk.example].exp()",
        "tests/ops/test_marginal_nll.py",
    ),
    Mistake(
        "the posterior of RAG-Sequence leaves out the prior",
        "fastrag/ops/chunks.py",
        "joint = torch.where(active, prior + seq_logp, 0.0)",
        "joint = torch.where(active, seq_logp, 0.0)",
        "tests/ops/test_marginal_nll.py",
    ),
    Mistake(
        "examples are weighted in the loss and not in the gradient of the scores",
        "fastrag/ops/marginal_nll.py",
        "dscores = dscores * self.example_weight.unsqueeze(1)",
        "dscores = dscores * 1.0",
        "tests/ops/test_marginal_nll.py tests/ops/test_marginal_nll_autograd.py",
    ),
    Mistake(
        "the gradient of the bias keeps the last chunk alone",
        "fastrag/ops/chunks.py",
        "self.dbias.add_(draw.sum(0, dtype=self.dbias.dtype))",
        "self.dbias.copy_(draw.sum(0, dtype=self.dbias.dtype))",
        "tests/ops/test_marginal_nll.py tests/ops/test_marginal_nll_autograd.py",
    ),
    Mistake(
        "the gradient of the scores forgets the temperature",
        "fastrag/ops/doc_scores.py",
        "ds = torch.where(present, ds, 0.0) / tau",
        "ds = torch.where(present, ds, 0.0)",
        "tests/ops/test_doc_scores.py",
    ),
    Mistake(
        "a missing passage scores zero",
        "fastrag/ops/doc_scores.py",
        "scores = scores.masked_fill(missing, -torch.inf)",
        "scores = scores.masked_fill(missing, 0.0)",
        "tests/ops/test_doc_scores.py",
    ),
    Mistake(
        "ties go to the highest row",
        "fastrag/ops/keys.py",
        "return (bits.long() << 32) | (_ROW_MASK - rows)",
        "return (bits.long() << 32) | rows",
        "tests/ops/test_mips_topk.py",
    ),
    Mistake(
        "the kernel of the statistics counts the padding of the vocabulary",
        "kernels/row_pass.py",
        'z = tl.where(mask_v, z, float("-inf"))',
        "z = z",
        "tests/kernels/test_row_pass.py",
    ),
)
SEAMS = (
    Mistake(
        "an int8 index gives its codes for vectors",
        "fastrag/index/flat.py",
        "return self._codec.decode(self.index_emb[rows])",
        "return self.index_emb[rows].float()",
        "tests/nn/test_retriever.py tests/index/test_flat_dtypes.py",
    ),
    Mistake(
        "vectors are read without the lock",
        "fastrag/index/rows.py",
        'with stage("index/vectors"), self._lock.read():',
        'with stage("index/vectors"):',
        "tests/index/test_lock.py",
    ),
    Mistake(
        "a removed row is found",
        "fastrag/index/rows.py",
        "mask = self._removed if self._n_removed else None",
        "mask = None",
        "tests/index/test_flat.py",
    ),
    Mistake(
        "a change keeps the checksum of what was saved",
        "fastrag/index/rows.py",
        "self._source = self._checksum = None",
        "self._source = None",
        "tests/index/test_flat.py tests/index/test_storage.py",
    ),
    Mistake(
        "a build that continues keeps what a killed one wrote after its last block",
        "fastrag/index/storage.py",
        "self._file.truncate(_HEADER_BYTES + kept.n_bytes)",
        "self._file.seek(_HEADER_BYTES + kept.n_bytes)",
        "tests/train/test_index_build.py",
    ),
    Mistake(
        "a build that continues does not look at the corpus again",
        "fastrag/index/passage_writer.py",
        "if found != expected:",
        "if False:",
        "tests/train/test_index_build.py",
    ),
    Mistake(
        "a block is noted before it is on the disk",
        "fastrag/index/storage.py",
        '        folders.flush(self._file)\n        return {"bytes"',
        '        return {"bytes"',
        "tests/train/test_index_build.py",
    ),
    Mistake(
        "an unfinished build continues with other weights",
        "fastrag/train/indexing.py",
        "sha.update(data.numpy().data)",
        "pass",
        "tests/train/test_index_build.py",
    ),
    Mistake(
        "a step scores the index as it is by then, not as it was searched",
        "fastrag/nn/retriever.py",
        "self.encode_rows(rows) if fresh else stored\n",
        "self.encode_rows(rows) if fresh else self.index.index_emb[rows]\n",
        "tests/nn/test_retriever.py",
    ),
    Mistake(
        "passages are drawn in evaluation too",
        "fastrag/nn/retriever.py",
        "n_drawn = min(self.explore, k) if self.training else 0",
        "n_drawn = min(self.explore, k)",
        "tests/nn/test_model.py",
    ),
    Mistake(
        "a replaced generator is read through the adapter of the old one",
        "fastrag/nn/reader.py",
        "if adapted is not self.generator:",
        "if adapted is None:",
        "tests/nn/test_reader.py",
    ),
    Mistake(
        "the loss is not divided by the tokens of the whole batch",
        "fastrag/nn/model.py",
        '"normalizer": num_items_in_batch',
        '"normalizer": None',
        "tests/nn/test_model.py",
    ),
    Mistake(
        "what a pruned step drops is missing in its loss as well",
        "fastrag/nn/pruning.py",
        "old.index_copy(0, chosen, new)",
        "(old - 99.0).index_copy(0, chosen, new)",
        "tests/nn/test_pruning.py",
    ),
    Mistake(
        "contexts that are kept at random count no more than others",
        "fastrag/nn/pruning.py",
        "(fresh.evidence - constant) / share.flatten()[chosen].unsqueeze(1)",
        "fresh.evidence - constant",
        "tests/nn/test_pruning.py",
    ),
    Mistake(
        "contexts that were scored by length stay in that order",
        "fastrag/nn/pruning.py",
        "torch.cat(each).squeeze(1)[order]",
        "torch.cat(each).squeeze(1)",
        "tests/nn/test_pruning.py",
    ),
    Mistake(
        "the posterior encoder is given the passages of the question alone",
        "fastrag/nn/retriever.py",
        "self.nearest(posterior_emb.detach(), k, exclude)",
        "self.nearest(query_emb.detach(), k, exclude)",
        "tests/nn/test_chosen_passages.py",
    ),
    Mistake(
        "a posterior encoder is saved as none",
        "fastrag/nn/checkpoint.py",
        '"posterior_encoder": others["posterior_encoder"]',
        '"posterior_encoder": None',
        "tests/nn/test_chosen_passages.py",
    ),
    Mistake(
        "the retriever is frozen for one step more",
        "fastrag/train/collapse.py",
        "if state.global_step < self.steps:",
        "if state.global_step <= self.steps:",
        "tests/train/test_collapse.py",
    ),
    Mistake(
        "the temperature falls by equal steps, not by equal factors",
        "fastrag/train/collapse.py",
        "self.start * (self.end / self.start) ** done",
        "self.start + (self.end - self.start) * done",
        "tests/train/test_collapse.py",
    ),
    Mistake(
        "the passage that holds a cloze's sentence always keeps it",
        "fastrag/train/warmup.py",
        "if rng.random() < _KEPT:",
        "if rng.random() < 1.0:",
        "tests/train/test_warmup.py",
    ),
    Mistake(
        "the chain of jsa forgets that its proposals are not uniform",
        "fastrag/nn/objectives.py",
        "independence_chain(log_joint - log_q, proposals, uniforms)",
        "independence_chain(log_joint, proposals, uniforms)",
        "tests/nn/test_objectives.py",
    ),
    Mistake(
        "a passage that several questions found is a negative several times",
        "fastrag/nn/contrastive.py",
        "(scores - copies.log())",
        "scores",
        "tests/nn/test_contrastive.py",
    ),
    Mistake(
        "a passage may push the end of the question out of the window",
        "fastrag/data/processor.py",
        "torch.minimum(passage_len, room.clamp(min=0)[:, None])",
        "torch.minimum(passage_len, room.clamp(min=0)[:, None] + 1)",
        "tests/data/test_contexts.py",
    ),
    Mistake(
        "the end of an answer is no label",
        "fastrag/data/processor.py",
        "self.bound.answer_ids(answer)[: self.max_answer]",
        "self.bound.answer_ids(answer)[:-1][: self.max_answer]",
        "tests/data/test_processor.py",
    ),
    Mistake(
        "an answer's score leaves out the passage's probability",
        "fastrag/generation/sequence.py",
        "alike = (own_prior + seq_logp).unsqueeze(1)",
        "alike = seq_logp.unsqueeze(1)",
        "tests/generation/test_sequence.py",
    ),
    Mistake(
        "the next token of RAG-Token leaves out the prior",
        "fastrag/ops/mixture_logp.py",
        "shift = log_prior.to(z.dtype) - log_z",
        "shift = -log_z",
        "tests/generation/test_token.py",
    ),
    Mistake(
        "stopping criteria of the caller's are dropped",
        "fastrag/generation/search.py",
        "self.criteria = StoppingCriteriaList(criteria)",
        "self.criteria = StoppingCriteriaList()",
        "tests/generation/test_settings.py",
    ),
    Mistake(
        "a beam goes on from the best beam of the step before, whichever it belongs to",
        "fastrag/generation/token.py",
        "answer = first[:, None] + same.int().argmax(dim=2)",
        "answer = first[:, None] + 0 * same.int().argmax(dim=2)",
        "tests/generation/test_oracle.py",
    ),
    Mistake(
        "a question is cut for the encoder without a word",
        "fastrag/data/tokenization.py",
        "if len(ids) == self.max_question and self.is_cut",
        "if len(ids) == self.max_question and not self.is_cut",
        "tests/data/test_processor.py",
    ),
    Mistake(
        "a patched model gives a missing passage probability",
        "fastrag/hf/patch.py",
        "missing = outputs.retrieved_doc_ids.to(doc_scores.device) < 0",
        "missing = outputs.retrieved_doc_ids.to(doc_scores.device) < -1",
        "tests/hf/test_retrieval.py",
    ),
    Mistake(
        "a patched model counts the prior where transformers loses it",
        "fastrag/hf/losses.py",
        "counts = (targets[:, 1:2] != IGNORE_INDEX)",
        "counts = (targets[:, :1] != IGNORE_INDEX)",
        "tests/hf/test_patch.py",
    ),
    Mistake(
        "the context encoder of a saved model is dropped, as transformers drops it",
        "fastrag/hf/convert.py",
        "model.rag.ctx_encoder, _ = _read(",
        "_, _ = _read(",
        "tests/hf/test_convert.py",
    ),
    Mistake(
        "a title keeps the quotes of DPR's files",
        "fastrag/hf/corpora.py",
        """(title or "").removeprefix('"').removesuffix('"')""",
        """(title or "")""",
        "tests/hf/test_corpora.py",
    ),
    Mistake(
        "answers are evaluated by RAG-Token, whatever the model was trained by",
        "fastrag/eval/evaluate.py",
        "marginal = model.marginal if marginal is None else marginal",
        'marginal = "token" if marginal is None else marginal',
        "tests/eval/test_evaluate.py",
    ),
    Mistake(
        "recall@k looks at k + 1 passages",
        "fastrag/eval/evaluate.py",
        "[float(0 <= rank < k) for rank in judged]",
        "[float(0 <= rank <= k) for rank in judged]",
        "tests/eval/test_evaluate.py",
    ),
    Mistake(
        "the likelihood is that of the marginal that was trained, not of the decoding",
        "fastrag/eval/label_loss.py",
        "super().__init__(next(named, own.marginal), reduction",
        "super().__init__(own.marginal, reduction",
        "tests/eval/test_evaluate.py",
    ),
    Mistake(
        "nDCG takes the first named grades for those of the passages that were found",
        "fastrag/eval/retrieval.py",
        "grades = tuple(named[id] for id in (*hits, *others))",
        "grades = tuple(named.values())",
        "tests/eval/test_retrieval.py",
    ),
    Mistake(
        "the interval of ECE is of passages drawn alone, not of questions",
        "fastrag/eval/calibration.py",
        "return bootstrap_interval(self.sums, n, seed, level, statistic=_ece)",
        "return bootstrap_interval(self.sums.sum(0)[None], n, seed, level, statistic=_ece)",
        "tests/eval/test_calibration.py",
    ),
    Mistake(
        "the posterior of a passage counts the padding of the answer",
        "fastrag/generation/answers.py",
        "posterior[:, :n_tokens].mean(dim=1)",
        "posterior.mean(dim=1)",
        "tests/inspect/test_page.py",
    ),
    Mistake(
        "the page runs the text of a passage",
        "fastrag/inspect/assets/page.html",
        '<p dir="auto">{{ passage.text }}</p>',
        '<p dir="auto">{{ passage.text | safe }}</p>',
        "tests/inspect/test_page.py",
    ),
    Mistake(
        "a checkpoint is shown with what the last one retrieves",
        "fastrag/inspect/run.py",
        "dense = load_retriever(folder, index)",
        "dense = load_retriever(folders[-1], index)",
        "tests/cli/test_inspect.py",
    ),
    Mistake(
        "questions without a value come first when they are sorted",
        "fastrag/inspect/assets/page.js",
        "return Number.isNaN(left) - Number.isNaN(right);",
        "return Number.isNaN(right) - Number.isNaN(left);",
        "tests/inspect/test_browser.py",
    ),
    Mistake(
        "BM25 finds passages without a word of the question",
        "fastrag/index/bm25.py",
        "np.flatnonzero(scores > 0)",
        "np.flatnonzero(scores >= 0)",
        "tests/index/test_bm25.py",
    ),
    Mistake(
        "an alias of an answer is not accepted",
        "fastrag/data/benchmarks.py",
        'answers = _distinct([*answers, *aliases.get(str(record.get("answer_id")), ())])',
        "answers = _distinct(answers)",
        "tests/data/test_benchmarks.py",
    ),
    Mistake(
        "a checkpoint's manifest is not checked",
        "fastrag/train/trainer.py",
        "        checkpoint_contents.check_files(checkpoint)\n",
        "",
        "tests/train/test_checkpoint_files.py",
    ),
    Mistake(
        "a refresh in the middle of a run changes nothing",
        "fastrag/nn/retriever.py",
        "            self.index.replace(vectors)\n",
        "            pass\n",
        "tests/nn/test_model.py",
    ),
    Mistake(
        "a policy whose refresh failed has moved on all the same",
        "fastrag/freshness/refresher.py",
        "                self.policy.load_state_dict(before)\n",
        "",
        "tests/freshness/test_refresher.py",
    ),
    Mistake(
        "rolling goes by priority alone",
        "fastrag/freshness/kinds.py",
        "        forced = int((due - self.n * torch.arange(period)).max().clamp(0, self.n))\n",
        "        forced = 0\n",
        "tests/freshness/test_policies.py",
    ),
    Mistake(
        "staleness is not corrected by the drawn passages",
        "fastrag/freshness/staleness.py",
        "float(predicted.mean()) + self._error / self._n",
        "float(predicted.mean())",
        "tests/freshness/test_service.py",
    ),
    Mistake(
        "a fresh vector is stored as it is under a map",
        "fastrag/nn/retriever.py",
        "vectors if self.vector_map is None else self.vector_map.stored(vectors)",
        "vectors",
        "tests/freshness/test_service.py",
    ),
    Mistake(
        "a checkpoint counts while it is written",
        "fastrag/train/checkpoints.py",
        "(folder / STATE).is_file() and not (folder / UNFINISHED).exists()",
        "(folder / STATE).is_file()",
        "tests/train/test_checkpoints.py",
    ),
    Mistake(
        "label tokens are counted in the first micro-batch only",
        "fastrag/train/batches.py",
        'batch["labels"].ne(IGNORE_INDEX).sum() for batch in batches',
        'batch["labels"].ne(IGNORE_INDEX).sum() for batch in batches[:1]',
        "tests/train/test_optimizer.py",
    ),
)
SERVING = (
    Mistake(
        "requests of a batch get each other's results",
        "fastrag/serve/batching.py",
        "[[next(results) for _ in request.items] for request in batch]",
        "[[next(results) for _ in request.items] for request in reversed(batch)]",
        "tests/serve/test_batching.py",
    ),
    Mistake(
        "vectors of questions stay in the order of their lengths",
        "fastrag/serve/source.py",
        "place = torch.tensor(order).argsort()",
        "place = torch.arange(len(order))",
        "tests/serve/test_retrieve.py",
    ),
    Mistake(
        "an answer reads the index that was replaced",
        "fastrag/serve/service.py",
        "        model.index, model.passages = served.index, served.passages\n",
        "        pass\n",
        "tests/serve/test_reload.py",
    ),
    Mistake(
        "a search is not finished in the index that it was checked against",
        "fastrag/serve/service.py",
        "return await self._searches.submit(SearchKey(served, k), queries)",
        "return await self._searches.submit(SearchKey(self.served, 1), queries)",
        "tests/serve/test_retrieve.py",
    ),
    Mistake(
        "the answer for a client that has hung up is generated to its end",
        "fastrag/serve/service.py",
        "        on_progress=_ending(abandoned),\n",
        "",
        "tests/serve/test_answer.py",
    ),
    Mistake(
        "the first passage is cited for every answer",
        "fastrag/generation/answers.py",
        "tuple(shares), row == support)",
        "tuple(shares), row == int(found.rows[i, 0]))",
        "tests/serve/test_answer.py",
    ),
    Mistake(
        "a body without a stated length is read to its end",
        "fastrag/serve/limits.py",
        "                    if len(body) > limit:\n",
        "                    if False:\n",
        "tests/serve/test_retrieve.py",
    ),
    Mistake(
        "the folders are taken for read although they were replaced meanwhile",
        "fastrag/serve/service.py",
        "{**self.source.identities(fresh), **now}",
        "self.source.identities(fresh)",
        "tests/serve/test_reload.py",
    ),
    Mistake(
        "a question over the window is cut in silence",
        "fastrag/serve/source.py",
        "cut[i] = n_tokens == longest and",
        "cut[i] = n_tokens > longest and",
        "tests/serve/test_retrieve.py",
    ),
)
MISTAKES = (*OPS, *SEAMS, *SERVING)

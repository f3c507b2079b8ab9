// Inner products of each query with its K rows of a matrix, and their log-softmax.
//
//     s[b, k] = q_b . x[rows[b, k]] / tau            -inf where rows[b, k] < 0: missing, never read
//     log_prior[b, k] = s[b, k] - logsumexp_k s[b, k]
//
// All arithmetic is in float32. Each row is read once, in place, and no [B, K, D] is stored. A sum
// over D adds its terms in fixed lanes and the lanes as a tree; a sum over K is in fixed groups. So
// a result has the same bits for any number of threads.
#pragma once

#include <cstdint>

#include "mips/mips.h"

namespace fastrag {

struct ScoredRows {
  const float* query_emb;  // [n_queries, dim]
  int64_t n_queries;       // B
  int64_t n_passages;      // K
  int64_t dim;             // D
  const int64_t* rows;     // [n_queries, n_passages], below matrix.n_rows
  MipsMatrix matrix;
  float tau;

  int64_t n_pairs() const { return n_queries * n_passages; }
};

// scores and log_prior: [n_queries, n_passages].
void doc_scores(const ScoredRows& scored, float* scores, float* log_prior, Threads threads);

// The upstream gradients; either may be null.
struct ScoreGradients {
  const float* dscores;     // [n_queries, n_passages]
  const float* dlog_prior;  // [n_queries, n_passages], not read where log_prior is -inf
};

//     ds = (dscores + dlog_prior - exp(log_prior) sum_k dlog_prior) / tau, 0 where log_prior = -inf
//     dquery[b] = sum_k ds[b, k] x[rows[b, k]],   dpassage[b, k] = ds[b, k] q_b
//
// dquery: [n_queries, dim] or null. dpassage: [n_queries, n_passages, dim] or null.
void doc_scores_backward(const ScoredRows& scored, const float* log_prior,
                         const ScoreGradients& upstream, float* dquery, float* dpassage,
                         Threads threads);

}  // namespace fastrag

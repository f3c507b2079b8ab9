// Passes over the logits of one chunk of rows, for the marginal likelihood loss.
//
// Memory: the buffer is z0 = W X^T, [n_ids, n_rows], row-major, with one line for each token id and
// `pitch` elements (int64) from one line to the next. This is the faster orientation of the GEMM.
// Every row of logits is a lane of a vector, so no reduction crosses lanes. All other arrays are
// contiguous. The logits
//
//     z = softcap * tanh(logit_scale * (z0 + bias) / softcap)
//
// are never stored: each pass computes them from z0. The buffer holds float32, or bfloat16 where
// the GEMM writes bfloat16. All other numbers are float32 and all arithmetic is. Sums over the
// vocabulary are float32 within a block of kBlockIds token ids and float64 across blocks, in the
// order of the blocks, so no result depends on the number of threads.
//
// For a gradient pass with the statistics of the whole vocabulary, the buffer may hold a slice of
// the vocabulary. The label of a row may then be outside the slice.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastrag {

constexpr int64_t kBlockIds = 128;

struct Bfloat16 {
  uint16_t bits;
};

// The input of every pass.
struct Logits {
  void* z0;           // [n_ids, n_rows]; a gradient pass writes it
  bool bfloat16;      // z0 holds Bfloat16 instead of float
  int64_t n_ids;      // V, or the number of token ids of a slice
  int64_t n_rows;     // n
  int64_t pitch;      // elements
  const float* bias;  // [n_ids], or null
  float logit_scale;
  float softcap;        // 0: none
  const int64_t* gold;  // [n_rows], in [0, n_ids), or -1: outside the slice
};

// log sum_v exp(z) = shift + log_sum, both [n_rows]. They are kept separately, because the sum of a
// large shift and log_sum would lose digits of log_sum.
struct LogZ {
  float* shift;    // max_v z
  float* log_sum;  // log sum_v exp(z - shift)
};

// The results of the first pass for each row; all [n_rows].
struct RowStats {
  LogZ log_z;
  float* logp;       // log p(gold), NaN without a label
  float* mean_logp;  // mean_v log p(v), or null
};

// The K rows of each of G positions are next to each other: row g * K + k, n_rows = G * K.
struct Mixture {
  const float* log_prior;  // a [G, K]
  int64_t n_passages;      // K
};

void row_statistics(const Logits& logits, const RowStats& out, Threads threads);

// The target distribution gets smoothing / vocab_size at each token id of the whole vocabulary.
struct Smoothing {
  float smoothing;
  int64_t vocab_size;
};

// z0 becomes weight * (p - smoothing / V - (1 - smoothing) 1[v = gold]) * dz/dz0; weight [n_rows].
void row_gradient(const Logits& logits, const LogZ& log_z, const float* weight, Smoothing smoothing,
                  Threads threads);

// mean_v M_v [G] and mean_v r_kv [G, K], M_v = log sum_k exp(a_k + log p_kv) and
// r_kv = exp(a_k + log p_kv - M_v).
void mixture_statistics(const Logits& logits, const LogZ& log_z, const Mixture& mixture,
                        float* mean_mixture, float* mean_share, Threads threads);

// z0 becomes (target_k p_kv - spread r_kv - hit_k 1[v = gold]) * dz/dz0; hit and target [G, K],
// spread [G].
void mixture_gradient(const Logits& logits, const LogZ& log_z, const Mixture& mixture,
                      const float* hit, const float* target, const float* spread, Threads threads);

// y = f(x) for n numbers and f one of "exp", "log", "tanh", "sech2", to test their accuracy.
void elementwise(const char* name, const float* x, float* y, int64_t n, Isa isa);

}  // namespace fastrag

// Passes over the logits of one chunk of rows, for the marginal likelihood loss.
//
// Memory: the buffer is z0 = W X^T, [n_words, n_rows], row-major: one line for each word of the
// vocabulary, `pitch` elements (int64) from one line to the next. It is the faster orientation of
// the GEMM, and makes every row of logits one lane of a vector: no reduction crosses lanes. All
// other arrays are contiguous. The logits are
//
//     z = softcap * tanh(logit_scale * (z0 + bias) / softcap)
//
// and never stored: each pass makes them again from z0. Sums over the vocabulary are float32
// within a block of kBlockWords and float64 across blocks, in the order of the blocks, so that no
// result depends on the number of threads.
//
// The buffer may hold a slice of the vocabulary only, for a gradient pass with the statistics of
// all of it; the label of a row then may be outside.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastrag {

constexpr int64_t kBlockWords = 128;

// What every pass reads.
struct Logits {
  float* z0;          // [n_words, n_rows]; a gradient pass writes it
  int64_t n_words;    // V, or the words of a slice
  int64_t n_rows;     // n
  int64_t pitch;      // elements
  const float* bias;  // [n_words], or null
  float logit_scale;
  float softcap;        // 0: none
  const int64_t* gold;  // [n_rows], in [0, n_words), or -1: not among these words
};

// log sum_v exp(z) = shift + log_sum, kept apart: where logits are large their sum would lose the
// digits of log_sum. Both [n_rows].
struct LogZ {
  float* shift;    // max_v z
  float* log_sum;  // log sum_v exp(z - shift)
};

// What the first pass says of each row; all [n_rows].
struct RowStats {
  LogZ log_z;
  float* logp;       // log p(gold), NaN without a label
  float* mean_logp;  // mean_v log p(v), or null
};

// The K rows of each of G positions stand next to each other: row g * K + k, n_rows = G * K.
struct Mixture {
  const float* log_prior;  // a [G, K]
  int64_t n_passages;      // K
};

void row_statistics(const Logits& logits, const RowStats& out, Threads threads);

// A target that is spread out: smoothing / vocab_size on each word of the whole vocabulary.
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

// y = f(x) for f one of "exp", "log", "tanh", "sech2", n numbers: for tests of accuracy.
void elementwise(const char* name, const float* x, float* y, int64_t n, Isa isa);

}  // namespace fastrag

// The logits of the next token and their marginal distribution, for decoding.
//
// Unlike in row_pass.h, the buffer is z0 = X W^T, [n_rows, V], contiguous: transformers reads
// logits in this orientation. The lanes of a vector are token ids. The logits
//
//     z = softcap * tanh(logit_scale * (z0 + bias) / softcap)
//
// are computed from z0 by each pass.
#pragma once

#include <cstdint>

#include "isa.h"
#include "mips/mips.h"

namespace fastrag {

struct LogitHead {
  const float* bias;  // [V], or null
  float logit_scale;
  float softcap;  // 0: none
};

// z0 [n, V] = x W^T for x [n, dim] and W [V, dim] of float32, and log_z [n] = log sum_v exp(z_v).
// No result depends on the number of threads.
void head_products(const float* x, int64_t n, int64_t dim, const MipsMatrix& weight,
                   const LogitHead& head, float* z0, float* log_z, Threads threads);

// out [G, V] = log sum_k exp(log_prior_k + z_kv - log_z_k) for z0 [G * K, V].
void mixture_logp(const float* z0, int64_t n_ids, const LogitHead& head, const float* log_z,
                  const float* log_prior, int64_t n_positions, int64_t n_passages, float* out,
                  Threads threads);

}  // namespace fastrag

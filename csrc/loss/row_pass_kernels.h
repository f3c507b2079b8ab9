// The part of each pass that is compiled once per instruction set: one block of token ids.
//
// These functions do not allocate, throw or use templates of the standard library: the linker may
// keep any one of several copies of a template function, and that copy must not need AVX-512.
#pragma once

#include "loss/decoding.h"
#include "loss/row_pass.h"

namespace fastrag {

struct IdRange {
  int64_t begin;
  int64_t end;
};

// Values of each row for a gradient pass; all [n_rows].
struct GradientRows {
  const float* shift;
  const float* factor;    // weight / sum_v exp(z - shift)
  const float* constant;  // weight * smoothing / V
};

struct MixtureRows {
  const float* shift;    // [n_rows]
  const float* log_sum;  // [n_rows]
  const float* prior;    // [n_rows]
  const float* target;   // [n_rows], gradient only
  const float* spread;   // [n_rows], spread of the position, gradient only
  int64_t n_passages;
};

// K rows of logits of one position.
struct MixtureLines {
  const float* z0;  // [n_passages, n_ids]
  int64_t n_ids;
  const float* shift;  // [n_passages], log_prior - log_z
  int64_t n_passages;
};

struct KernelTable {
  // max_v z, sum_v exp(z - max) and, unless null, sum_v (z - max), over the block; all [n_rows].
  // In the sums, 0 replaces a maximum of -inf.
  void (*statistics)(const Logits&, IdRange, float* max, float* sum, float* centred);
  void (*gradient)(const Logits&, IdRange, const GradientRows&);
  // sum_v M_v [G] and sum_v r_kv [n_rows] over the block; scratch: mixture_scratch floats.
  void (*mixture_statistics)(const Logits&, IdRange, const MixtureRows&, float* mixture,
                             float* share, float* scratch);
  void (*mixture_gradient)(const Logits&, IdRange, const MixtureRows&, float* scratch);
  int64_t (*mixture_scratch)(int64_t n_rows, int64_t n_passages);
  // max_v z and sum_v exp(z - max) of one row [n_ids] over the block, as in statistics.
  void (*line_statistics)(const LogitHead&, const float* z0, IdRange, float* max, float* sum);
  // out_v = log sum_k exp(shift_k + z_kv) over the block; out [n_ids].
  void (*line_mixture)(const LogitHead&, const MixtureLines&, IdRange, float* out);
  // x = cap * tanh(x / cap) for n numbers, with the bits of the passes.
  void (*softcap)(float cap, float* x, int64_t n);
  // y = x, rounded to nearest, for n numbers, with the bits of the passes.
  void (*to_bfloat16)(const float* x, Bfloat16* y, int64_t n);
  // y = f(x) for f one of "exp", "log", "tanh", "sech2", for tests of accuracy.
  bool (*elementwise)(const char* name, const float* x, float* y, int64_t n);
};

// Null if this build lacks the instruction set.
const KernelTable* scalar_kernels();
const KernelTable* avx2_kernels();
const KernelTable* avx512_kernels();
const KernelTable* neon_kernels();

const KernelTable& row_pass_kernels(Isa isa);

}  // namespace fastrag

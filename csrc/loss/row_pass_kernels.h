// The part of each pass that is compiled once per instruction set: one block of words.
//
// Nothing here allocates, throws or names a template of the standard library: a function that the
// linker shares between translation units must not be one that needs AVX-512.
#pragma once

#include "loss/row_pass.h"

namespace fastrag {

struct WordRange {
  int64_t begin;
  int64_t end;
};

// What a gradient pass needs of each row besides the statistics; all [n_rows].
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

struct KernelTable {
  // max_v z, sum_v exp(z - max) and, unless null, sum_v (z - max), of the block; all [n_rows].
  // A maximum of -inf counts as 0 in the sums.
  void (*statistics)(const Logits&, WordRange, float* max, float* sum, float* centred);
  void (*gradient)(const Logits&, WordRange, const GradientRows&);
  // sum_v M_v [G] and sum_v r_kv [n_rows] of the block; scratch: mixture_scratch floats.
  void (*mixture_statistics)(const Logits&, WordRange, const MixtureRows&, float* mixture,
                             float* share, float* scratch);
  void (*mixture_gradient)(const Logits&, WordRange, const MixtureRows&, float* scratch);
  int64_t (*mixture_scratch)(int64_t n_rows, int64_t n_passages);
  // x = cap * tanh(x / cap), n numbers, to the bit as the passes have it.
  void (*softcap)(float cap, float* x, int64_t n);
  // y = f(x) for f one of "exp", "log", "tanh", "sech2": what the tests of accuracy call.
  bool (*elementwise)(const char* name, const float* x, float* y, int64_t n);
};

// Null where this build lacks the instruction set.
const KernelTable* scalar_kernels();
const KernelTable* avx2_kernels();
const KernelTable* avx512_kernels();
const KernelTable* neon_kernels();

}  // namespace fastrag

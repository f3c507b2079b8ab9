// The kernels for AVX-512 (F, DQ, BW, VL): 32 registers of 16 floats.
#include "mips_kernels.h"

#ifdef __AVX512F__
#include <immintrin.h>

namespace fastrag {
namespace {

struct Vec {
  using F = __m512;
  static constexpr int64_t kWidth = 16;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static uint64_t greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static bool all_zero(F x) { return _mm512_cmp_ps_mask(x, set(0.0f), _CMP_EQ_OQ) == 0xffff; }
};

constexpr int kTileRows = 14;

#include "mips_kernels.inc.h"

constexpr MipsKernels kTable = {Vec::kWidth, kTileRows, {tile<1, 14>, tile<2, 14>, tile<3, 7>}};

}  // namespace

const MipsKernels* avx512_mips_kernels() { return &kTable; }

}  // namespace fastrag
#else
namespace fastrag {
const MipsKernels* avx512_mips_kernels() { return nullptr; }
}  // namespace fastrag
#endif

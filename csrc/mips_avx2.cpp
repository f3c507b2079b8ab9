// The kernels for AVX2 with FMA: 16 registers of 8 floats.
#include "mips_kernels.h"

#ifdef __AVX2__
#include <immintrin.h>

namespace fastrag {
namespace {

struct Vec {
  using F = __m256;
  static constexpr int64_t kWidth = 8;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static uint64_t greater(F a, F b) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
  }
  static bool all_zero(F x) {
    return _mm256_movemask_ps(_mm256_cmp_ps(x, set(0.0f), _CMP_EQ_OQ)) == 0xff;
  }
};

constexpr int kTileRows = 12;

#include "mips_kernels.inc.h"

constexpr MipsKernels kTable = {Vec::kWidth, kTileRows, {tile<1, 12>, tile<2, 6>, tile<3, 4>}};

}  // namespace

const MipsKernels* avx2_mips_kernels() { return &kTable; }

}  // namespace fastrag
#else
namespace fastrag {
const MipsKernels* avx2_mips_kernels() { return nullptr; }
}  // namespace fastrag
#endif

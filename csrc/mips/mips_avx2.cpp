// The kernels for AVX2 with FMA: 16 registers of 8 floats.
#include "mips/mips_kernels.h"

#ifdef __AVX2__
#include <immintrin.h>

namespace fastrag {
namespace {

struct Vec {
  using F = __m256;
  static constexpr int64_t kWidth = 8;
  static constexpr bool kByElement = false;

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
  static F load_bfloat16(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static F load_float16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F load_int8(const int8_t* p) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
  }
  static F load_bytes(const int8_t* p) {
    return _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // Byte i of each lane, as a number.
  static F byte(F x, int i) {
    const __m256i top = _mm256_slli_epi32(_mm256_castps_si256(x), 24 - 8 * i);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
  }

  // Pairs of rows, then pairs of pairs, in each half; then the halves.
  static void transpose(F* x) {
    F y[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
      y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        x[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
        x[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0xee);
      }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      y[c] = _mm256_permute2f128_ps(x[c], x[4 + c], 0x20);
      y[4 + c] = _mm256_permute2f128_ps(x[c], x[4 + c], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) x[i] = y[i];
  }
};

constexpr int kTileRows = 12, kRowsOf1 = 12, kRowsOf2 = 6, kRowsOf3 = 4;
constexpr int kRowsOfOneSet = 6;  // of the 8 lines of a set of the L1 cache
constexpr int kPrefetchTo = 3;
constexpr bool kSpreadPrefetch = false;

#include "mips/mips_kernels.inc.h"

}  // namespace

const MipsKernels* avx2_mips_kernels() { return &kTable; }

}  // namespace fastrag
#else
namespace fastrag {
const MipsKernels* avx2_mips_kernels() { return nullptr; }
}  // namespace fastrag
#endif

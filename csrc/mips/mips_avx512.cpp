// The kernels for AVX-512 (F, DQ, BW, VL): 32 registers of 16 floats.
#include "mips/mips_kernels.h"

#ifdef __AVX512F__
#include <immintrin.h>

namespace fastrag {
namespace {

struct Vec {
  using F = __m512;
  static constexpr int64_t kWidth = 16;
  static constexpr bool kByElement = false;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static uint64_t greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static bool all_zero(F x) { return _mm512_cmp_ps_mask(x, set(0.0f), _CMP_EQ_OQ) == 0xffff; }
  static F load_bfloat16(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static F load_float16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F load_int8(const int8_t* p) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
  }
  static F load_bytes(const int8_t* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
  // Byte i of each lane, as a number.
  static F byte(F x, int i) {
    const __m512i top = _mm512_slli_epi32(_mm512_castps_si512(x), 24 - 8 * i);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24));
  }

  // Pairs of rows, then pairs of pairs, in each quarter; then the quarters.
  static void transpose(F* x) {
    F y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
      y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const __m512d low = _mm512_castps_pd(y[i + j]), high = _mm512_castps_pd(y[i + j + 2]);
        x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
        x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
      }
    // x[4 a + c] holds column 4 b + c of rows 4 a .. 4 a + 3 in its quarter b
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const F a = _mm512_shuffle_f32x4(x[c], x[4 + c], 0x44);
      const F b = _mm512_shuffle_f32x4(x[c], x[4 + c], 0xee);
      const F d = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0x44);
      const F e = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0xee);
      y[c] = _mm512_shuffle_f32x4(a, d, 0x88);
      y[4 + c] = _mm512_shuffle_f32x4(a, d, 0xdd);
      y[8 + c] = _mm512_shuffle_f32x4(b, e, 0x88);
      y[12 + c] = _mm512_shuffle_f32x4(b, e, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }
};

constexpr int kTileRows = 14, kRowsOf1 = 14, kRowsOf2 = 14, kRowsOf3 = 7;

// The L1 cache holds 32 or 48 KiB in sets of 8 or 12 lines. 14 rows of 1024 numbers, whose elements
// share a set, would evict each other before the next element is read.
constexpr int kRowsOfOneSet = 7;

// A panel of 32 queries of 768 numbers (96 KiB) evicts prefetched rows from the L1 cache before
// they are used. And a line on its way there from memory takes one of the 10 to 16 buffers that the
// loads of the panel need as well.
constexpr int kPrefetchTo = 2;

// If only the last panel prefetched the next block, it would need 4 bytes per cycle and core from
// memory, and the others nothing.
constexpr bool kSpreadPrefetch = true;

#include "mips/mips_kernels.inc.h"

}  // namespace

const MipsKernels* avx512_mips_kernels() { return &kTable; }

}  // namespace fastrag
#else
namespace fastrag {
const MipsKernels* avx512_mips_kernels() { return nullptr; }
}  // namespace fastrag
#endif

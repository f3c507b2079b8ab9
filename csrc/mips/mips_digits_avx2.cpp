// Integer products with AVX2. The sum of two products must fit 16 bits: 2 * 128 * 127 does.
#include "mips/mips_kernels.h"

#ifdef __AVX2__
#include <immintrin.h>

namespace fastrag {
namespace {

struct Dot {
  using I = __m256i;
  using F = __m256;
  static constexpr int64_t kWidth = 8;
  static constexpr int kLargest = 64;
  static constexpr int kBias = kLargest;
  static constexpr bool kByElement = false;

  static I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static I set(int32_t x) { return _mm256_set1_epi32(x); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static I add(I sum, I digits, I codes) {
    const I pairs = _mm256_maddubs_epi16(digits, codes);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    // In another order of additions, the compiler would need more registers than there are.
    asm("" : "+x"(sum));
    return sum;
  }
  static I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static F number(I sum, I bias) { return _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, bias)); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static uint64_t not_below(F a, F b) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)));
  }

  // Repeats the n numbers at p.
  template <int n>
  static F repeat(const float* p) {
    if constexpr (n == 8) return _mm256_loadu_ps(p);
    if constexpr (n == 4) return _mm256_set_m128(_mm_loadu_ps(p), _mm_loadu_ps(p));
    if constexpr (n == 2) {
      double both;
      __builtin_memcpy(&both, p, sizeof(both));
      return _mm256_castpd_ps(_mm256_set1_pd(both));
    }
  }
  template <int n>
  static I repeat(const int32_t* p) {
    return _mm256_castps_si256(repeat<n>(reinterpret_cast<const float*>(p)));
  }

  // Lane i: the sum of the lanes of x[i]. Each addition halves the number of partial sums.
  static I sums(const I* x) {
    I y[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const I a = x[2 * i], b = x[2 * i + 1];
      y[i] = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const I a = y[2 * i], b = y[2 * i + 1];
      y[i] = _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    }
    return _mm256_add_epi32(_mm256_permute2x128_si256(y[0], y[1], 0x20),
                            _mm256_permute2x128_si256(y[0], y[1], 0x31));
  }
};

constexpr int kDigitRows = 10;

#include "mips/mips_digits.inc.h"

constexpr DigitKernels kDigitTable = digit_table(digit_tile<1, 10>, digit_tile<2, 5>);

}  // namespace

const DigitKernels* avx2_digit_kernels() { return &kDigitTable; }

}  // namespace fastrag
#else
namespace fastrag {
const DigitKernels* avx2_digit_kernels() { return nullptr; }
}  // namespace fastrag
#endif

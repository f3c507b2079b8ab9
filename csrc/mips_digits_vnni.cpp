// Whole numbers with AVX-512 VNNI: four products a lane in one instruction.
#include "mips_kernels.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>

namespace fastrag {
namespace {

struct Dot {
  using I = __m512i;
  using F = __m512;
  static constexpr int64_t kWidth = 16;
  static constexpr int kLargest = 127;
  static constexpr int kBias = kLargest;
  static constexpr bool kByElement = false;

  static I load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static I set(int32_t x) { return _mm512_set1_epi32(x); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static I add(I sum, I digits, I codes) { return _mm512_dpbusd_epi32(sum, digits, codes); }
  static F number(I sum, I bias) { return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, bias)); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static uint64_t not_below(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
};

constexpr int kDigitRows = 14, kRowsOf1 = 14, kRowsOf2 = 14;

#include "mips_digits.inc.h"

}  // namespace

const DigitKernels* vnni_digit_kernels() { return &kDigitTable; }

}  // namespace fastrag
#else
namespace fastrag {
const DigitKernels* vnni_digit_kernels() { return nullptr; }
}  // namespace fastrag
#endif

// The kernels for x86 with AVX-512 F, DQ, BW and VL; setup.py enables these for this file.
#include "loss/row_pass_kernels.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>

namespace fastrag {
namespace {

struct Vec {
  using F = __m512;
  static constexpr int64_t kWidth = 16;

  static __mmask16 mask(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(mask(count), p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(float* p, F x, int64_t count) { _mm512_mask_storeu_ps(p, mask(count), x); }
  static F load(const Bfloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  // Rounded to nearest, ties to even; a NaN stays one.
  static void store(Bfloat16* p, F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_add_epi32(bits, up);
    const __m512i kept = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), rounded,
                                                 _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F less(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  static F equal(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), no, yes);
  }
  static F abs(F x) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), x); }
  static F copysign(F x, F sign) {
    const F bit = _mm512_set1_ps(-0.0f);
    return _mm512_or_ps(_mm512_andnot_ps(bit, x), _mm512_and_ps(bit, sign));
  }
  static F pow2_of_rounded(F x) {
    const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 23));
  }
  static void split(F x, F* m, F* e) {
    const __m512i low = _mm512_set1_epi32(0x3f3504f3);
    const __m512i k = _mm512_sub_epi32(_mm512_castps_si512(x), low);
    *e = _mm512_cvtepi32_ps(_mm512_srai_epi32(k, 23));
    const __m512i fraction = _mm512_and_si512(k, _mm512_set1_epi32(0x007fffff));
    *m = _mm512_castsi512_ps(_mm512_add_epi32(fraction, low));
  }
};

#include "loss/row_pass.inc.h"

}  // namespace

const KernelTable* avx512_kernels() { return &kTable; }

}  // namespace fastrag
#else
namespace fastrag {
const KernelTable* avx512_kernels() { return nullptr; }
}  // namespace fastrag
#endif

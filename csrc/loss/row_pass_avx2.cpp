// The kernels for x86 with AVX2 and FMA; setup.py enables both for this file.
#include "loss/row_pass_kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace fastrag {
namespace {

struct Vec {
  using F = __m256;
  static constexpr int64_t kWidth = 8;

  static __m256i mask(int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const float* p, int64_t count) { return _mm256_maskload_ps(p, mask(count)); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void store(float* p, F x, int64_t count) { _mm256_maskstore_ps(p, mask(count), x); }
  static F load(const Bfloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  // Rounded to nearest, ties to even; a NaN stays one.
  static void store(Bfloat16* p, F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const F rounded = _mm256_castsi256_ps(_mm256_add_epi32(bits, up));
    const F kept = _mm256_blendv_ps(rounded, _mm256_set1_ps(__builtin_nanf("")),
                                    _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F less(F a, F b, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  static F equal(F a, F b, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
  }
  static F abs(F x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
  static F copysign(F x, F sign) {
    const F bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(bit, x), _mm256_and_ps(bit, sign));
  }
  static F pow2_of_rounded(F x) {
    const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
  }
  static void split(F x, F* m, F* e) {
    const __m256i low = _mm256_set1_epi32(0x3f3504f3);
    const __m256i k = _mm256_sub_epi32(_mm256_castps_si256(x), low);
    *e = _mm256_cvtepi32_ps(_mm256_srai_epi32(k, 23));
    const __m256i fraction = _mm256_and_si256(k, _mm256_set1_epi32(0x007fffff));
    *m = _mm256_castsi256_ps(_mm256_add_epi32(fraction, low));
  }
};

#include "loss/row_pass.inc.h"

}  // namespace

const KernelTable* avx2_kernels() { return &kTable; }

}  // namespace fastrag
#else
namespace fastrag {
const KernelTable* avx2_kernels() { return nullptr; }
}  // namespace fastrag
#endif

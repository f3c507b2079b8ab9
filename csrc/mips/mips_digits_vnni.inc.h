// Vectors with AVX-512 VNNI: four products per lane in one instruction. The tiles of AMX share
// them.
struct Dot {
  using I = __m512i;
  using F = __m512;
  static constexpr int64_t kWidth = 16;
  static constexpr int kLargest = 127;
  static constexpr int kBias = kLargest;
  static constexpr bool kByElement = false;

  static I load(const void* p) { return _mm512_loadu_si512(p); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static I set(int32_t x) { return _mm512_set1_epi32(x); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static I add(I sum, I digits, I codes) { return _mm512_dpbusd_epi32(sum, digits, codes); }
  static I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static F number(I sum, I bias) { return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, bias)); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static uint64_t not_below(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }

  // Repeats the n numbers at p.
  template <int n>
  static F repeat(const float* p) {
    if constexpr (n == 16) return _mm512_loadu_ps(p);
    if constexpr (n == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
    if constexpr (n == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
    if constexpr (n == 2) {
      double both;
      __builtin_memcpy(&both, p, sizeof(both));
      return _mm512_castpd_ps(_mm512_set1_pd(both));
    }
  }
  template <int n>
  static I repeat(const int32_t* p) {
    return _mm512_castps_si512(repeat<n>(reinterpret_cast<const float*>(p)));
  }

  // Lane i: the sum of the lanes of x[i]. Each addition halves the number of partial sums.
  static I sums(const I* x) {
    I y[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      I a = x[2 * i], b = x[2 * i + 1];
      // Otherwise the compiler keeps the operands of the shuffles in registers next to the sums.
      asm("" : "+v"(a), "+v"(b));
      y[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const I a = y[2 * i], b = y[2 * i + 1];
      y[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    }
    return quarters(quarters(y[0], y[1]), quarters(y[2], y[3]));
  }
  // The sums of quarters 0 and 1 of a, 2 and 3 of a, and the same of b.
  static I quarters(I a, I b) {
    return _mm512_add_epi32(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd));
  }
};

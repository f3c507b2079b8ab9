// Code that the two kinds of integer products with NEON share; they add products in different ways.
// Both multiply signed bytes, so digits need no bias.
struct NeonDot {
  using I = int32x4_t;
  using F = float32x4_t;
  static constexpr int64_t kWidth = 4;
  static constexpr int kLargest = 127;
  static constexpr int kBias = 0;
  static constexpr bool kByElement = true;

  static I load(const void* p) {
    return vreinterpretq_s32_s8(vld1q_s8(static_cast<const int8_t*>(p)));
  }
  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static I set(int32_t x) { return vdupq_n_s32(x); }
  static F set(float x) { return vdupq_n_f32(x); }
  static F number(I sum, I bias) { return vcvtq_f32_s32(vsubq_s32(sum, bias)); }
  static I mul(I a, I b) { return vmulq_s32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static uint64_t not_below(F a, F b) {
    constexpr uint32_t kBits[kWidth] = {1, 2, 4, 8};
    return vaddvq_u32(vbicq_u32(vld1q_u32(kBits), vcltq_f32(a, b)));
  }

  // Repeats the n numbers at p.
  template <int n>
  static I repeat(const int32_t* p) {
    return n == 4 ? vld1q_s32(p) : vcombine_s32(vld1_s32(p), vld1_s32(p));
  }
  template <int n>
  static F repeat(const float* p) {
    return n == 4 ? vld1q_f32(p) : vcombine_f32(vld1_f32(p), vld1_f32(p));
  }

  // Lane i: the sum of the lanes of x[i].
  static I sums(const I* x) { return vpaddq_s32(vpaddq_s32(x[0], x[1]), vpaddq_s32(x[2], x[3])); }
};

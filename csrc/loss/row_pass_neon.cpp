// The kernels for 64-bit ARM, where all processors have NEON.
#include "loss/row_pass_kernels.h"

#ifdef __aarch64__
#include <arm_neon.h>

namespace fastrag {
namespace {

struct Vec {
  using F = float32x4_t;
  static constexpr int64_t kWidth = 4;

  static F load(const float* p) { return vld1q_f32(p); }
  static F load(const float* p, int64_t count) {
    float lanes[kWidth] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
    return vld1q_f32(lanes);
  }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static void store(float* p, F x, int64_t count) {
    float lanes[kWidth];
    vst1q_f32(lanes, x);
    for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
  }
  static F load(const Bfloat16* p) {
    const uint16x4_t bits = vld1_u16(reinterpret_cast<const uint16_t*>(p));
    return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
  }
  // Rounded to nearest, ties to even; a NaN stays one.
  static void store(Bfloat16* p, F x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t kept = vbslq_u32(vceqq_f32(x, x), rounded, vdupq_n_u32(0x7fc00000));
    vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(kept, 16));
  }
  static F set(float x) { return vdupq_n_f32(x); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  // vmaxq_f32 returns NaN if either argument is NaN.
  static F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static F less(F a, F b, F yes, F no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
  static F equal(F a, F b, F yes, F no) { return vbslq_f32(vceqq_f32(a, b), yes, no); }
  static F abs(F x) { return vabsq_f32(x); }
  static F copysign(F x, F sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, x); }
  static F pow2_of_rounded(F x) {
    const uint32x4_t bits = vaddq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(127));
    return vreinterpretq_f32_u32(vshlq_n_u32(bits, 23));
  }
  static void split(F x, F* m, F* e) {
    const int32x4_t low = vdupq_n_s32(0x3f3504f3);
    const int32x4_t k = vsubq_s32(vreinterpretq_s32_f32(x), low);
    *e = vcvtq_f32_s32(vshrq_n_s32(k, 23));
    const int32x4_t fraction = vandq_s32(k, vdupq_n_s32(0x007fffff));
    *m = vreinterpretq_f32_s32(vaddq_s32(fraction, low));
  }
};

#include "loss/row_pass.inc.h"

}  // namespace

const KernelTable* neon_kernels() { return &kTable; }

}  // namespace fastrag
#else
namespace fastrag {
const KernelTable* neon_kernels() { return nullptr; }
}  // namespace fastrag
#endif

// The kernels for NEON: 32 registers of 4 floats.
#include "mips/mips_kernels.h"

#ifdef __aarch64__
#include <arm_neon.h>

#include <cstring>

namespace fastrag {
namespace {

struct Vec {
  using F = float32x4_t;
  static constexpr int64_t kWidth = 4;
  static constexpr bool kByElement = true;

  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static F set(float x) { return vdupq_n_f32(x); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F fma_element(F a, F b, int i, F c) { return vfmaq_n_f32(c, a, b[i]); }
  static uint64_t greater(F a, F b) {
    constexpr uint32_t kBits[kWidth] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgtq_f32(a, b), vld1q_u32(kBits)));
  }
  static bool all_zero(F x) { return vminvq_u32(vceqzq_f32(x)) != 0; }
  static F load_bfloat16(const uint16_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
  }
  static F load_float16(const uint16_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
  }
  static F load_int8(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, sizeof(four));
    const int16x8_t codes = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(codes)));
  }
  static F load_bytes(const int8_t* p) { return vreinterpretq_f32_s8(vld1q_s8(p)); }
  // Byte i of each lane, as a number.
  static F byte(F x, int i) {
    const int32x4_t bytes = vreinterpretq_s32_f32(x);
    switch (i) {
      case 0:
        return top_byte(vshlq_n_s32(bytes, 24));
      case 1:
        return top_byte(vshlq_n_s32(bytes, 16));
      case 2:
        return top_byte(vshlq_n_s32(bytes, 8));
      default:
        return top_byte(bytes);
    }
  }

  // Pairs of rows, then pairs of pairs.
  static void transpose(F* x) {
    const F a = vtrn1q_f32(x[0], x[1]), b = vtrn2q_f32(x[0], x[1]);
    const F c = vtrn1q_f32(x[2], x[3]), d = vtrn2q_f32(x[2], x[3]);
    x[0] = lower_halves(a, c);
    x[1] = lower_halves(b, d);
    x[2] = upper_halves(a, c);
    x[3] = upper_halves(b, d);
  }

 private:
  static F top_byte(int32x4_t x) { return vcvtq_f32_s32(vshrq_n_s32(x, 24)); }
  static F lower_halves(F a, F b) {
    return vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
  }
  static F upper_halves(F a, F b) {
    return vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
  }
};

// The registers hold 8 sums of 2 vectors each and 4 elements of each row.
constexpr int kTileRows = 8, kRowsOf1 = 8, kRowsOf2 = 8, kRowsOf3 = 4;
constexpr int kRowsOfOneSet = kTileRows, kPrefetchTo = 3;
constexpr bool kSpreadPrefetch = false;

#include "mips/mips_kernels.inc.h"

}  // namespace

const MipsKernels* neon_mips_kernels() { return &kTable; }

}  // namespace fastrag
#else
namespace fastrag {
const MipsKernels* neon_mips_kernels() { return nullptr; }
}  // namespace fastrag
#endif

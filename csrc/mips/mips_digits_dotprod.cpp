// Integer products with ARMv8.2's dot products of bytes, four products per lane in one instruction;
// setup.py enables these for this file.
#include "mips/mips_kernels.h"

#ifdef __ARM_FEATURE_DOTPROD
#include <arm_neon.h>

namespace fastrag {
namespace {

#include "mips/mips_digits_neon.inc.h"

struct Dot : NeonDot {
  using NeonDot::add;
  static I add(I sum, I digits, I codes) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(digits), vreinterpretq_s8_s32(codes));
  }
  static I add_element(I sum, I digits, I codes, int i) {
    const int8x16_t a = vreinterpretq_s8_s32(digits), b = vreinterpretq_s8_s32(codes);
    switch (i) {
      case 0:
        return vdotq_laneq_s32(sum, a, b, 0);
      case 1:
        return vdotq_laneq_s32(sum, a, b, 1);
      case 2:
        return vdotq_laneq_s32(sum, a, b, 2);
      default:
        return vdotq_laneq_s32(sum, a, b, 3);
    }
  }
};

constexpr int kDigitRows = 8;

#include "mips/mips_digits.inc.h"

constexpr DigitKernels kDigitTable = digit_table(digit_tile<1, 8>, digit_tile<2, 8>);

}  // namespace

const DigitKernels* dotprod_digit_kernels() { return &kDigitTable; }

}  // namespace fastrag
#else
namespace fastrag {
const DigitKernels* dotprod_digit_kernels() { return nullptr; }
}  // namespace fastrag
#endif

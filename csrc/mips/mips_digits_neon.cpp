// Integer products with the NEON of all processors. The sum of two products must fit 16 bits:
// 2 * 127 * 128 does.
#include "mips/mips_kernels.h"

#ifdef __aarch64__
#include <arm_neon.h>

namespace fastrag {
namespace {

#include "mips/mips_digits_neon.inc.h"

struct Dot : NeonDot {
  using NeonDot::add;
  static I add(I sum, I digits, I codes) {
    const int8x16_t a = vreinterpretq_s8_s32(digits), b = vreinterpretq_s8_s32(codes);
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vpadalq_s16(sum, vpaddq_s16(low, high));
  }
  static I add_element(I sum, I digits, I codes, int i) {
    return add(sum, digits, vdupq_n_s32(codes[i]));
  }
};

// With more rows at a time, there would be no registers for the products.
constexpr int kDigitRows = 8;

#include "mips/mips_digits.inc.h"

constexpr DigitKernels kDigitTable = digit_table(digit_tile<1, 4>, digit_tile<2, 2>);

}  // namespace

const DigitKernels* neon_digit_kernels() { return &kDigitTable; }

}  // namespace fastrag
#else
namespace fastrag {
const DigitKernels* neon_digit_kernels() { return nullptr; }
}  // namespace fastrag
#endif

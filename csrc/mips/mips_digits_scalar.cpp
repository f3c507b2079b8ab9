// Integer products for any machine, without intrinsics.
#include <cstring>

#include "mips/mips_kernels.h"

namespace fastrag {
namespace {

#include "mips/mips_digits_scalar.inc.h"

using Dot = ScalarDot<4>;

constexpr int kDigitRows = 8;

#include "mips/mips_digits.inc.h"

constexpr DigitKernels kDigitTable = digit_table(digit_tile<1, 8>, digit_tile<2, 4>);

}  // namespace

const DigitKernels* scalar_digit_kernels() { return &kDigitTable; }

}  // namespace fastrag

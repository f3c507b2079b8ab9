// Integer products with AVX-512 VNNI: four products per lane in one instruction.
#include "mips/mips_kernels.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>

namespace fastrag {
namespace {

#include "mips/mips_digits_vnni.inc.h"

constexpr int kDigitRows = 14;

#include "mips/mips_digits.inc.h"

constexpr DigitKernels kDigitTable = digit_table(digit_tile<1, 14>, digit_tile<2, 14>);

}  // namespace

const DigitKernels* vnni_digit_kernels() { return &kDigitTable; }

}  // namespace fastrag
#else
namespace fastrag {
const DigitKernels* vnni_digit_kernels() { return nullptr; }
}  // namespace fastrag
#endif

#include "isa.h"

#include <algorithm>
#include <iterator>

#include "loss/row_pass_kernels.h"
#include "mips/mips_kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace fastrag {
namespace {

#ifdef __aarch64__
bool has_dotprod() {
#if defined(__APPLE__)
  return true;  // all of Apple's processors have it
#elif defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP, which old headers lack
  return (getauxval(AT_HWCAP) & kAsimdDp) != 0;
#else
  return false;
#endif
}
#endif

}  // namespace

bool has_isa(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return true;
#if defined(__x86_64__) || defined(__i386__)
    case Isa::kAvx2:
      return avx2_kernels() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return avx512_kernels() && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl");
#endif
#ifdef __aarch64__
    case Isa::kNeon:
      return true;
    case Isa::kDotprod:
      return dotprod_digit_kernels() && has_dotprod();
#endif
    default:
      return false;
  }
}

Isa best_isa() {
  static const Isa best = *std::find_if(std::begin(kAllIsas), std::end(kAllIsas), has_isa);
  return best;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kNeon:
      return "neon";
    case Isa::kDotprod:
      return "dotprod";
    default:
      return "scalar";
  }
}

}  // namespace fastrag

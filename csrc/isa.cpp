#include "isa.h"

#include <algorithm>
#include <iterator>

#include "loss/row_pass_kernels.h"
#include "mips/mips_kernels.h"
#include "mips/tiles.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define FASTRAG_X86 1
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace fastrag {
namespace {

constexpr const char* kNoBuild = "the compiler of this build lacks it";
constexpr const char* kNoProcessor = "this processor lacks it";

#ifdef FASTRAG_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

// Compilers that know the other instruction sets do not all know the names of these.
bool reports_tiles() {
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) && (d & kInt8);
}

const char* why_no_amx() {
  if (!amx_digit_kernels()) return kNoBuild;
  if (!has_avx512() || !__builtin_cpu_supports("avx512vnni") || !reports_tiles())
    return kNoProcessor;
  static const char* const why = why_no_tiles(allow_tiles, *amx_digit_kernels());
  return why;
}
#endif

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

const char* why_not(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return nullptr;
    case Isa::kEmulatedAmx: {
      static const char* const why =
          why_no_tiles([] { return true; }, *emulated_amx_digit_kernels());
      return why;
    }
#ifdef FASTRAG_X86
    case Isa::kAvx2:
      if (!avx2_kernels()) return kNoBuild;
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? nullptr
                                                                             : kNoProcessor;
    case Isa::kAvx512:
      if (!avx512_kernels()) return kNoBuild;
      return has_avx512() ? nullptr : kNoProcessor;
    case Isa::kAmx:
      return why_no_amx();
#endif
#ifdef __aarch64__
    case Isa::kNeon:
      return nullptr;
    case Isa::kDotprod:
      if (!dotprod_digit_kernels()) return kNoBuild;
      return has_dotprod() ? nullptr : kNoProcessor;
#endif
    default:
      return kNoProcessor;
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
    case Isa::kAmx:
      return "amx";
    case Isa::kNeon:
      return "neon";
    case Isa::kDotprod:
      return "dotprod";
    case Isa::kEmulatedAmx:
      return "amx-emulated";
    default:
      return "scalar";
  }
}

}  // namespace fastrag

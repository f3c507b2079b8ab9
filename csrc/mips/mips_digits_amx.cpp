// Integer products with AMX: a product of tile registers is 16384 products of bytes.
//
// The instructions are written as assembler. GCC's own functions paste the number of a register
// into their text, so that it cannot be a template argument, and do not tell the compiler that they
// read memory. A compiler without these functions may have an assembler without the instructions.
#include "mips/mips_kernels.h"

#if defined(__AVX512VNNI__) && defined(__x86_64__) && __has_include(<amxint8intrin.h>)
#include <immintrin.h>

namespace fastrag {
namespace {

#include "mips/mips_digits_vnni.inc.h"

constexpr int kDigitRows = 32;

#include "mips/mips_digits.inc.h"
#include "mips/mips_digits_amx.inc.h"

struct AmxTiles {
  static void enter() {
    const TileConfig config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  static void leave() { asm volatile("tilerelease"); }
  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  static void load(const void* p, int64_t row_step) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_step), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* p, int64_t row_step) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_step), "i"(kTile) : "memory");
  }
  // Signed bytes of A times unsigned bytes of B.
  template <int kSum, int kA, int kB>
  static void add_products() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }
};

constexpr DigitKernels kDigitTable = register_table<AmxTiles>();

}  // namespace

const DigitKernels* amx_digit_kernels() { return &kDigitTable; }

}  // namespace fastrag
#else
namespace fastrag {
const DigitKernels* amx_digit_kernels() { return nullptr; }
}  // namespace fastrag
#endif

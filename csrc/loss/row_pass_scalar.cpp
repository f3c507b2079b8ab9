// The kernels for any machine, without intrinsics.
#include <cmath>
#include <cstring>

#include "loss/row_pass_kernels.h"

namespace fastrag {
namespace {

struct Vec {
  using F = float;
  static constexpr int64_t kWidth = 1;

  static F load(const float* p) { return *p; }
  static F load(const float* p, int64_t) { return *p; }
  static void store(float* p, F x) { *p = x; }
  static void store(float* p, F x, int64_t) { *p = x; }
  static F load(const Bfloat16* p) {
    const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  // Rounded to nearest, ties to even; a NaN stays one.
  static void store(Bfloat16* p, F x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = x == x ? bits + 0x7fff + (bits >> 16 & 1) : 0x7fc00000u;
    p->bits = static_cast<uint16_t>(bits >> 16);
  }
  static F set(float x) { return x; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  // Fused only if that is one instruction, because otherwise std::fma is a slow function.
  static F fma(F a, F b, F c) {
#ifdef __FP_FAST_FMAF
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
  }
  static F max(F a, F b) { return a > b ? a : b; }
  static F less(F a, F b, F yes, F no) { return a < b ? yes : no; }
  static F equal(F a, F b, F yes, F no) { return a == b ? yes : no; }
  static F abs(F x) { return std::fabs(x); }
  static F copysign(F x, F sign) { return std::copysign(x, sign); }
  // x is 1.5 * 2^23 + n, n in [-126, 127]; gives 2^n.
  static F pow2_of_rounded(F x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 127) << 23;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  // x = m * 2^e for normal x > 0, m in [sqrt(1/2), sqrt(2)).
  static void split(F x, F* m, F* e) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t k = bits - 0x3f3504f3u;
    *e = static_cast<float>(static_cast<int32_t>(k) >> 23);
    bits = (k & 0x007fffffu) + 0x3f3504f3u;
    std::memcpy(m, &bits, 4);
  }
};

#include "loss/row_pass.inc.h"

}  // namespace

const KernelTable* scalar_kernels() { return &kTable; }

}  // namespace fastrag

// The kernels for any machine, without intrinsics; std::fma gives the bits of the other kernels.
#include <cmath>
#include <cstring>

#include "mips/mips_kernels.h"

namespace fastrag {
namespace {

// Four lanes, which the compiler may turn into vectors.
struct Vec {
  static constexpr int64_t kWidth = 4;
  static constexpr bool kByElement = false;
  struct F {
    float lane[kWidth];
  };

  static F load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static void store(float* p, F x) {
    for (int i = 0; i < kWidth; ++i) p[i] = x.lane[i];
  }
  static F set(float x) { return {{x, x, x, x}}; }
  static F fma(F a, F b, F c) {
    for (int i = 0; i < kWidth; ++i) c.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
    return c;
  }
  static uint64_t greater(F a, F b) {
    uint64_t mask = 0;
    for (int i = 0; i < kWidth; ++i) mask |= uint64_t{a.lane[i] > b.lane[i]} << i;
    return mask;
  }
  static bool all_zero(F x) {
    bool all = true;
    for (int i = 0; i < kWidth; ++i) all &= x.lane[i] == 0.0f;
    return all;
  }
  static F load_bfloat16(const uint16_t* p) {
    return {{from_bits(p[0]), from_bits(p[1]), from_bits(p[2]), from_bits(p[3])}};
  }
  static F load_float16(const uint16_t* p) {
    return {{from_half(p[0]), from_half(p[1]), from_half(p[2]), from_half(p[3])}};
  }
  static F load_int8(const int8_t* p) {
    return {{float(p[0]), float(p[1]), float(p[2]), float(p[3])}};
  }
  static F load_bytes(const int8_t* p) {
    F x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
  // Byte i of each lane in memory, as a number.
  static F byte(F x, int i) {
    F code;
    for (int lane = 0; lane < kWidth; ++lane) {
      int8_t bytes[4];
      std::memcpy(bytes, &x.lane[lane], 4);
      code.lane[lane] = bytes[i];
    }
    return code;
  }
  static void transpose(F* x) {
    for (int i = 0; i < kWidth; ++i)
      for (int j = 0; j < i; ++j) {
        const float other = x[i].lane[j];
        x[i].lane[j] = x[j].lane[i];
        x[j].lane[i] = other;
      }
  }

 private:
  // The bits of a bfloat16 are the upper ones of a float32.
  static float from_bits(uint32_t upper) {
    const uint32_t bits = upper << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  static float from_half(uint32_t half) {
    const uint32_t sign = half >> 15, exponent = half >> 10 & 31, fraction = half & 1023;
    float x;
    if (exponent == 31) {
      x = from_bits(fraction ? 0x7fc0 : 0x7f80);  // NaN or infinity
    } else if (exponent == 0) {
      x = std::ldexp(static_cast<float>(fraction), -24);
    } else {
      x = std::ldexp(static_cast<float>(1024 + fraction), static_cast<int>(exponent) - 25);
    }
    return sign ? -x : x;
  }
};

constexpr int kTileRows = 8, kRowsOf1 = 8, kRowsOf2 = 4, kRowsOf3 = 2;
constexpr int kRowsOfOneSet = kTileRows, kPrefetchTo = 3;
constexpr bool kSpreadPrefetch = false;

#include "mips/mips_kernels.inc.h"

}  // namespace

const MipsKernels* scalar_mips_kernels() { return &kTable; }

}  // namespace fastrag

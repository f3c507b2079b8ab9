// The kernels for a machine about which nothing is known; std::fma has the bits of the others.
#include <cmath>

#include "mips_kernels.h"

namespace fastrag {
namespace {

// Four lanes, for what the compiler can make of them.
struct Vec {
  static constexpr int64_t kWidth = 4;
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
};

constexpr int kTileRows = 8;

#include "mips_kernels.inc.h"

constexpr MipsKernels kTable = {Vec::kWidth, kTileRows, {tile<1, 8>, tile<2, 4>, tile<3, 2>}};

}  // namespace

const MipsKernels* scalar_mips_kernels() { return &kTable; }

}  // namespace fastrag

#include "mips/tiles.h"

#include <algorithm>
#include <vector>

#include "mips/mips_parts.h"  // kInfinity, round_up

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastrag {
namespace {

constexpr int64_t kDim = 200;  // not a multiple of any depth

// Digits and codes that cover all bytes, including the largest products of either sign.
int digit_at(int64_t query, int64_t d, int largest) {
  return static_cast<int>((query * 89 + d * 57) % (2 * largest + 1)) - largest;
}
int8_t code_at(int64_t row, int64_t d) {
  return static_cast<int8_t>((row * 97 + d * 41) % 256 - 128);
}

bool multiplies_right(const DigitKernels& kernels, int n_vectors) {
  const int64_t lanes = n_vectors * kernels.width, rows = kernels.rows;
  const int64_t dim = round_up(kDim, std::max(4, kernels.depth));
  std::vector<uint8_t> digits(dim * lanes);
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t d = 0; d < kDim; ++d)
      digits[(d / 4 * lanes + i) * 4 + d % 4] =
          static_cast<uint8_t>(digit_at(i, d, kernels.largest) + kernels.bias);
  std::vector<int8_t> codes(rows * dim);
  std::vector<int32_t> code_sum(rows);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < dim; ++d) codes[r * dim + d] = code_at(r, d);
    for (int64_t d = 0; d < kDim; ++d) code_sum[r] += code_at(r, d);
  }
  // With a unit of 1 and no rest, the bounds are the sums, which float32 holds exactly.
  const std::vector<float> one(lanes, 1.0f), zero(std::max(lanes, rows), 0.0f);
  const std::vector<float> threshold(lanes, kInfinity);
  DigitScores found;
  if (kernels.enter) kernels.enter();
  kernels.tile[n_vectors - 1](
      {digits.data(), one.data(), zero.data(), zero.data(), threshold.data()},
      {codes.data(), dim, kDim, zero.data(), zero.data(), code_sum.data()}, &found);
  if (kernels.leave) kernels.leave();
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < lanes; ++i) {
      int32_t sum = 0;
      for (int64_t d = 0; d < kDim; ++d) sum += digit_at(i, d, kernels.largest) * code_at(r, d);
      if (found.upper[r * lanes + i] != static_cast<float>(sum)) return false;
    }
  return true;
}

}  // namespace

bool allow_tiles() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h of Linux 5.16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;  // other systems have no such request
#endif
}

bool multiplies_right(const DigitKernels& kernels) {
  return multiplies_right(kernels, 1) && multiplies_right(kernels, 2);
}

const char* why_no_tiles(bool (*allow)(), const DigitKernels& kernels) {
  if (!allow()) return "the operating system refuses tiles";
  if (!multiplies_right(kernels)) return "its products are wrong here";
  return nullptr;
}

}  // namespace fastrag

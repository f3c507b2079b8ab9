// One call of the C++ kernels on fixed numbers, for valgrind to count the instructions of:
//
//     gate WORK ISA          benchmarks/gate.py compiles and runs it
//
// One thread, which is the caller, so that a count does not depend on who takes which task.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "loss/row_pass.h"
#include "mips/mips.h"

namespace {

using fastrag::Isa;
using fastrag::Storage;

// Uniform in [-1, 1): the same numbers with every standard library.
std::vector<float> numbers(int64_t n, uint32_t seed) {
  std::vector<float> found(n);
  for (float& x : found) {
    seed = seed * 1664525u + 1013904223u;
    x = static_cast<float>(seed >> 8) / (1 << 23) - 1.0f;
  }
  return found;
}

void search(int64_t n_queries, Storage storage, Isa isa) {
  constexpr int64_t kRows = 3000, kDim = 200, kBest = 10;
  const std::vector<float> query = numbers(n_queries * kDim, 1), index = numbers(kRows * kDim, 2);
  std::vector<uint16_t> halves(index.size());
  for (size_t i = 0; i < index.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &index[i], 4);
    halves[i] = static_cast<uint16_t>(bits >> 16);
  }
  const void* data = storage == Storage::kFloat32 ? static_cast<const void*>(index.data())
                                                  : static_cast<const void*>(halves.data());
  std::vector<float> scores(n_queries * kBest);
  std::vector<int64_t> rows(n_queries * kBest);
  fastrag::mips_topk({query.data(), n_queries, kDim, kBest, nullptr, nullptr, 0},
                     {data, kRows, kDim, storage}, {scores.data(), rows.data()}, {1, isa});
}

void pass(const std::string& which, Isa isa) {
  constexpr int64_t kWords = 3000, kGroups = 12, kPassages = 5, kRows = kGroups * kPassages;
  std::vector<float> z0 = numbers(kWords * kRows, 1);
  std::vector<int64_t> gold(kRows);
  for (int64_t i = 0; i < kRows; ++i) gold[i] = 37 * i;
  const fastrag::Logits logits{z0.data(), false, kWords, kRows,      kRows,
                               nullptr,   1.0f,  0.0f,   gold.data()};
  std::vector<float> shift(kRows), log_sum(kRows, 8.0f), logp(kRows), weight(kRows, 0.5f);
  std::vector<float> share(kRows), mixture(kGroups), prior(kRows, -1.6f), spread(kGroups, 0.1f);
  const fastrag::LogZ log_z{shift.data(), log_sum.data()};
  const fastrag::Mixture of{prior.data(), kPassages};
  const fastrag::Threads threads{1, isa};
  if (which == "row_statistics")
    fastrag::row_statistics(logits, {log_z, logp.data(), nullptr}, threads);
  else if (which == "row_gradient")
    fastrag::row_gradient(logits, log_z, weight.data(), {0.0f, kWords}, threads);
  else if (which == "mixture_statistics")
    fastrag::mixture_statistics(logits, log_z, of, mixture.data(), share.data(), threads);
  else
    fastrag::mixture_gradient(logits, log_z, of, weight.data(), share.data(), spread.data(),
                              threads);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::string work = argv[1];
  const Isa isa = std::string(argv[2]) == "avx2" ? Isa::kAvx2 : Isa::kScalar;
  if (!fastrag::has_isa(isa)) {
    std::fprintf(stderr, "this machine has no %s\n", argv[2]);
    return 3;
  }
  if (work == "mips_few_float32")
    search(1, Storage::kFloat32, isa);
  else if (work == "mips_tile_float32")
    search(64, Storage::kFloat32, isa);
  else if (work == "mips_few_bfloat16")
    search(1, Storage::kBfloat16, isa);
  else if (work == "mips_tile_bfloat16")
    search(64, Storage::kBfloat16, isa);
  else
    pass(work, isa);
}

// Parallel loops over blocks of token ids, and the reductions over the blocks.
#include "loss/row_pass.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "loss/row_pass_kernels.h"
#include "pool/thread_pool.h"

namespace fastrag {
namespace {

constexpr int64_t kBlockRows = 16;  // rows that one thread joins at a time

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

IdRange block_ids(const Logits& logits, int64_t block) {
  const int64_t begin = block * kBlockIds;
  return {begin, std::min(begin + kBlockIds, logits.n_ids)};
}

// f(first, last) on ranges that together are [0, n).
template <class F>
void for_row_blocks(int64_t n, Threads threads, F f) {
  parallel_for(threads.count, blocks(n, kBlockRows), [&](int64_t block) {
    f(block * kBlockRows, std::min((block + 1) * kBlockRows, n));
  });
}

// The argument of the softcap; the logit itself without one.
float argument_of(const Logits& logits, float z0, int64_t id) {
  return (z0 + (logits.bias ? logits.bias[id] : 0.0f)) * logits.logit_scale;
}

double slope_of(const Logits& logits, float z0, int64_t id) {
  if (logits.softcap == 0.0f) return logits.logit_scale;
  const double cosh = std::cosh(double{argument_of(logits, z0, id)} / logits.softcap);
  return logits.logit_scale / (cosh * cosh);
}

float z0_at(const Logits& logits, int64_t id, int64_t row) {
  const int64_t at = id * logits.pitch + row;
  if (!logits.bfloat16) return static_cast<const float*>(logits.z0)[at];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const Bfloat16*>(logits.z0)[at].bits)
                        << 16;
  float z0;
  std::memcpy(&z0, &bits, sizeof z0);
  return z0;
}

// z0 at the label of each row, 0 for a row without a label. A gradient pass still needs these
// numbers after it has overwritten them.
std::vector<float> gold_z0(const Logits& logits) {
  std::vector<float> found(logits.n_rows);
  for (int64_t i = 0; i < logits.n_rows; ++i)
    if (logits.gold[i] >= 0) found[i] = z0_at(logits, logits.gold[i], i);
  return found;
}

// Writes the gradient at the label of a row.
void put_gold(const Logits& logits, int64_t row, double gradient, const KernelTable& table) {
  const int64_t at = logits.gold[row] * logits.pitch + row;
  const float value = static_cast<float>(gradient);
  if (logits.bfloat16)
    table.to_bfloat16(&value, static_cast<Bfloat16*>(logits.z0) + at, 1);
  else
    static_cast<float*>(logits.z0)[at] = value;
}

// The logits of the labels, with the bits of the passes.
std::vector<float> gold_logits(const Logits& logits, const std::vector<float>& z0,
                               const KernelTable& table) {
  std::vector<float> found(logits.n_rows);
  for (int64_t i = 0; i < logits.n_rows; ++i)
    if (logits.gold[i] >= 0) found[i] = argument_of(logits, z0[i], logits.gold[i]);
  if (logits.softcap > 0.0f) table.softcap(logits.softcap, found.data(), logits.n_rows);
  return found;
}

// The gradient at the label of each row, from logits that have not been overwritten: what is
// subtracted from target p for the label would be lost in the rounding to bfloat16.
std::vector<double> gold_mixture_gradient(const Logits& logits, const MixtureRows& rows,
                                          const float* hit, const KernelTable& table) {
  const int64_t n_passages = rows.n_passages;
  std::vector<float> z0(n_passages), z(n_passages);
  std::vector<double> logp(n_passages), found(logits.n_rows);
  double mixture = 0.0;
  for (int64_t i = 0; i < logits.n_rows; ++i) {
    const int64_t id = logits.gold[i], k = i % n_passages, first = i - k;
    if (id < 0) continue;
    if (k == 0 || id != logits.gold[i - 1]) {  // usually, all rows of a position have one label
      double top = -std::numeric_limits<double>::infinity(), sum = 0.0;
      for (int64_t j = 0; j < n_passages; ++j) {
        z0[j] = z0_at(logits, id, first + j);
        z[j] = argument_of(logits, z0[j], id);
      }
      if (logits.softcap > 0.0f) table.softcap(logits.softcap, z.data(), n_passages);
      for (int64_t j = 0; j < n_passages; ++j) {
        logp[j] = double{z[j]} - rows.shift[first + j] - rows.log_sum[first + j];
        top = std::max(top, rows.prior[first + j] + logp[j]);
      }
      for (int64_t j = 0; j < n_passages; ++j)
        sum += std::exp(rows.prior[first + j] + logp[j] - top);
      mixture = top + std::log(sum);
    }
    const double share = std::exp(rows.prior[i] + logp[k] - mixture);
    const double dz = rows.target[i] * std::exp(logp[k]) - rows.spread[i] * share - hit[i];
    found[i] = dz * slope_of(logits, z0[k], id);
  }
  return found;
}

}  // namespace

const KernelTable& row_pass_kernels(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
    case Isa::kAmx:
      return *avx512_kernels();
    case Isa::kAvx2:
      return *avx2_kernels();
    case Isa::kNeon:
    case Isa::kDotprod:
      return *neon_kernels();
    default:
      return *scalar_kernels();
  }
}

void elementwise(const char* name, const float* x, float* y, int64_t n, Isa isa) {
  row_pass_kernels(isa).elementwise(name, x, y, n);
}

void row_statistics(const Logits& logits, const RowStats& out, Threads threads) {
  const KernelTable& table = row_pass_kernels(threads.isa);
  const int64_t n = logits.n_rows, n_blocks = blocks(logits.n_ids, kBlockIds);
  const bool with_mean = out.mean_logp != nullptr;
  std::vector<float> max(n_blocks * n), sum(n_blocks * n), centred(with_mean ? n_blocks * n : 0);
  parallel_for(threads.count, n_blocks, [&](int64_t block) {
    table.statistics(logits, block_ids(logits, block), &max[block * n], &sum[block * n],
                     with_mean ? &centred[block * n] : nullptr);
  });
  const std::vector<float> gold_logit = gold_logits(logits, gold_z0(logits), table);
  for_row_blocks(n, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      float top = -std::numeric_limits<float>::infinity();
      for (int64_t b = 0; b < n_blocks; ++b) top = max[b * n + i] > top ? max[b * n + i] : top;
      double total = 0.0, mean = 0.0;
      for (int64_t b = 0; b < n_blocks; ++b) {
        // The sums of a block without a finite logit are centred on 0. If all blocks of a row are
        // such, top is -inf and the difference is NaN, which is the correct result.
        const double step = static_cast<double>(max[b * n + i]) - top;
        total += sum[b * n + i] * (step == 0.0 ? 1.0 : std::exp(step));
        if (with_mean) {
          const IdRange ids = block_ids(logits, b);
          const bool empty = max[b * n + i] == -std::numeric_limits<float>::infinity();
          mean += centred[b * n + i] + (ids.end - ids.begin) * (empty ? 0.0 : step);
        }
      }
      const double log_sum = std::log(total);
      out.log_z.shift[i] = top;
      out.log_z.log_sum[i] = static_cast<float>(log_sum);
      out.logp[i] = logits.gold[i] < 0 ? std::numeric_limits<float>::quiet_NaN()
                                       : static_cast<float>(double{gold_logit[i]} - top - log_sum);
      if (with_mean) out.mean_logp[i] = static_cast<float>(mean / logits.n_ids - log_sum);
    }
  });
}

void row_gradient(const Logits& logits, const LogZ& log_z, const float* weight, Smoothing smoothing,
                  Threads threads) {
  const KernelTable& table = row_pass_kernels(threads.isa);
  const int64_t n = logits.n_rows;
  const float share = smoothing.smoothing / static_cast<float>(smoothing.vocab_size);
  const std::vector<float> z0 = gold_z0(logits), gold_logit = gold_logits(logits, z0, table);
  std::vector<float> factor(n), constant(n);
  for (int64_t i = 0; i < n; ++i) {
    factor[i] = weight[i] * static_cast<float>(std::exp(-static_cast<double>(log_z.log_sum[i])));
    constant[i] = weight[i] * share;
  }
  const GradientRows rows{log_z.shift, factor.data(), constant.data()};
  parallel_for(threads.count, blocks(logits.n_ids, kBlockIds),
               [&](int64_t block) { table.gradient(logits, block_ids(logits, block), rows); });
  for (int64_t i = 0; i < n; ++i) {
    if (logits.gold[i] < 0) continue;
    // p - 1 = expm1(log p) avoids cancellation if p is close to 1.
    const double logp = double{gold_logit[i]} - log_z.shift[i] - log_z.log_sum[i];
    const double dz = std::expm1(logp) + smoothing.smoothing - share;
    const double slope = slope_of(logits, z0[i], logits.gold[i]);
    put_gold(logits, i, weight[i] * dz * slope, table);
  }
}

void mixture_statistics(const Logits& logits, const LogZ& log_z, const Mixture& mixture,
                        float* mean_mixture, float* mean_share, Threads threads) {
  const KernelTable& table = row_pass_kernels(threads.isa);
  const int64_t n = logits.n_rows, n_blocks = blocks(logits.n_ids, kBlockIds);
  const int64_t n_positions = n / mixture.n_passages;
  const MixtureRows rows{log_z.shift, log_z.log_sum, mixture.log_prior,
                         nullptr,     nullptr,       mixture.n_passages};
  const int64_t scratch_size = table.mixture_scratch(n, mixture.n_passages);
  std::vector<float> mixtures(n_blocks * n_positions), shares(n_blocks * n);
  parallel_for(threads.count, n_blocks, [&](int64_t block) {
    std::vector<float> scratch(scratch_size);
    table.mixture_statistics(logits, block_ids(logits, block), rows, &mixtures[block * n_positions],
                             &shares[block * n], scratch.data());
  });
  const auto mean = [&](const std::vector<float>& sums, int64_t width, float* out) {
    for_row_blocks(width, threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        double total = 0.0;
        for (int64_t b = 0; b < n_blocks; ++b) total += sums[b * width + i];
        out[i] = static_cast<float>(total / logits.n_ids);
      }
    });
  };
  mean(mixtures, n_positions, mean_mixture);
  mean(shares, n, mean_share);
}

void mixture_gradient(const Logits& logits, const LogZ& log_z, const Mixture& mixture,
                      const float* hit, const float* target, const float* spread, Threads threads) {
  const KernelTable& table = row_pass_kernels(threads.isa);
  const int64_t n = logits.n_rows;
  std::vector<float> spread_of_row(n);
  for (int64_t i = 0; i < n; ++i) spread_of_row[i] = spread[i / mixture.n_passages];
  const MixtureRows rows{log_z.shift, log_z.log_sum,        mixture.log_prior,
                         target,      spread_of_row.data(), mixture.n_passages};
  const std::vector<double> at_gold = gold_mixture_gradient(logits, rows, hit, table);
  const int64_t scratch_size = table.mixture_scratch(n, mixture.n_passages);
  parallel_for(threads.count, blocks(logits.n_ids, kBlockIds), [&](int64_t block) {
    std::vector<float> scratch(scratch_size);
    table.mixture_gradient(logits, block_ids(logits, block), rows, scratch.data());
  });
  for (int64_t i = 0; i < n; ++i)
    if (logits.gold[i] >= 0) put_gold(logits, i, at_gold[i], table);
}

}  // namespace fastrag

// Parallel loops over blocks of token ids, and the sums over the blocks.
#include "loss/decoding.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "loss/row_pass_kernels.h"
#include "mips/products.h"
#include "pool/thread_pool.h"

namespace fastrag {

void head_products(const float* x, int64_t n, int64_t dim, const MipsMatrix& weight,
                   const LogitHead& head, float* z0, float* log_z, Threads threads) {
  const KernelTable& table = row_pass_kernels(threads.isa);
  const int64_t n_ids = weight.n_rows;
  const int64_t size = products_block(dim, threads.isa), n_blocks = (n_ids + size - 1) / size;
  std::vector<float> max(n_blocks * n), sum(n_blocks * n);
  // The products of a block are still in the cache when their statistics are taken.
  products(x, n, dim, weight, z0, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = begin / size * n + i;
      table.line_statistics(head, z0 + i * n_ids, {begin, end}, &max[at], &sum[at]);
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    float top = -std::numeric_limits<float>::infinity();
    for (int64_t b = 0; b < n_blocks; ++b) top = std::max(top, max[b * n + i]);
    double total = 0.0;
    for (int64_t b = 0; b < n_blocks; ++b)
      // As in row_pass.cpp: NaN if no logit is finite.
      total += sum[b * n + i] * std::exp(double{max[b * n + i]} - top);
    log_z[i] = static_cast<float>(top + std::log(total));
  }
}

void mixture_logp(const float* z0, int64_t n_ids, const LogitHead& head, const float* log_z,
                  const float* log_prior, int64_t n_positions, int64_t n_passages, float* out,
                  Threads threads) {
  constexpr int64_t kBlock = 4096;  // token ids
  const KernelTable& table = row_pass_kernels(threads.isa);
  const int64_t n_rows = n_positions * n_passages, n_blocks = (n_ids + kBlock - 1) / kBlock;
  std::vector<float> shift(n_rows);
  for (int64_t i = 0; i < n_rows; ++i) shift[i] = log_prior[i] - log_z[i];
  parallel_for(threads.count, n_blocks * n_positions, [&](int64_t i) {
    const int64_t g = i % n_positions, begin = i / n_positions * kBlock, row = g * n_passages;
    const IdRange ids{begin, std::min(begin + kBlock, n_ids)};
    const MixtureLines lines{z0 + row * n_ids, n_ids, &shift[row], n_passages};
    table.line_mixture(head, lines, ids, out + g * n_ids);
  });
}

}  // namespace fastrag

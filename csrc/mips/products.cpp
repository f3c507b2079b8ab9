// The products by the tiles of the search.
#include "mips/products.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "mips/mips_kernels.h"
#include "mips/mips_parts.h"
#include "pool/thread_pool.h"

namespace fastrag {
namespace {

constexpr int64_t kBlockBytes = 256 << 10;  // rows that stay in the L2 while panels pass over them

struct PackedPanel {
  int64_t first;  // vector
  int n_vectors;  // of lanes
  Aligned<float> lanes;
};

std::vector<PackedPanel> packed(const float* x, int64_t n, int64_t dim, int64_t width) {
  std::vector<PackedPanel> panels;
  for (int64_t first = 0, left = round_up(n, width) / width; left > 0;) {
    const int n_vectors = left == 1 ? 1 : left == 3 ? 3 : 2;
    const int64_t lanes = n_vectors * width;
    Aligned<float> values(lanes * dim);
    for (int64_t i = 0; i < std::min(lanes, n - first); ++i)
      for (int64_t d = 0; d < dim; ++d) values.data()[d * lanes + i] = x[(first + i) * dim + d];
    panels.push_back({first, n_vectors, std::move(values)});
    first += lanes;
    left -= n_vectors;
  }
  return panels;
}

}  // namespace

int64_t products_block(int64_t dim, Isa isa) {
  const int64_t step = mips_kernels(isa).rows;
  const int64_t row_bytes = std::max<int64_t>(1, dim) * sizeof(float);
  return std::max<int64_t>(1, kBlockBytes / row_bytes / step) * step;
}

void products(const float* x, int64_t n, int64_t dim, const MipsMatrix& matrix, float* out,
              Threads threads, const std::function<void(int64_t begin, int64_t end)>& on_block) {
  const MipsKernels& kernels = mips_kernels(threads.isa);
  const auto* data = static_cast<const float*>(matrix.data);
  const int64_t n_rows = matrix.n_rows, step = kernels.rows;
  const std::vector<PackedPanel> panels = packed(x, n, dim, kernels.width);
  const std::vector<float> no_hits(kMaxPanelLanes, kInfinity);
  const int64_t block = products_block(dim, threads.isa);
  const int64_t n_blocks = (n_rows + block - 1) / block;
  const int64_t n_workers = worth_waking(threads.count, 1.0 * dim * n * n_rows, n_blocks);
  parallel_for(static_cast<int>(n_workers), n_blocks, [&](int64_t i) {
    TileScores scores;
    std::vector<float> tail;  // the last rows, with zeros to fill the tile
    const int64_t end = std::min((i + 1) * block, n_rows);
    for (const PackedPanel& packed_panel : panels) {
      const Panel panel{packed_panel.lanes.data(), no_hits.data()};
      const int64_t lanes = packed_panel.n_vectors * kernels.width;
      const int64_t n_lanes = std::min(lanes, n - packed_panel.first);
      for (int64_t row = i * block; row < end; row += step) {
        const int64_t n_filled = std::min(step, n_rows - row);
        TileRows rows{data + row * matrix.pitch, matrix.pitch, dim, nullptr};
        if (n_filled < step) {
          tail.assign(std::max<int64_t>(1, step * dim), 0.0f);
          for (int64_t r = 0; r < n_filled; ++r)
            std::memcpy(&tail[r * dim], rows.data + r * matrix.pitch, dim * sizeof(float));
          rows = {tail.data(), dim, dim, nullptr};
        }
        const bool more = row + 2 * step <= n_rows;
        rows.ahead = n_filled == step && more ? rows.data + step * matrix.pitch : rows.data;
        kernels.tile[packed_panel.n_vectors - 1](panel, rows, &scores);
        for (int64_t lane = 0; lane < n_lanes; ++lane) {
          float* line = out + (packed_panel.first + lane) * n_rows + row;
          for (int64_t r = 0; r < n_filled; ++r) line[r] = scores.scores[r * lanes + lane];
        }
      }
    }
    on_block(i * block, end);
  });
}

}  // namespace fastrag

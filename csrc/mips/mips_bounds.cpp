// Bounds of what the codes of a row leave out of it, and the codes of leading coordinates.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "mips/mips.h"
#include "mips/mips_parts.h"
#include "mips/products.h"
#include "pool/thread_pool.h"

namespace fastrag {
namespace {

constexpr int64_t kChunkRows = 2048;
constexpr int64_t kMaxDim = 1 << 16;      // a sum of so many products fits 32 bits
constexpr int64_t kPartBytes = 16 << 20;  // of products that are kept at a time
constexpr int kSums = 8;                  // parallel chains of additions

struct Squares {
  double of_row, of_difference;
};

// |x|^2 and |x - offset|^2.
Squares squares_of(const float* x, const float* offset, int64_t dim) {
  double row[kSums] = {}, difference[kSums] = {};
  int64_t d = 0;
  for (; d + kSums <= dim; d += kSums)
    for (int i = 0; i < kSums; ++i) {
      const double z = double{x[d + i]} - offset[d + i];
      row[i] += double{x[d + i]} * x[d + i];
      difference[i] += z * z;
    }
  Squares sum{0.0, 0.0};
  for (; d < dim; ++d) {
    const double z = double{x[d]} - offset[d];
    sum.of_row += double{x[d]} * x[d];
    sum.of_difference += z * z;
  }
  for (int i = 0; i < kSums; ++i) {
    sum.of_row += row[i];
    sum.of_difference += difference[i];
  }
  return sum;
}

}  // namespace

void measure_codes(const MipsMatrix& matrix, const MipsMatrix& codes, int64_t dim,
                   const CodeBounds& bounds, Threads threads) {
  // The float32 result of q . x has D rounding errors.
  if (dim > kMaxDim)
    throw std::invalid_argument("codes: expected at most " + std::to_string(kMaxDim) +
                                " numbers in a row, got " + std::to_string(dim));
  const double gamma = sum_error(dim);
  const int64_t n_blocks = (matrix.n_rows + kChunkRows - 1) / kChunkRows;
  parallel_for(threads.count, n_blocks, [&](int64_t block) {
    const int64_t end = std::min((block + 1) * kChunkRows, matrix.n_rows);
    for (int64_t row = block * kChunkRows; row < end; ++row) {
      const float* x = row_of_matrix(matrix, row);
      const int8_t* code = static_cast<const int8_t*>(codes.data) + row * codes.pitch;
      if (!is_finite(x, dim)) refuse_row(matrix, dim, row);
      double squares = 0.0, code_squares = 0.0, rest_squares = 0.0;
      int32_t sum = 0;
      for (int64_t d = 0; d < dim; ++d) {
        const double rest = x[d] - (codes.offset[d] + double{codes.scale[d]} * code[d]);
        squares += double{x[d]} * x[d];
        code_squares += code[d] * code[d];
        rest_squares += rest * rest;
        sum += code[d];
      }
      bounds.code_norm[row] = rounded_up(std::sqrt(code_squares));
      bounds.rest_norm[row] = rounded_up(std::sqrt(rest_squares) + gamma * std::sqrt(squares));
      bounds.code_sum[row] = sum;
    }
  });
}

void make_lead_codes(const MipsMatrix& matrix, const float* offset, int64_t dim,
                     const LeadCodes& lead, Threads threads) {
  const int64_t n_lead = lead.n_lead;
  std::vector<double> centre(n_lead, 0.0);
  for (int64_t j = 0; j < n_lead; ++j)
    for (int64_t d = 0; d < dim; ++d) centre[j] += double{offset[d]} * lead.rotation[j * dim + d];
  const int64_t block = products_block(dim, threads.isa);
  const int64_t part = round_up(kPartBytes / (n_lead * int64_t{sizeof(float)}), block);
  std::vector<float> out(n_lead * std::min(part, matrix.n_rows));
  for (int64_t first = 0; first < matrix.n_rows; first += part) {
    MipsMatrix rows = matrix;
    rows.data = static_cast<const float*>(matrix.data) + first * matrix.pitch;
    rows.n_rows = std::min(part, matrix.n_rows - first);
    products(
        lead.rotation, n_lead, dim, rows, out.data(), threads, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t row = first + i;
            const float* x = static_cast<const float*>(rows.data) + i * matrix.pitch;
            auto* codes =
                static_cast<int8_t*>(const_cast<void*>(lead.codes.data)) + row * lead.codes.pitch;
            double lead_squares = 0.0, rest_squares = 0.0;
            int32_t code_squares = 0, sum = 0;
            for (int64_t j = 0; j < n_lead; ++j) {
              const double y = double{out[j * rows.n_rows + i]} - centre[j];
              const double exact = std::clamp(y / lead.step, -127.0, 127.0);
              const int code = std::isnan(exact) ? 0 : static_cast<int>(std::nearbyint(exact));
              const double rest = y - lead.step * code;
              codes[j] = static_cast<int8_t>(code);
              lead_squares += y * y;
              rest_squares += rest * rest;
              code_squares += code * code;
              sum += code;
            }
            const Squares squares = squares_of(x, offset, dim);
            const double lost = lead.lost(dim) * std::sqrt(squares.of_row);
            const double surely = std::max(0.0, std::sqrt(lead_squares) - lost);  // at most |P z|
            const double tail =
                squares.of_difference * (1.0 + 1e-12) - (1.0 - lead.defect) * surely * surely;
            // Of |q . x| / |q|, and |q| <= 1.01 |p| + |t(q)|.
            const double other = 1.01 * (lead.defect * std::sqrt(squares.of_difference) +
                                         sum_error(dim) * std::sqrt(squares.of_row));
            double rest = std::sqrt(rest_squares) + lost + other;
            if (!std::isfinite(rest)) rest = kInfinity;  // a product has overflowed
            lead.bounds.code_norm[row] =
                rounded_up(std::max(std::sqrt(1.0 * code_squares), rest / lead.share));
            lead.bounds.rest_norm[row] =
                rounded_up(std::sqrt(std::max(0.0, tail)) + other) + kFloor;
            lead.bounds.code_sum[row] = sum;
          }
        });
  }
}

}  // namespace fastrag

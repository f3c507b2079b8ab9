// Tiles of whole numbers of one width, called as the search through codes calls them.
#include <algorithm>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "checks.h"
#include "expect.h"
#include "mips/mips_kernels.h"

namespace {

using fastrag::DigitKernels;
using fastrag::DigitScores;
using fastrag::Isa;

struct Problem {
  int64_t dim, pitch;
  std::vector<int> digits;  // [lanes, dim]
  std::vector<float> unit, rest, norm, threshold;
  std::vector<int8_t> codes;  // [rows, pitch], of which dim count
  std::vector<float> code_norm, rest_norm;
  std::vector<int32_t> code_sum;

  Problem(int64_t dim, int64_t lanes, int64_t rows, std::mt19937* random)
      : dim(dim),
        pitch((dim + 15) / 16 * 16),
        digits(lanes * dim),
        codes(rows * pitch),
        code_sum(rows) {
    const auto whole = [&](int low, int high) {
      return low + static_cast<int>((*random)() % (high - low + 1));
    };
    std::generate(digits.begin(), digits.end(), [&] { return whole(-127, 127); });
    std::generate(codes.begin(), codes.end(), [&] { return whole(-128, 127); });
    // the sums that come nearest to overflow; below, an upper bound that is NaN
    std::fill_n(digits.begin(), dim, whole(0, 1) ? 127 : -127);
    std::fill_n(codes.begin(), dim, -128);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < dim; ++d) code_sum[r] += codes[r * pitch + d];
    std::normal_distribution<float> normal;
    for (std::vector<float>* line : {&unit, &rest, &norm, &threshold, &code_norm, &rest_norm}) {
      line->resize(std::max(lanes, rows));
      std::generate(line->begin(), line->end(), [&] { return normal(*random); });
    }
    unit[1] = rest[1] = std::numeric_limits<float>::infinity();
    threshold[3] = -std::numeric_limits<float>::infinity();
    threshold[2] = std::numeric_limits<float>::infinity();
  }

  // Of a panel of n_vectors, or of the first n_few queries with `width` rows.
  std::vector<float> run(const DigitKernels& kernels, int n_vectors) const {
    const int64_t lanes = n_vectors * kernels.width;
    return run(kernels.tile[n_vectors - 1], packed(lanes, 4, kernels.bias), kernels.rows, lanes);
  }
  std::vector<float> run_few(const DigitKernels& kernels, int size) const {
    const int64_t n_few = int64_t{1} << size;
    return run(kernels.few[size], packed(n_few, 4 * kernels.width, kernels.bias), n_few,
               kernels.width);
  }

 private:
  std::vector<uint8_t> packed(int64_t n_queries, int64_t piece, int bias) const {
    std::vector<uint8_t> found((dim + piece - 1) / piece * piece * n_queries);
    for (int64_t i = 0; i < n_queries; ++i)
      for (int64_t d = 0; d < dim; ++d)
        found[(d / piece * n_queries + i) * piece + d % piece] =
            static_cast<uint8_t>(digits[i * dim + d] + bias);
    return found;
  }

  // Hits, then the bounds.
  std::vector<float> run(bool (*tile)(const fastrag::DigitPanel&, const fastrag::CodeRows&,
                                      DigitScores*),
                         const std::vector<uint8_t>& packed, int64_t lines, int64_t lanes) const {
    DigitScores scores;
    const bool any = tile(
        {packed.data(), unit.data(), rest.data(), norm.data(), threshold.data()},
        {codes.data(), pitch, dim, code_norm.data(), rest_norm.data(), code_sum.data()}, &scores);
    std::vector<float> found{any ? 1.0f : 0.0f};
    found.insert(found.end(), scores.hits, scores.hits + lines);
    found.insert(found.end(), scores.upper, scores.upper + lines * lanes);
    found.insert(found.end(), scores.lower, scores.lower + lines * lanes);
    return found;
  }
};

}  // namespace

void run_digits() {
  const DigitKernels& scalar = *fastrag::scalar_digit_kernels();
  std::mt19937 random(0);
  for (const Isa isa : {Isa::kNeon, Isa::kDotprod}) {
    if (!fastrag::has_isa(isa)) continue;
    const DigitKernels& kernels =
        *(isa == Isa::kNeon ? fastrag::neon_digit_kernels() : fastrag::dotprod_digit_kernels());
    for (int64_t dim = 1; dim < 200; dim += dim < 70 ? 1 : 37)
      for (const int size : {0, 1}) {
        const Problem problem(dim, 2 * scalar.width, scalar.rows, &random);
        const std::string what = std::string(fastrag::isa_name(isa)) + ", dim " +
                                 std::to_string(dim) + ", size " + std::to_string(size);
        expect_same(problem.run(kernels, size + 1), problem.run(scalar, size + 1), what);
        expect_same(problem.run_few(kernels, size), problem.run_few(scalar, size), what + ", few");
      }
  }
}

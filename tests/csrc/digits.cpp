// Tiles of whole numbers of one width, called as the search through codes calls them.
#include <algorithm>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "expect.h"
#include "mips/mips_kernels.h"
#include "mips/tiles.h"

namespace {

using fastrag::DigitKernels;
using fastrag::DigitScores;
using fastrag::Isa;

// As many as fill tiles of every size.
constexpr int64_t kQueries = 32, kRows = 32;

struct Problem {
  int64_t dim, pitch;
  std::vector<int> digits;  // [kQueries, dim]
  std::vector<float> unit, rest, norm, threshold;
  std::vector<int8_t> codes;  // [kRows, pitch], of which dim count
  std::vector<float> code_norm, rest_norm;
  std::vector<int32_t> code_sum;

  Problem(int64_t dim, std::mt19937* random)
      : dim(dim), pitch((dim + 15) / 16 * 16), digits(kQueries * dim), code_sum(kRows) {
    const auto whole = [&](int low, int high) {
      return low + static_cast<int>((*random)() % (high - low + 1));
    };
    codes.resize(kRows * pitch + 64);  // the last row is read to a multiple of 64
    std::generate(digits.begin(), digits.end(), [&] { return whole(-127, 127); });
    std::generate(codes.begin(), codes.end(), [&] { return whole(-128, 127); });
    // the sums that come nearest to overflow; below, an upper bound that is NaN
    std::fill_n(digits.begin(), dim, whole(0, 1) ? 127 : -127);
    std::fill_n(codes.begin(), dim, -128);
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t d = 0; d < dim; ++d) code_sum[r] += codes[r * pitch + d];
    std::normal_distribution<float> normal;
    for (std::vector<float>* line : {&unit, &rest, &norm, &threshold, &code_norm, &rest_norm}) {
      line->resize(kQueries);
      std::generate(line->begin(), line->end(), [&] { return normal(*random); });
    }
    unit[1] = rest[1] = std::numeric_limits<float>::infinity();
    threshold[3] = -std::numeric_limits<float>::infinity();
    threshold[2] = std::numeric_limits<float>::infinity();
  }

  // The hit and the bounds of each row with each query, by panels of n_vectors.
  std::vector<float> run(const DigitKernels& kernels, int n_vectors) const {
    const int64_t lanes = n_vectors * kernels.width;
    std::vector<float> found(3 * kRows * kQueries);
    if (kernels.enter) kernels.enter();
    for (int64_t query = 0; query < kQueries; query += lanes)
      for (int64_t row = 0; row < kRows; row += kernels.rows) {
        DigitScores scores;
        const bool any = call(kernels.tile[n_vectors - 1], packed(query, lanes, 4, kernels), query,
                              row, &scores);
        bool hit = false;
        for (int64_t r = 0; r < kernels.rows; ++r)
          for (int64_t i = 0; i < lanes; ++i) {
            float* pair = &found[((row + r) * kQueries + query + i) * 3];
            pair[0] = scores.hits[r] >> i & 1;
            pair[1] = scores.upper[r * lanes + i];
            pair[2] = scores.lower[r * lanes + i];
            hit |= pair[0] != 0.0f;
          }
        expect(any == hit, "a tile with hits says so");
      }
    if (kernels.leave) kernels.leave();
    return found;
  }

  // Hits, then the bounds, of `width` rows with 2^size queries.
  std::vector<float> run_few(const DigitKernels& kernels, int size) const {
    const int64_t n = int64_t{1} << size;
    DigitScores scores;
    const bool any =
        call(kernels.few[size], packed(0, n, 4 * kernels.width, kernels), 0, 0, &scores);
    std::vector<float> found{any ? 1.0f : 0.0f};
    found.insert(found.end(), scores.hits, scores.hits + n);
    found.insert(found.end(), scores.upper, scores.upper + n * kernels.width);
    found.insert(found.end(), scores.lower, scores.lower + n * kernels.width);
    return found;
  }

 private:
  std::vector<uint8_t> packed(int64_t first, int64_t n_queries, int64_t piece,
                              const DigitKernels& kernels) const {
    const int64_t depth = std::max<int64_t>(piece, kernels.depth);
    std::vector<uint8_t> found((dim + depth - 1) / depth * depth * n_queries);
    for (int64_t i = 0; i < n_queries; ++i)
      for (int64_t d = 0; d < dim; ++d)
        found[(d / piece * n_queries + i) * piece + d % piece] =
            static_cast<uint8_t>(digits[(first + i) * dim + d] + kernels.bias);
    return found;
  }

  bool call(fastrag::DigitTile tile, const std::vector<uint8_t>& packed, int64_t query, int64_t row,
            DigitScores* scores) const {
    return tile({packed.data(), &unit[query], &rest[query], &norm[query], &threshold[query]},
                {&codes[row * pitch], pitch, dim, &code_norm[row], &rest_norm[row], &code_sum[row]},
                scores);
  }
};

bool wrong_tile(const fastrag::DigitPanel& panel, const fastrag::CodeRows& rows, DigitScores* out) {
  const bool any = fastrag::emulated_amx_digit_kernels()->tile[1](panel, rows, out);
  out->upper[1023] += 1.0f;  // the last row with the last query
  return any;
}

// Tiles that the system or a wrong product keeps from use, and registers without a configuration.
void run_refusals() {
  const DigitKernels& tiles = *fastrag::emulated_amx_digit_kernels();
  const auto allowed = [] { return true; };
  expect(!fastrag::why_no_tiles(allowed, tiles), "tiles that multiply right are used");
  DigitKernels wrong = tiles;
  wrong.tile[1] = wrong_tile;
  expect(std::string(fastrag::why_no_tiles(allowed, wrong)) == "its products are wrong here",
         "tiles that multiply wrong are not used");
  const char* why = fastrag::why_no_tiles([] { return false; }, wrong);
  expect(std::string(why) == "the operating system refuses tiles", "a refusal is told");
  // Where the processor has no tiles, so does the system.
  if (!fastrag::has_isa(Isa::kAvx512)) expect(!fastrag::allow_tiles(), "the system has no tiles");
  bool refused = false;
  DigitKernels released = tiles;
  released.enter = nullptr;
  try {
    fastrag::multiplies_right(released);
  } catch (const std::logic_error&) {
    refused = true;
  }
  expect(refused, "registers without a configuration");
}

}  // namespace

void run_digits() {
  const DigitKernels& scalar = *fastrag::scalar_digit_kernels();
  std::vector<std::pair<std::string, const DigitKernels*>> others = {
      {"emulated tiles", fastrag::emulated_amx_digit_kernels()}};
  if (fastrag::has_isa(Isa::kAmx)) others.emplace_back("tiles", fastrag::amx_digit_kernels());
  if (fastrag::has_isa(Isa::kNeon)) others.emplace_back("neon", fastrag::neon_digit_kernels());
  if (fastrag::has_isa(Isa::kDotprod))
    others.emplace_back("dotprod", fastrag::dotprod_digit_kernels());
  std::mt19937 random(0);
  for (const auto& [name, kernels] : others)
    for (int64_t dim = 1; dim < 200; dim += dim < 70 ? 1 : 37)
      for (const int size : {0, 1}) {
        const Problem problem(dim, &random);
        const std::string what =
            name + ", dim " + std::to_string(dim) + ", size " + std::to_string(size);
        expect_same(problem.run(*kernels, size + 1), problem.run(scalar, size + 1), what);
        if (kernels->width != scalar.width) continue;  // their lines are others
        expect_same(problem.run_few(*kernels, size), problem.run_few(scalar, size), what + ", few");
      }
  run_refusals();
}

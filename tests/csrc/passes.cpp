#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "checks.h"
#include "expect.h"
#include "loss/row_pass_kernels.h"

namespace {

using fastrag::Bfloat16;
using fastrag::Isa;
using fastrag::KernelTable;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<std::pair<std::string, const KernelTable*>> fused_kernels() {
  std::vector<std::pair<std::string, const KernelTable*>> found;
  const auto take = [&](Isa isa, const KernelTable* table) {
    if (fastrag::has_isa(isa)) found.emplace_back(fastrag::isa_name(isa), table);
  };
#ifdef __FP_FAST_FMAF
  take(Isa::kScalar, fastrag::scalar_kernels());
#endif
  take(Isa::kAvx2, fastrag::avx2_kernels());
  take(Isa::kAvx512, fastrag::avx512_kernels());
  take(Isa::kNeon, fastrag::neon_kernels());
  return found;
}

std::vector<float> widened(const std::vector<float>& x) { return x; }

std::vector<float> widened(const std::vector<Bfloat16>& x) {
  std::vector<float> found(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i].bits) << 16;
    std::memcpy(&found[i], &bits, 4);
  }
  return found;
}

struct Shape {
  int64_t n_ids, n_positions, n_passages, gap;
  float softcap;
  bool with_bias;
};

// Buffers that end with the data.
class Problem {
 public:
  explicit Problem(const Shape& shape, std::mt19937* random)
      : shape_(shape),
        n_rows_(shape.n_positions * shape.n_passages),
        pitch_(n_rows_ + shape.gap),
        size_((shape.n_ids - 1) * pitch_ + n_rows_),
        z0_(size_),
        bias_(shape.n_ids),
        per_row_(6 * n_rows_) {
    std::normal_distribution<float> normal;
    const auto number = [&] { return normal(*random); };
    std::generate(z0_.begin(), z0_.end(), [&] { return 8.0f * number(); });
    std::generate(bias_.begin(), bias_.end(), number);
    std::generate(per_row_.begin(), per_row_.end(), number);
    // numbers that a head may well give, and one that it should not
    const float far[] = {
        -kInfinity, 300.0f, -300.0f, 0.0f, -0.0f, 1e-42f, std::numeric_limits<float>::quiet_NaN()};
    for (const float value : far)
      if ((*random)() % 3 == 0) z0_[(*random)() % size_] = value;
  }

  // The results of all passes, in their order, for both types of the buffer.
  std::vector<std::vector<float>> run(const KernelTable& table) const {
    const fastrag::IdRange ids{0, shape_.n_ids};
    std::vector<Bfloat16> rounded(z0_.size());
    table.to_bfloat16(z0_.data(), rounded.data(), z0_.size());
    std::vector<std::vector<float>> found = of_buffer(table, z0_);
    for (auto& each : of_buffer(table, rounded)) found.push_back(std::move(each));
    std::vector<float> capped = bias_;
    table.softcap(3.0f, capped.data(), capped.size());
    const int64_t n_passages = shape_.n_passages;
    const std::vector<float> lines(z0_.begin(), z0_.begin() + n_passages * shape_.n_ids);
    const fastrag::LogitHead head{shape_.with_bias ? bias_.data() : nullptr, 0.7f, shape_.softcap};
    std::vector<float> line_mixture(shape_.n_ids);
    table.line_mixture(head, {lines.data(), shape_.n_ids, per_row(0), n_passages}, ids,
                       line_mixture.data());
    float line_max, line_sum;  // the order of this sum depends on the width of a vector
    table.line_statistics(head, lines.data(), ids, &line_max, &line_sum);
    found.push_back(std::move(capped));
    found.push_back(std::move(line_mixture));
    return found;
  }

 private:
  template <class T>
  std::vector<std::vector<float>> of_buffer(const KernelTable& table,
                                            const std::vector<T>& given) const {
    const int64_t n = n_rows_;
    const fastrag::IdRange ids{0, shape_.n_ids};
    std::vector<T> z0 = given, gradient = given, mixture_gradient = given;
    std::vector<float> max(n), sum(n), centred(n), mixture(shape_.n_positions), share(n);
    std::vector<float> scratch(table.mixture_scratch(n, shape_.n_passages));
    table.statistics(logits(&z0), ids, max.data(), sum.data(), centred.data());
    table.mixture_statistics(logits(&z0), ids, rows(), mixture.data(), share.data(),
                             scratch.data());
    table.gradient(logits(&gradient), ids, {per_row(0), per_row(1), per_row(2)});
    table.mixture_gradient(logits(&mixture_gradient), ids, rows(), scratch.data());
    return {max, sum, centred, mixture, share, widened(gradient), widened(mixture_gradient)};
  }

  const float* per_row(int i) const { return &per_row_[i * n_rows_]; }
  fastrag::MixtureRows rows() const {
    return {per_row(0), per_row(1), per_row(2), per_row(3), per_row(4), shape_.n_passages};
  }
  template <class T>
  fastrag::Logits logits(std::vector<T>* z0) const {
    const float* bias = shape_.with_bias ? bias_.data() : nullptr;
    constexpr bool kBfloat16 = std::is_same<T, Bfloat16>::value;
    return {z0->data(), kBfloat16, shape_.n_ids,   n_rows_, pitch_,
            bias,       0.7f,      shape_.softcap, nullptr};
  }

  const Shape shape_;
  const int64_t n_rows_, pitch_, size_;
  std::vector<float> z0_, bias_, per_row_;
};

void check_functions(const std::string& name, const KernelTable& table, const KernelTable& first) {
  std::vector<float> x = {0.0f, -0.0f, kInfinity, -kInfinity, -87.33f, -87.34f, 0.625f, 1e-42f};
  for (float at = 1e-6f; at < 3e38f; at *= 1.003f) x.push_back(at);
  for (const char* function : {"exp", "log", "tanh", "sech2"}) {
    std::vector<float> in = x;
    for (float& value : in) {
      if (function[0] == 'e') value = std::min(value, 88.0f) - (value > 1.0f ? 90.0f : 0.0f);
      if (function[0] == 'l') value = std::max(value, 1.0f);
    }
    std::vector<float> found(in.size()), expected(in.size());
    table.elementwise(function, in.data(), found.data(), in.size());
    first.elementwise(function, in.data(), expected.data(), in.size());
    expect_same(found, expected, name + ", " + function);
  }
}

}  // namespace

void run_passes() {
  const auto tables = fused_kernels();
  std::mt19937 random(0);
  for (int i = 0; i < 40; ++i) {
    const auto draw = [&](int64_t low, int64_t high) {
      return low + static_cast<int64_t>(random() % (high - low + 1));
    };
    const Shape shape{draw(1, 40), draw(1, i % 5 ? 9 : 40), draw(1, 6),
                      draw(0, 3),  i % 2 ? 5.0f : 0.0f,     i % 3 == 0};
    const Problem problem(shape, &random);
    for (size_t t = 1; t < tables.size(); ++t) {
      const auto found = problem.run(*tables[t].second), expected = problem.run(*tables[0].second);
      for (size_t pass = 0; pass < found.size(); ++pass)
        expect_same(found[pass], expected[pass],
                    "problem " + std::to_string(i) + " with " + tables[t].first + ", result " +
                        std::to_string(pass));
    }
  }
  for (const auto& [name, table] : tables) check_functions(name, *table, *tables[0].second);
}

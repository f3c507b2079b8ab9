// Helpers of both searches, of the matrix itself and through codes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "mips/mips.h"
#include "mips/mips_kernels.h"

namespace fastrag {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kWorkOfAThread = 1 << 20;  // multiplications for which waking a thread pays

inline const MipsKernels& mips_kernels(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
    case Isa::kAmx:
      return *avx512_mips_kernels();
    case Isa::kAvx2:
#if defined(__x86_64__) || defined(__i386__)
      // float16 is a separate extension, which all known machines with AVX2 have
      if (!__builtin_cpu_supports("f16c")) return *scalar_mips_kernels();
#endif
      return *avx2_mips_kernels();
    case Isa::kNeon:
    case Isa::kDotprod:
      return *neon_mips_kernels();
    default:
      return *scalar_mips_kernels();
  }
}

// Added to bounds through codes. Its square exceeds what products of denormals lose.
constexpr float kFloor = 1e-18f;

// Returns an upper bound of x that includes the rounding errors of a few float32 operations.
inline float rounded_up(double x) { return static_cast<float>(x * (1.0 + 1e-5)); }

inline const float* row_of_matrix(const MipsMatrix& matrix, int64_t row) {
  return static_cast<const float*>(matrix.data) + row * matrix.pitch;
}

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// n zeros from the start of a cache line on. A load of 64 bytes then reads one line instead of two.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t n = 0)
      : room_(n + kLine / sizeof(T)),
        first_((kLine - reinterpret_cast<uintptr_t>(room_.data()) % kLine) % kLine / sizeof(T)) {}
  Aligned(Aligned&&) = default;  // a copy would begin elsewhere in its line
  Aligned& operator=(Aligned&&) = default;

  T* data() { return room_.data() + first_; }
  const T* data() const { return room_.data() + first_; }

 private:
  static constexpr size_t kLine = 64;

  std::vector<T> room_;
  size_t first_;
};

inline bool is_finite(const float* x, int64_t n) {
  return std::all_of(x, x + n, [](float value) { return std::isfinite(value); });
}

// The score in the upper half and the complement of the row in the lower half, so that the better
// candidate has the larger key.
inline uint64_t key_of(float score, int64_t row) {
  score += 0.0f;  // -0 ties with 0
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t{bits} << 32 | ~static_cast<uint32_t>(row);
}

inline float score_of(uint64_t key) {
  uint32_t bits = static_cast<uint32_t>(key >> 32);
  bits = bits >> 31 ? bits & 0x7fffffffu : ~bits;
  float score;
  std::memcpy(&score, &bits, 4);
  return score;
}

inline int64_t row_of(uint64_t key) { return ~static_cast<uint32_t>(key); }

inline int64_t element_bytes(Storage storage) {
  return storage == Storage::kFloat32 ? 4 : storage == Storage::kInt8 ? 1 : 2;
}

inline StoredRows rows_from(const MipsMatrix& matrix, int64_t dim, int64_t row) {
  const auto* bytes = static_cast<const char*>(matrix.data);
  return {bytes + row * matrix.pitch * element_bytes(matrix.storage), matrix.pitch, dim,
          matrix.scale, matrix.offset};
}

// Throws the error for a row whose score with some query is not finite.
[[noreturn]] inline void refuse_row(const MipsMatrix& matrix, int64_t dim, int64_t row) {
  std::vector<float> values(dim);
  const StoredRows rows = rows_from(matrix, dim, row);
  scalar_mips_kernels()->widen[static_cast<int>(matrix.storage)](rows, 1, values.data());
  if (is_finite(values.data(), dim))
    throw std::invalid_argument(
        "index_emb: expected inner products within float32 range, got an overflow in row " +
        std::to_string(row));
  throw std::invalid_argument("index_emb: expected finite values, got NaN or infinity in row " +
                              std::to_string(row));
}

// Writes the best k of the keys of one query, sorting them in place.
inline void write_answer(const MipsQuestion& question, int64_t query, std::vector<uint64_t>* keys,
                         const MipsAnswer& answer) {
  const int64_t k = question.k, n = std::min<int64_t>(k, keys->size());
  std::partial_sort(keys->begin(), keys->begin() + n, keys->end(), std::greater<uint64_t>());
  float* scores = answer.scores + query * k;
  int64_t* rows = answer.rows + query * k;
  for (int64_t i = 0; i < n; ++i) {
    scores[i] = score_of((*keys)[i]);
    rows[i] = row_of((*keys)[i]);
  }
  std::fill(scores + n, scores + k, -kInfinity);
  std::fill(rows + n, rows + k, -1);
}

inline int64_t worth_waking(int64_t n_threads, double work, int64_t n_tasks) {
  const int64_t workers = std::min(n_threads, std::min(n_tasks, int64_t(work / kWorkOfAThread)));
  return std::max<int64_t>(1, workers);
}

inline void check_queries(const MipsQuestion& question) {
  for (int64_t b = 0; b < question.n_queries; ++b)
    if (!is_finite(question.query_emb + b * question.dim, question.dim))
      throw std::invalid_argument("query_emb: expected finite values, got NaN or infinity in row " +
                                  std::to_string(b));
}

// The excluded rows of a group of queries.
class Exclusions {
 public:
  Exclusions(const MipsQuestion& question, int64_t first_query, int64_t n_queries)
      : removed_(question.removed), n_(question.n_exclude) {
    if (n_ == 0) return;
    sorted_.assign(question.exclude + first_query * n_,
                   question.exclude + (first_query + n_queries) * n_);
    for (auto line = sorted_.begin(); line != sorted_.end(); line += n_) std::sort(line, line + n_);
  }

  bool allow(int64_t query, int64_t row) const {
    if (removed_ && removed_[row]) return false;
    const auto line = sorted_.begin() + query * n_;
    return !std::binary_search(line, line + n_, row);
  }

 private:
  const bool* removed_;
  const int64_t n_;
  std::vector<int64_t> sorted_;  // [n_queries, n_]
};

}  // namespace fastrag

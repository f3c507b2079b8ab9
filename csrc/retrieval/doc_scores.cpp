#include "retrieval/doc_scores.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "mips/mips_parts.h"
#include "pool/thread_pool.h"

namespace fastrag {
namespace {

constexpr int64_t kLine = 16;           // floats of a cache line
constexpr int64_t kPairsOfATask = 8;    // pairs of a query and a row per task
constexpr int64_t kLeastColumns = 256;  // least number of columns of dquery per task
constexpr double kWorkOfAnExp = 16.0;   // cost of an exp, in multiplications
constexpr double kWorkOfARead = 4.0;    // cost of reading an element of a row, in multiplications

// Reads columns [first, first + n) of rows of the matrix as float32.
class Reader {
 public:
  Reader(const MipsMatrix& matrix, int64_t first, int64_t n, Isa isa)
      : matrix_(matrix),
        first_(first),
        n_(n),
        widen_(mips_kernels(isa).widen[static_cast<int>(matrix.storage)]) {}

  // Returns float32 rows in place, and others converted in `buffer` [n]. Prefetches row `next`.
  const float* read(int64_t row, int64_t next, float* buffer) const {
    if (matrix_.storage == Storage::kFloat32) return at(row);
    StoredRows one = rows_from(matrix_, n_, row);
    one.data = static_cast<const char*>(one.data) + first_ * element_bytes(matrix_.storage);
    one.pitch *= next - row;  // kernels prefetch one pitch ahead
    if (one.scale) {
      one.scale += first_;
      one.offset += first_;
    }
    widen_(one, 1, buffer);
    return buffer;
  }

  const float* at(int64_t row) const {  // of float32
    return static_cast<const float*>(matrix_.data) + row * matrix_.pitch + first_;
  }

 private:
  const MipsMatrix& matrix_;
  const int64_t first_, n_;
  void (*const widen_)(const StoredRows&, int64_t, float*);
};

void score_pairs(const ScoredRows& scored, int64_t first, int64_t last, Isa isa, float* scores) {
  const int64_t dim = scored.dim;
  const Reader reader(scored.matrix, 0, dim, isa);
  const auto dot = mips_kernels(isa).dot;
  const bool in_place = scored.matrix.storage == Storage::kFloat32;
  std::vector<float> buffer(in_place ? 0 : dim);
  for (int64_t p = first; p < last; ++p) {
    const int64_t row = scored.rows[p];
    if (row < 0) {
      scores[p] = -kInfinity;
      continue;
    }
    // Rows are scattered, so the processor cannot predict the next one.
    const int64_t after = p + 1 < scored.n_pairs() ? scored.rows[p + 1] : -1;
    const int64_t next = after < 0 ? row : after;
    const float* query = scored.query_emb + p / scored.n_passages * dim;
    const float* x = reader.read(row, next, buffer.data());
    scores[p] = dot(query, x, in_place ? reader.at(next) : x, dim) / scored.tau;
  }
}

// As in torch, a NaN or an infinity makes all results NaN, except those of missing passages.
void log_softmax(const float* scores, const int64_t* rows, int64_t n, float* out) {
  float largest = -kInfinity;
  for (int64_t k = 0; k < n; ++k) largest = std::max(largest, scores[k]);
  double sum = 0.0;
  for (int64_t k = 0; k < n; ++k)
    if (rows[k] >= 0) sum += std::exp(scores[k] - largest);
  const float log_sum = static_cast<float>(std::log(sum));
  for (int64_t k = 0; k < n; ++k) out[k] = rows[k] < 0 ? -kInfinity : scores[k] - largest - log_sum;
}

void score_gradient(const ScoredRows& scored, const float* log_prior,
                    const ScoreGradients& upstream, int64_t query, float* ds) {
  const int64_t n = scored.n_passages, first = query * n;
  double sum = 0.0;
  if (upstream.dlog_prior)
    for (int64_t p = first; p < first + n; ++p)
      if (log_prior[p] != -kInfinity) sum += upstream.dlog_prior[p];
  for (int64_t p = first; p < first + n; ++p) {
    float g = 0.0f;
    if (log_prior[p] != -kInfinity) {
      if (upstream.dscores) g = upstream.dscores[p];
      if (upstream.dlog_prior)
        g += upstream.dlog_prior[p] - std::exp(log_prior[p]) * static_cast<float>(sum);
    }
    ds[p] = g / scored.tau;
  }
}

// Computes columns of dquery of one query.
void add_rows(const ScoredRows& scored, const float* ds, int64_t query, int64_t first, int64_t n,
              Isa isa, float* dquery) {
  const Reader reader(scored.matrix, first, n, isa);
  std::vector<float> buffer(scored.matrix.storage == Storage::kFloat32 ? 0 : kAdded * n);
  std::vector<int64_t> present;
  present.reserve(scored.n_passages);
  for (int64_t p = query * scored.n_passages; p < (query + 1) * scored.n_passages; ++p)
    if (scored.rows[p] >= 0) present.push_back(p);
  const int64_t count = present.size();
  const auto read = [&](int64_t i) {
    const int64_t next = std::min(i + 1, count - 1);
    return reader.read(scored.rows[present[i]], scored.rows[present[next]],
                       buffer.data() + (buffer.empty() ? 0 : i % kAdded * n));
  };
  std::fill(dquery, dquery + n, 0.0f);
  const auto add_scaled = mips_kernels(isa).add_scaled;
  int64_t i = 0;
  for (; i + kAdded <= count; i += kAdded) {
    const float* rows[kAdded];
    float factors[kAdded];
    for (int64_t j = 0; j < kAdded; ++j) {
      rows[j] = read(i + j);
      factors[j] = ds[present[i + j]];
    }
    add_scaled(factors, rows, n, dquery);
  }
  for (; i < count; ++i) {
    const float* x = read(i);
    const float g = ds[present[i]];
    for (int64_t d = 0; d < n; ++d) dquery[d] += g * x[d];
  }
}

}  // namespace

void doc_scores(const ScoredRows& scored, float* scores, float* log_prior, Threads threads) {
  const int64_t n_pairs = scored.n_pairs(), n_tasks = (n_pairs + kPairsOfATask - 1) / kPairsOfATask;
  parallel_for(worth_waking(threads.count, kWorkOfARead * n_pairs * scored.dim, n_tasks), n_tasks,
               [&](int64_t i) {
                 const int64_t first = i * kPairsOfATask;
                 const int64_t last = std::min(first + kPairsOfATask, n_pairs);
                 score_pairs(scored, first, last, threads.isa, scores);
               });
  const int64_t n = scored.n_passages;
  parallel_for(
      worth_waking(threads.count, kWorkOfAnExp * n_pairs, scored.n_queries), scored.n_queries,
      [&](int64_t b) { log_softmax(scores + b * n, scored.rows + b * n, n, log_prior + b * n); });
}

void doc_scores_backward(const ScoredRows& scored, const float* log_prior,
                         const ScoreGradients& upstream, float* dquery, float* dpassage,
                         Threads threads) {
  const int64_t n_queries = scored.n_queries, dim = scored.dim;
  const double work = kWorkOfARead * scored.n_pairs() * dim;
  std::vector<float> ds(scored.n_pairs());
  parallel_for(worth_waking(threads.count, kWorkOfAnExp * scored.n_pairs(), n_queries), n_queries,
               [&](int64_t b) { score_gradient(scored, log_prior, upstream, b, ds.data()); });
  if (dquery) {
    // With few queries, the columns, which are independent sums, are divided among tasks.
    const int64_t cuts = std::max<int64_t>(
        1, std::min(dim / kLeastColumns, threads.count / std::max<int64_t>(n_queries, 1)));
    const int64_t width = round_up((dim + cuts - 1) / cuts, kLine), n_tasks = n_queries * cuts;
    parallel_for(worth_waking(threads.count, work, n_tasks), n_tasks, [&](int64_t i) {
      const int64_t b = i / cuts, first = i % cuts * width, n = std::min(width, dim - first);
      if (n > 0) add_rows(scored, ds.data(), b, first, n, threads.isa, dquery + b * dim + first);
    });
  }
  if (dpassage)
    parallel_for(worth_waking(threads.count, work, scored.n_pairs()), scored.n_pairs(),
                 [&](int64_t p) {
                   const float* query = scored.query_emb + p / scored.n_passages * dim;
                   float* out = dpassage + p * dim;
                   if (scored.rows[p] < 0)
                     std::fill(out, out + dim, 0.0f);
                   else
                     for (int64_t d = 0; d < dim; ++d) out[d] = ds[p] * query[d];
                 });
}

}  // namespace fastrag

// The search through codes: bounds for every row, then exact scores of the rows that may be among
// the best.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "mips/mips.h"
#include "mips/mips_kernels.h"
#include "mips/mips_parts.h"
#include "pool/thread_pool.h"

namespace fastrag {
namespace {

constexpr int64_t kBlockBytes = 256 << 10;
constexpr int64_t kChunkRows = 2048;
constexpr int64_t kGroupQueries = 256;
constexpr int64_t kMaxDim = 1 << 16;   // a sum of so many products fits 32 bits
constexpr double kRounder = 0x1.8p52;  // adding and subtracting it rounds to an integer
constexpr int64_t kFirstRoom = 64;  // initial capacity for candidates besides that for the k best

const DigitKernels& digit_kernels(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return *scalar_digit_kernels();
    case Isa::kEmulatedAmx:
      return *emulated_amx_digit_kernels();
    case Isa::kAmx:
      return *amx_digit_kernels();
    case Isa::kNeon:
      return *neon_digit_kernels();
    case Isa::kDotprod:
      return *dotprod_digit_kernels();
    case Isa::kAvx512:
#if defined(__x86_64__) || defined(__i386__)
      if (vnni_digit_kernels() && __builtin_cpu_supports("avx512vnni"))
        return *vnni_digit_kernels();
#endif
      break;
    default:
      break;
  }
  return *avx2_digit_kernels();
}

// Returns an upper bound of x that includes the rounding errors of a few float32 operations.
float rounded_up(double x) { return static_cast<float>(x * (1.0 + 1e-5)); }

const float* row_of_matrix(const MipsMatrix& matrix, int64_t row) {
  return static_cast<const float*>(matrix.data) + row * matrix.pitch;
}

struct Candidate {
  // Bounds are useless if one of them has overflowed.
  Candidate(float upper, float lower, int64_t row)
      : upper(std::isnan(upper) ? kInfinity : upper),
        lower(std::isnan(lower) ? -kInfinity : lower),
        row(static_cast<uint32_t>(row)) {}

  float upper, lower;
  uint32_t row;
};

// The rows of one query that may be among its best k, and the threshold for further rows.
class CandidateRows {
 public:
  explicit CandidateRows(int64_t k) : k_(k), room_(2 * k + kFirstRoom) {}

  float threshold() const { return threshold_; }
  std::vector<Candidate>& rows() { return rows_; }

  void add(const Candidate& candidate) {
    rows_.push_back(candidate);
    if (static_cast<int64_t>(rows_.size()) < room_) return;
    prune();
    room_ = std::max<int64_t>(room_, 2 * rows_.size());
  }

  void add_all(const CandidateRows& other) {
    threshold_ = std::max(threshold_, other.threshold_);
    rows_.insert(rows_.end(), other.rows_.begin(), other.rows_.end());
  }

  // k rows score at least as much as the k-th largest lower bound.
  void prune() {
    if (static_cast<int64_t>(rows_.size()) > k_) {
      std::nth_element(rows_.begin(), rows_.begin() + k_ - 1, rows_.end(),
                       [](const Candidate& a, const Candidate& b) { return a.lower > b.lower; });
      threshold_ = std::max(threshold_, rows_[k_ - 1].lower);
    }
    const auto beaten = [&](const Candidate& x) { return x.upper < threshold_; };
    rows_.erase(std::remove_if(rows_.begin(), rows_.end(), beaten), rows_.end());
  }

 private:
  int64_t k_;
  int64_t room_;
  std::vector<Candidate> rows_;
  float threshold_ = -kInfinity;
};

// A tile of codes that were copied from any rows, padded with zeros.
struct CopiedRows {
  std::vector<int8_t> codes;
  std::vector<float> code_norm, rest_norm;
  std::vector<int32_t> code_sum;
};

struct Worker {
  std::vector<CandidateRows> candidates;  // [n_queries]
  std::vector<float> thresholds;          // [n_lanes]
  DigitScores scores;
  CopiedRows tail;
};

// The place of the digits of a query: pieces of `size` bytes, `step` bytes apart.
struct Pieces {
  uint8_t* first;
  int64_t size, step;
};

// The result of rounding weights: the value of a digit of 1, and the norms of digits and rest.
struct Rounding {
  float unit;
  double digits, rest;

  // The largest error per |code|: the rest, and the float32 rounding of integer sums beyond 2^24
  // and of the bounds.
  float slack() const { return rounded_up(rest + 1e-6 * unit * digits); }
};

// Rounds weights to multiples of a unit, writes these as digits, and leaves the rest in weights.
Rounding take_digits(std::vector<double>* weights, const DigitKernels& kernels,
                     const Pieces& pieces) {
  double largest = 0.0, squares = 0.0;
  for (const double w : *weights) largest = std::max(largest, std::fabs(w));
  const float unit = static_cast<float>(largest / kernels.largest);
  const double per_one = unit > 0.0f ? 1.0 / unit : 0.0;
  int64_t digit_squares = 0;
  uint8_t* piece = pieces.first;
  const int64_t dim = weights->size();
  for (int64_t begin = 0; begin < dim; begin += pieces.size, piece += pieces.step)
    for (int64_t d = begin; d < std::min(begin + pieces.size, dim); ++d) {
      double& w = (*weights)[d];
      const double exact = w * per_one + kRounder - kRounder;
      const int digit =
          static_cast<int>(std::clamp<double>(exact, -kernels.largest, kernels.largest));
      piece[d - begin] = static_cast<uint8_t>(digit + kernels.bias);
      digit_squares += digit * digit;
      w -= double{unit} * digit;
      squares += w * w;
    }
  return {unit, std::sqrt(1.0 * digit_squares), std::sqrt(squares)};
}

// What a thread needs before it calls tiles; given up at the end, also after an error.
class TileState {
 public:
  explicit TileState(const DigitKernels& kernels) : leave_(kernels.leave) {
    if (kernels.enter) kernels.enter();
  }
  ~TileState() {
    if (leave_) leave_();
  }
  TileState(const TileState&) = delete;
  TileState& operator=(const TileState&) = delete;

 private:
  void (*const leave_)();
};

// The search of a group of queries: bounds from all codes, then scores of the remaining rows.
class CodeSearch {
 public:
  CodeSearch(const MipsQuestion& question, int64_t first_query, int64_t n_queries,
             const MipsMatrix& matrix, const MipsMatrix& codes, const CodeBounds& bounds,
             Threads threads)
      : question_(question),
        first_query_(first_query),
        n_queries_(n_queries),
        matrix_(matrix),
        codes_(codes),
        bounds_(bounds),
        kernels_(digit_kernels(threads.isa)),
        float_kernels_(mips_kernels(threads.isa)),
        exclusions_(question, first_query, n_queries) {
    pack();
    const int64_t row_bytes = std::max<int64_t>(1, question.dim);
    block_rows_ = std::max<int64_t>(1, kBlockBytes / row_bytes / tile_rows_) * tile_rows_;
    const int64_t share = matrix.n_rows / (8 * threads.count) + 1;
    chunk_rows_ = round_up(std::min(share, kChunkRows), block_rows_);
    n_workers_ = worth_waking(threads.count, 1.0 * question.dim * n_queries * matrix.n_rows,
                              (matrix.n_rows + chunk_rows_ - 1) / chunk_rows_);
  }

  int64_t run(const MipsAnswer& answer) {
    for (int64_t i = 0; i < n_workers_; ++i) {
      Worker worker;
      worker.candidates.assign(n_queries_, CandidateRows(question_.k));
      worker.thresholds.assign(n_lanes_, kInfinity);
      std::fill_n(worker.thresholds.begin(), n_queries_ * line_rows_, -kInfinity);
      workers_.push_back(std::move(worker));
    }
    const int n_threads = static_cast<int>(n_workers_);
    std::atomic<int64_t> next{0}, looked_at{0};
    parallel_for(n_threads, n_workers_, [&](int64_t i) {
      for (;;) {
        const int64_t begin = next.fetch_add(chunk_rows_);
        if (begin >= matrix_.n_rows) return;
        scan(begin, std::min(begin + chunk_rows_, matrix_.n_rows), &workers_[i]);
      }
    });
    parallel_for(n_threads, n_queries_, [&](int64_t query) {
      looked_at += look_at_rows(query, candidate_rows(query), answer);
    });
    return looked_at;
  }

 private:
  // The queries of one tile. Their digits are in pieces: the first piece of all queries, then the
  // second piece of all queries, and so on.
  struct PanelPlace {
    DigitTile tile;
    int64_t first_query;
    int64_t n_queries;  // including unused ones
  };

  void pack() {
    const int64_t width = kernels_.width;
    int size = 0;
    while (size < kFewSizes && 1 << size < n_queries_) ++size;
    if (size < kFewSizes && kernels_.few[size]) {
      const int64_t n = int64_t{1} << size;
      line_rows_ = width / n;
      tile_rows_ = width;
      piece_ = depth_ = 4 * width;
      panels_.push_back({kernels_.few[size], 0, n});
    } else {
      for (int64_t query = 0; query < n_queries_; query += panels_.back().n_queries) {
        const int n_vectors = n_queries_ - query > width ? 2 : 1;
        panels_.push_back({kernels_.tile[n_vectors - 1], query, n_vectors * width});
      }
    }
    const int64_t n_filled = panels_.back().first_query + panels_.back().n_queries;
    n_lanes_ = n_filled * line_rows_;
    digits_ = Aligned<uint8_t>(n_filled * read_dim());
    unit_.assign(n_lanes_, 0.0f);
    rest_ = norm_ = unit_;
    for (const PanelPlace& panel : panels_)
      for (int64_t i = 0; i < std::min(panel.n_queries, n_queries_ - panel.first_query); ++i)
        pack_query(panel, i);
  }

  const float* vector_of(int64_t query) const {
    return question_.query_emb + (first_query_ + query) * question_.dim;
  }

  // Returns the weights of the codes in the score.
  std::vector<double> weights_of(int64_t query) const {
    std::vector<double> weights(question_.dim);
    for (int64_t d = 0; d < question_.dim; ++d)
      weights[d] = double{vector_of(query)[d]} * codes_.scale[d];
    return weights;
  }

  void pack_query(const PanelPlace& panel, int64_t i) {
    const int64_t dim = question_.dim, query = panel.first_query + i;
    uint8_t* digits = digits_.data() + panel.first_query * read_dim() + i * piece_;
    std::vector<double> weights = weights_of(query);
    const Rounding rounding =
        take_digits(&weights, kernels_, {digits, piece_, panel.n_queries * piece_});
    double squares = 0.0;
    for (int64_t d = 0; d < dim; ++d) squares += double{vector_of(query)[d]} * vector_of(query)[d];
    fill_lanes(query, rounding.unit, &unit_);
    fill_lanes(query, rounding.slack(), &rest_);
    fill_lanes(query, rounded_up(std::sqrt(squares)), &norm_);
  }

  void fill_lanes(int64_t query, float value, std::vector<float>* lanes) const {
    std::fill_n(lanes->begin() + query * line_rows_, line_rows_, value);
  }

  // The number of components that a tile reads; digits and copied codes are padded to it.
  int64_t read_dim() const { return round_up(question_.dim, depth_); }

  void scan(int64_t begin, int64_t end, Worker* worker) const {
    const TileState state(kernels_);
    for (int64_t block = begin; block < end; block += block_rows_)
      for (const PanelPlace& panel : panels_)
        for (int64_t row = block; row < std::min(block + block_rows_, end); row += tile_rows_)
          scan_tile(panel, row, worker);
  }

  void scan_tile(const PanelPlace& panel, int64_t row, Worker* worker) const {
    const int64_t dim = question_.dim, read_dim = this->read_dim();
    const int64_t n = std::min(tile_rows_, matrix_.n_rows - row), last = row + tile_rows_ - 1;
    const bool beyond = last * codes_.pitch + read_dim > (matrix_.n_rows - 1) * codes_.pitch + dim;
    const CodeRows rows =
        beyond
            ? copied_rows([&](int64_t i) { return row + i; }, n, tile_rows_, read_dim,
                          &worker->tail)
            : CodeRows{codes_of(row),           codes_.pitch,          dim, bounds_.code_norm + row,
                       bounds_.rest_norm + row, bounds_.code_sum + row};
    const int64_t lane = panel.first_query * line_rows_, n_lanes = panel.n_queries * line_rows_;
    const DigitPanel queries{digits_.data() + panel.first_query * read_dim, &unit_[lane],
                             &rest_[lane], &norm_[lane], &worker->thresholds[lane]};
    const DigitScores& found = worker->scores;
    if (!panel.tile(queries, rows, &worker->scores)) return;
    for (int64_t line = 0; line * line_rows_ < n; ++line)
      for (uint64_t hits = found.hits[line]; hits; hits &= hits - 1) {
        const int bit = __builtin_ctzll(hits);
        const int64_t i = line * line_rows_ + bit % line_rows_, at = line * n_lanes + bit;
        if (i < n)
          offer(panel.first_query + bit / line_rows_, {found.upper[at], found.lower[at], row + i},
                worker);
      }
  }

  void offer(int64_t query, const Candidate& candidate, Worker* worker) const {
    if (candidate.upper < worker->thresholds[query * line_rows_] || query >= n_queries_) return;
    if (!exclusions_.allow(query, candidate.row)) return;
    worker->candidates[query].add(candidate);
    fill_lanes(query, worker->candidates[query].threshold(), &worker->thresholds);
  }

  const int8_t* codes_of(int64_t row) const {
    return static_cast<const int8_t*>(codes_.data) + row * codes_.pitch;
  }

  // Copies n rows of read_dim codes each into a tile.
  template <class RowAt>
  CodeRows copied_rows(RowAt row_at, int64_t n, int64_t n_filled, int64_t read_dim,
                       CopiedRows* out) const {
    out->codes.resize(std::max<int64_t>(1, n_filled * read_dim));
    out->code_norm.resize(n_filled);
    out->rest_norm.resize(n_filled);
    out->code_sum.resize(n_filled);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = row_at(i);
      std::copy_n(codes_of(row), question_.dim, &out->codes[i * read_dim]);
      out->code_norm[i] = bounds_.code_norm[row];
      out->rest_norm[i] = bounds_.rest_norm[row];
      out->code_sum[i] = bounds_.code_sum[row];
    }
    return {out->codes.data(),     read_dim,
            question_.dim,         out->code_norm.data(),
            out->rest_norm.data(), out->code_sum.data()};
  }

  // Returns the rows that may be among the best k, in ascending order.
  std::vector<Candidate> candidate_rows(int64_t query) const {
    CandidateRows left(question_.k);
    for (const Worker& worker : workers_) left.add_all(worker.candidates[query]);
    left.prune();
    std::sort(left.rows().begin(), left.rows().end(),
              [](const Candidate& a, const Candidate& b) { return a.row < b.row; });
    if (static_cast<int64_t>(left.rows().size()) > 2 * question_.k + kFirstRoom) {
      refine(query, &left.rows());
      left.prune();
    }
    return left.rows();
  }

  // Computes bounds with the second digits of the query, which take the place of a second query.
  void refine(int64_t query, std::vector<Candidate>* rows) const {
    const int64_t width = kernels_.width, n_rows = rows->size(), piece = 4 * width;
    const int64_t line_rows = width / 2, read_dim = round_up(question_.dim, piece);
    std::vector<uint8_t> digits(2 * read_dim);
    std::vector<double> weights = weights_of(query);
    const Rounding first = take_digits(&weights, kernels_, {&digits[0], piece, 2 * piece});
    const Rounding second = take_digits(&weights, kernels_, {&digits[piece], piece, 2 * piece});
    float unit[kMaxPanelLanes], rest[kMaxPanelLanes] = {}, norm[kMaxPanelLanes] = {};
    float threshold[kMaxPanelLanes] = {};
    std::fill_n(unit, line_rows, first.unit);
    std::fill_n(unit + line_rows, line_rows, second.unit);
    std::fill_n(rest, line_rows, rounded_up(1e-6 * first.unit * first.digits) + second.slack());
    std::fill_n(norm, line_rows, norm_[query * line_rows_]);
    DigitScores found;
    CopiedRows copied;
    for (int64_t begin = 0; begin < n_rows; begin += width) {
      const int64_t n = std::min(width, n_rows - begin);
      const auto row_at = [&](int64_t i) { return (*rows)[begin + i].row; };
      kernels_.few[1]({digits.data(), unit, rest, norm, threshold},
                      copied_rows(row_at, n, width, read_dim, &copied), &found);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = i / line_rows * width + i % line_rows;
        const float second_part = found.upper[at + line_rows];
        (*rows)[begin + i] = {found.upper[at] + second_part, found.lower[at] + second_part,
                              row_at(i)};
      }
    }
  }

  int64_t look_at_rows(int64_t query, const std::vector<Candidate>& rows,
                       const MipsAnswer& answer) const {
    const int64_t n = rows.size(), width = float_kernels_.width;
    std::vector<uint64_t> keys(n);
    for (int64_t first = 0; first < n; first += width) {
      const float* lines[kMaxGathered];
      float scores[kMaxGathered];
      for (int64_t i = 0; i < width; ++i)
        lines[i] = row_of_matrix(matrix_, rows[std::min(first + i, n - 1)].row);
      float_kernels_.gathered(vector_of(query), lines, question_.dim, scores);
      for (int64_t i = 0; i < std::min(width, n - first); ++i) {
        if (!std::isfinite(scores[i])) refuse_row(matrix_, question_.dim, rows[first + i].row);
        keys[first + i] = key_of(scores[i], rows[first + i].row);
      }
    }
    write_answer(question_, first_query_ + query, &keys, answer);
    return n;
  }

  const MipsQuestion& question_;
  const int64_t first_query_, n_queries_;
  const MipsMatrix& matrix_;
  const MipsMatrix& codes_;
  const CodeBounds& bounds_;
  const DigitKernels& kernels_;
  const MipsKernels& float_kernels_;
  const Exclusions exclusions_;
  int64_t line_rows_ = 1;  // rows that share a line of scores, and lanes of each query
  int64_t piece_ = 4;      // digits of a query that are next to each other
  int64_t depth_ = std::max<int64_t>(piece_, kernels_.depth);
  int64_t tile_rows_ = kernels_.rows;
  int64_t n_lanes_, block_rows_, chunk_rows_, n_workers_;
  std::vector<PanelPlace> panels_;
  Aligned<uint8_t> digits_;                // panel by panel
  std::vector<float> unit_, rest_, norm_;  // [n_lanes_]
  std::vector<Worker> workers_;
};

}  // namespace

void measure_codes(const MipsMatrix& matrix, const MipsMatrix& codes, int64_t dim,
                   const CodeBounds& bounds, Threads threads) {
  // The float32 result of q . x has D rounding errors.
  if (dim > kMaxDim)
    throw std::invalid_argument("codes: expected at most " + std::to_string(kMaxDim) +
                                " numbers in a row, got " + std::to_string(dim));
  const double gamma = dim * 0x1p-24 / (1.0 - dim * 0x1p-24);
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

int64_t mips_topk_by_codes(const MipsQuestion& question, const MipsMatrix& matrix,
                           const MipsMatrix& codes, const CodeBounds& bounds,
                           const MipsAnswer& answer, Threads threads) {
  check_queries(question);
  int64_t looked_at = 0;
  for (int64_t first = 0; first < question.n_queries; first += kGroupQueries) {
    const int64_t n = std::min(kGroupQueries, question.n_queries - first);
    looked_at += CodeSearch(question, first, n, matrix, codes, bounds, threads).run(answer);
  }
  return looked_at;
}

}  // namespace fastrag

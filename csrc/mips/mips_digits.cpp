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
#include "mips/mips_candidates.h"
#include "mips/mips_kernels.h"
#include "mips/mips_parts.h"
#include "pool/thread_pool.h"

namespace fastrag {
namespace {

constexpr int64_t kBlockBytes = 256 << 10;
constexpr int64_t kChunkRows = 2048;
constexpr int64_t kGroupQueries = 256;
constexpr double kRounder = 0x1.8p52;  // adding and subtracting it rounds to an integer
// Rows whose codes are read for one query in the time in which those of a row are read in order:
// for few queries, which memory limits, and for one of many queries, which arithmetic does.
constexpr double kLooks = 0.5, kLooksOfOne = 0.1;
constexpr int64_t kMaxWait = 127;  // blocks that are scanned without lead codes

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
  std::vector<std::vector<Candidate>> left;  // [n_queries], by the lead codes of a block
  std::vector<int64_t> rows;                 // of a tile
  std::vector<int8_t> last;                  // codes of the last rows, padded with zeros
  int64_t wait = 0;                          // blocks until lead codes are tried again
  int64_t last_wait = 0;
  int64_t n_codes = 0;  // read in order or not
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

// Prepares a thread to call tiles, and releases its tile registers when it goes out of scope.
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

// Two digits of each weight of a query, which take the places of two queries in a tile.
struct FineQuery {
  std::vector<uint8_t> first;   // the first digits alone
  std::vector<uint8_t> digits;  // piece by piece, first the first ones
  float unit[kMaxPanelLanes], rest[kMaxPanelLanes], norm[kMaxPanelLanes];
};

// Codes of the rows with the digits of the queries for them, panel by panel.
struct CodedQueries {
  MipsMatrix codes;
  CodeBounds bounds;
  int64_t dim, read_dim;  // codes of a row, and digits of a query with the padding
  Aligned<uint8_t> digits;
  std::vector<float> unit, rest, norm;  // [n_lanes]
};

// The search of a group of queries: bounds from all codes, then scores of the remaining rows.
class CodeSearch {
 public:
  CodeSearch(const MipsQuestion& question, int64_t first_query, int64_t n_queries,
             const MipsMatrix& matrix, const MipsMatrix& codes, const CodeBounds& bounds,
             const LeadCodes* lead, Threads threads)
      : question_(question),
        first_query_(first_query),
        n_queries_(n_queries),
        matrix_(matrix),
        lead_codes_(lead),
        kernels_(digit_kernels(threads.isa)),
        float_kernels_(mips_kernels(threads.isa)),
        exclusions_(question, first_query, n_queries),
        highest_(n_queries) {
    for (std::atomic<float>& threshold : highest_) threshold = -kInfinity;
    whole_.codes = codes;
    whole_.bounds = bounds;
    pack(threads);
    const int64_t row_bytes = std::max<int64_t>(1, question.dim);
    block_rows_ = std::max<int64_t>(1, kBlockBytes / row_bytes / tile_rows_) * tile_rows_;
    const int64_t share = matrix.n_rows / (8 * threads.count) + 1;
    chunk_rows_ = round_up(std::min(share, kChunkRows), block_rows_);
    n_workers_ = worth_waking(threads.count, 1.0 * question.dim * n_queries * matrix.n_rows,
                              (matrix.n_rows + chunk_rows_ - 1) / chunk_rows_);
  }

  RowsRead run(const MipsAnswer& answer) {
    for (int64_t i = 0; i < n_workers_; ++i) {
      Worker worker;
      worker.candidates.assign(n_queries_, CandidateRows(question_.k));
      worker.thresholds.assign(n_lanes_, kInfinity);
      std::fill_n(worker.thresholds.begin(), n_queries_ * line_rows_, -kInfinity);
      worker.left.resize(lead_codes_ ? n_queries_ : 0);
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
    RowsRead read{looked_at, 0};
    for (const Worker& worker : workers_) read.codes += worker.n_codes;
    return read;
  }

 private:
  // The queries of one tile. Their digits are in pieces: the first piece of all queries, then the
  // second piece of all queries, and so on.
  struct PanelPlace {
    DigitTile tile;
    int64_t first_query;
    int64_t n_queries;  // including unused ones
  };

  void pack(Threads threads) {
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
    make_room(question_.dim, n_filled, &whole_);
    if (lead_codes_) {
      lead_.codes = lead_codes_->codes;
      lead_.bounds = lead_codes_->bounds;
      make_room(lead_codes_->n_lead, n_filled, &lead_);
      fine_.resize(n_queries_);
    }
    const int64_t n_threads = worth_waking(
        threads.count, lead_codes_ ? 1.0 * n_queries_ * question_.dim * lead_codes_->n_lead : 0.0,
        panels_.size());
    parallel_for(static_cast<int>(n_threads), panels_.size(), [&](int64_t p) {
      const PanelPlace& panel = panels_[p];
      for (int64_t i = 0; i < std::min(panel.n_queries, n_queries_ - panel.first_query); ++i) {
        pack_query(panel, i);
        if (lead_codes_) pack_lead(panel, i);
      }
    });
  }

  void make_room(int64_t dim, int64_t n_filled, CodedQueries* out) const {
    out->dim = dim;
    out->read_dim = round_up(dim, depth_);
    out->digits = Aligned<uint8_t>(n_filled * out->read_dim);
    out->unit.assign(n_lanes_, 0.0f);
    out->rest = out->norm = out->unit;
  }

  const float* vector_of(int64_t query) const {
    return question_.query_emb + (first_query_ + query) * question_.dim;
  }

  double squares_of(int64_t query) const {
    double squares = 0.0;
    for (int64_t d = 0; d < question_.dim; ++d)
      squares += double{vector_of(query)[d]} * vector_of(query)[d];
    return squares;
  }

  // Returns the weights of the codes in the score.
  std::vector<double> weights_of(int64_t query) const {
    std::vector<double> weights(question_.dim);
    for (int64_t d = 0; d < question_.dim; ++d)
      weights[d] = double{vector_of(query)[d]} * whole_.codes.scale[d];
    return weights;
  }

  // Writes the digits of query i of a panel.
  Rounding pack_digits(const PanelPlace& panel, int64_t i, std::vector<double>* weights,
                       CodedQueries* out) const {
    uint8_t* digits = out->digits.data() + panel.first_query * out->read_dim + i * piece_;
    const Rounding rounding =
        take_digits(weights, kernels_, {digits, piece_, panel.n_queries * piece_});
    fill_lanes(panel.first_query + i, rounding.unit, &out->unit);
    return rounding;
  }

  void pack_query(const PanelPlace& panel, int64_t i) {
    const int64_t query = panel.first_query + i;
    std::vector<double> weights = weights_of(query);
    const Rounding rounding = pack_digits(panel, i, &weights, &whole_);
    fill_lanes(query, rounding.slack(), &whole_.rest);
    fill_lanes(query, rounded_up(std::sqrt(squares_of(query))), &whole_.norm);
    if (lead_codes_) fine_[query] = fine_query(query);
  }

  void pack_lead(const PanelPlace& panel, int64_t i) {
    const int64_t query = panel.first_query + i, n_lead = lead_.dim;
    const float* q = vector_of(query);
    std::vector<double> p(n_lead);
    double lead_squares = 0.0;
    for (int64_t j = 0; j < n_lead; ++j) {
      const float* direction = lead_codes_->rotation + j * question_.dim;
      p[j] = float_kernels_.dot(q, direction, direction + question_.dim, question_.dim);
      lead_squares += p[j] * p[j];
      p[j] *= lead_codes_->step;
    }
    // p has the rounding errors of float32 sums, and |P z| <= step |code| + its rest.
    const double squares = squares_of(query);
    double length = std::sqrt(lead_squares);
    if (!std::isfinite(lead_squares)) {  // an overflow: nothing is known of the scores
      std::fill(p.begin(), p.end(), 0.0);
      length = kInfinity;
    }
    const double lost = lead_codes_->lost(question_.dim) * std::sqrt(squares);
    const double surely = std::max(0.0, length - lost);
    const double rest = squares * (1.0 + 1e-12) - (1.0 - lead_codes_->defect) * surely * surely;
    const double of_code = lead_codes_->share * (length + lost) + lead_codes_->step * lost;
    const Rounding rounding = pack_digits(panel, i, &p, &lead_);
    fill_lanes(query, rounding.slack() + rounded_up(of_code), &lead_.rest);
    fill_lanes(query, rounded_up(std::sqrt(std::max(0.0, rest))) + kFloor, &lead_.norm);
  }

  void fill_lanes(int64_t query, float value, std::vector<float>* lanes) const {
    std::fill_n(lanes->begin() + query * line_rows_, line_rows_, value);
  }

  void scan(int64_t begin, int64_t end, Worker* worker) const {
    const TileState state(kernels_);
    for (int64_t block = begin; block < end; block += block_rows_) {
      const int64_t block_end = std::min(block + block_rows_, end);
      adopt_thresholds(worker);
      for (const PanelPlace& panel : panels_)
        if (!(lead_codes_ && scan_lead(panel, block, block_end, worker)))
          scan_codes(panel, block, block_end, worker);
    }
  }

  void scan_codes(const PanelPlace& panel, int64_t begin, int64_t end, Worker* worker) const {
    worker->n_codes += (end - begin) * std::min(panel.n_queries, n_queries_ - panel.first_query);
    for (int64_t row = begin; row < end; row += tile_rows_)
      bound_tile(whole_, panel, row, worker,
                 [&](int64_t query, const Candidate& found) { offer(query, found, worker); });
  }

  // Scans rows by their lead codes and then the codes of the rows that are left. Returns false,
  // without an effect on the candidates, if reading the codes of all rows is faster.
  bool scan_lead(const PanelPlace& panel, int64_t begin, int64_t end, Worker* worker) const {
    if (worker->wait > 0) {
      --worker->wait;
      return false;
    }
    const int64_t n = std::min(panel.n_queries, n_queries_ - panel.first_query);
    const double share = 1.0 - 1.0 * lead_.dim / question_.dim;
    const double looks = line_rows_ > 1 ? kLooks : kLooksOfOne * n;
    const int64_t most = static_cast<int64_t>((end - begin) * share * looks);
    int64_t n_left = 0;
    for (int64_t query = 0; query < n; ++query) worker->left[panel.first_query + query].clear();
    for (int64_t row = begin; row < end && n_left <= most; row += tile_rows_)
      bound_tile(lead_, panel, row, worker, [&](int64_t query, const Candidate& found) {
        if (query >= n_queries_) return;
        prefetch_codes(found.row);
        worker->left[query].push_back(found);
        ++n_left;
      });
    if (n_left > most) {
      worker->last_wait = std::min(2 * worker->last_wait + 1, kMaxWait);
      worker->wait = worker->last_wait;
      return false;
    }
    worker->last_wait = 0;
    for (int64_t query = 0; query < n; ++query) look_at_codes(panel.first_query + query, worker);
    return true;
  }

  // Bounds the rows that the lead codes have left for a query by their codes: by the first digits
  // of the query, and what these leave by both.
  void look_at_codes(int64_t query, Worker* worker) const {
    const int64_t width = kernels_.width, lane = query * line_rows_;
    const float& threshold = worker->thresholds[lane];
    const std::vector<Candidate>& left = worker->left[query];
    const FineQuery& fine = fine_[query];
    std::vector<int64_t>& close = worker->rows;
    for (size_t i = 0; i < left.size();) {
      int64_t rows[kMaxGathered], n = 0;
      for (; i < left.size() && n < width; ++i) {
        if (left[i].upper < threshold) continue;
        rows[n++] = left[i].row;
      }
      if (n == 0) return;
      worker->n_codes += n;
      const int8_t* lines[kMaxGathered];
      int32_t sums[kMaxGathered];
      for (int64_t j = 0; j < width; ++j)
        lines[j] = readable_codes(rows[std::min(j, n - 1)], &worker->last);
      kernels_.gathered(fine.first.data(), lines, question_.dim, sums);
      close.clear();
      for (int64_t j = 0; j < n; ++j) {
        const CodeBounds& bounds = whole_.bounds;
        const int32_t sum = sums[j] - kernels_.bias * bounds.code_sum[rows[j]];
        const float slack = bounds.code_norm[rows[j]] * whole_.rest[lane] +
                            bounds.rest_norm[rows[j]] * whole_.norm[lane];
        const float upper = static_cast<float>(sum) * whole_.unit[lane] + slack;
        if (!(upper < threshold)) close.push_back(rows[j]);
      }
      if (!close.empty())
        bound_finely(fine, close, worker,
                     [&](const Candidate& found) { offer(query, found, worker); });
    }
  }

  void prefetch_codes(int64_t row) const {
    const int8_t* codes = codes_of(whole_, row);
    for (int64_t d = 0; d < question_.dim; d += 64) __builtin_prefetch(codes + d);
  }

  // Returns the codes of a row, or a copy of them if reading whole vectors would leave the matrix.
  const int8_t* readable_codes(int64_t row, std::vector<int8_t>* copy) const {
    const int64_t dim = question_.dim, read_dim = round_up(dim, 4 * kernels_.width);
    if ((matrix_.n_rows - 1 - row) * whole_.codes.pitch >= read_dim - dim)
      return codes_of(whole_, row);
    // All rows of a tile may be such rows if they are narrow.
    const int64_t at = (matrix_.n_rows - 1 - row) * read_dim;
    copy->resize((read_dim / whole_.codes.pitch + 2) * read_dim);  // of all such rows, once
    std::copy_n(codes_of(whole_, row), dim, &(*copy)[at]);
    return &(*copy)[at];
  }

  // Calls on_row(candidate) for each of at most width rows.
  template <class OnRow>
  void bound_finely(const FineQuery& query, const std::vector<int64_t>& rows, Worker* worker,
                    const OnRow& on_row) const {
    static const float threshold[kMaxPanelLanes] = {};
    const int64_t width = kernels_.width, line_rows = width / 2, n = rows.size();
    const CodeRows copied = copied_rows(
        whole_, [&](int64_t i) { return rows[i]; }, n, width, query.digits.size() / 2,
        &worker->tail);
    kernels_.few[1]({query.digits.data(), query.unit, query.rest, query.norm, threshold}, copied,
                    &worker->scores);
    const DigitScores& found = worker->scores;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = i / line_rows * width + i % line_rows;
      const float second = found.upper[at + line_rows];
      on_row(Candidate(found.upper[at] + second, found.lower[at] + second, rows[i]));
    }
  }

  // Calls on_hit(query, candidate) for the rows of a tile that reach the threshold of a query, or
  // of a lane without one.
  template <class OnHit>
  void bound_tile(const CodedQueries& coded, const PanelPlace& panel, int64_t row, Worker* worker,
                  const OnHit& on_hit) const {
    const int64_t dim = coded.dim, read_dim = coded.read_dim, pitch = coded.codes.pitch;
    const int64_t n = std::min(tile_rows_, matrix_.n_rows - row), last = row + tile_rows_ - 1;
    const bool beyond = last * pitch + read_dim > (matrix_.n_rows - 1) * pitch + dim;
    const CodeRows rows = beyond ? copied_rows(
                                       coded, [&](int64_t i) { return row + i; }, n, tile_rows_,
                                       read_dim, &worker->tail)
                                 : CodeRows{codes_of(coded, row),
                                            pitch,
                                            dim,
                                            coded.bounds.code_norm + row,
                                            coded.bounds.rest_norm + row,
                                            coded.bounds.code_sum + row};
    const int64_t lane = panel.first_query * line_rows_, n_lanes = panel.n_queries * line_rows_;
    const DigitPanel queries{coded.digits.data() + panel.first_query * read_dim, &coded.unit[lane],
                             &coded.rest[lane], &coded.norm[lane], &worker->thresholds[lane]};
    const DigitScores& found = worker->scores;
    if (!panel.tile(queries, rows, &worker->scores)) return;
    for (int64_t line = 0; line * line_rows_ < n; ++line)
      for (uint64_t hits = found.hits[line]; hits; hits &= hits - 1) {
        const int bit = __builtin_ctzll(hits);
        const int64_t i = line * line_rows_ + bit % line_rows_, at = line * n_lanes + bit;
        if (i < n)
          on_hit(panel.first_query + bit / line_rows_,
                 Candidate(found.upper[at], found.lower[at], row + i));
      }
  }

  void offer(int64_t query, const Candidate& candidate, Worker* worker) const {
    if (candidate.upper < worker->thresholds[query * line_rows_] || query >= n_queries_) return;
    if (!exclusions_.allow(query, candidate.row)) return;
    worker->candidates[query].add(candidate);
    const float threshold = worker->candidates[query].threshold();
    if (!(threshold > worker->thresholds[query * line_rows_])) return;
    fill_lanes(query, threshold, &worker->thresholds);
    std::atomic<float>& highest = highest_[query];
    float seen = highest.load(std::memory_order_relaxed);
    while (seen < threshold && !highest.compare_exchange_weak(seen, threshold)) continue;
  }

  // Raises the thresholds to those that other threads have found.
  void adopt_thresholds(Worker* worker) const {
    for (int64_t query = 0; query < n_queries_; ++query) {
      const float highest = highest_[query].load(std::memory_order_relaxed);
      if (highest > worker->thresholds[query * line_rows_])
        fill_lanes(query, highest, &worker->thresholds);
    }
  }

  static const int8_t* codes_of(const CodedQueries& coded, int64_t row) {
    return static_cast<const int8_t*>(coded.codes.data) + row * coded.codes.pitch;
  }

  // Copies n rows of read_dim codes each into a tile.
  template <class RowAt>
  static CodeRows copied_rows(const CodedQueries& coded, RowAt row_at, int64_t n, int64_t n_filled,
                              int64_t read_dim, CopiedRows* out) {
    out->codes.resize(std::max<int64_t>(1, n_filled * read_dim));
    out->code_norm.resize(n_filled);
    out->rest_norm.resize(n_filled);
    out->code_sum.resize(n_filled);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = row_at(i);
      std::copy_n(codes_of(coded, row), coded.dim, &out->codes[i * read_dim]);
      out->code_norm[i] = coded.bounds.code_norm[row];
      out->rest_norm[i] = coded.bounds.rest_norm[row];
      out->code_sum[i] = coded.bounds.code_sum[row];
    }
    return {out->codes.data(),   read_dim, coded.dim, out->code_norm.data(), out->rest_norm.data(),
            out->code_sum.data()};
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

  FineQuery fine_query(int64_t query) const {
    const int64_t piece = 4 * kernels_.width, line_rows = kernels_.width / 2;
    const int64_t read_dim = round_up(question_.dim, piece);
    FineQuery fine{{}, std::vector<uint8_t>(2 * read_dim), {}, {}, {}};
    std::vector<double> weights = weights_of(query);
    const auto take = [&](int64_t digit) {
      return take_digits(&weights, kernels_, {&fine.digits[digit * piece], piece, 2 * piece});
    };
    const Rounding first = take(0), second = take(1);
    for (int64_t d = 0; d < read_dim; d += piece)
      fine.first.insert(fine.first.end(), &fine.digits[2 * d], &fine.digits[2 * d] + piece);
    std::fill_n(fine.unit, line_rows, first.unit);
    std::fill_n(fine.unit + line_rows, line_rows, second.unit);
    std::fill_n(fine.rest, line_rows,
                rounded_up(1e-6 * first.unit * first.digits) + second.slack());
    std::fill_n(fine.norm, line_rows, whole_.norm[query * line_rows_]);
    return fine;
  }

  // Computes bounds of rows with the second digits of the query.
  void refine(int64_t query, std::vector<Candidate>* rows) const {
    const FineQuery fine = fine_query(query);
    const int64_t n = rows->size(), width = kernels_.width;
    Worker worker;
    for (int64_t begin = 0; begin < n; begin += width) {
      worker.rows.clear();
      for (int64_t i = begin; i < std::min(begin + width, n); ++i)
        worker.rows.push_back((*rows)[i].row);
      auto out = rows->begin() + begin;
      bound_finely(fine, worker.rows, &worker, [&](const Candidate& found) { *out++ = found; });
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
  const LeadCodes* lead_codes_;
  const DigitKernels& kernels_;
  const MipsKernels& float_kernels_;
  const Exclusions exclusions_;
  int64_t line_rows_ = 1;  // rows that share a line of scores, and lanes of each query
  int64_t piece_ = 4;      // digits of a query that are next to each other
  int64_t depth_ = std::max<int64_t>(piece_, kernels_.depth);
  int64_t tile_rows_ = kernels_.rows;
  int64_t n_lanes_, block_rows_, chunk_rows_, n_workers_;
  std::vector<PanelPlace> panels_;
  CodedQueries whole_, lead_;
  std::vector<FineQuery> fine_;  // [n_queries], with lead codes
  std::vector<Worker> workers_;
  mutable std::vector<std::atomic<float>> highest_;  // [n_queries_], thresholds of all workers
};

}  // namespace

RowsRead mips_topk_by_codes(const MipsQuestion& question, const MipsMatrix& matrix,
                            const MipsMatrix& codes, const CodeBounds& bounds,
                            const LeadCodes* lead, const MipsAnswer& answer, Threads threads) {
  check_queries(question);
  RowsRead read{0, 0};
  for (int64_t first = 0; first < question.n_queries; first += kGroupQueries) {
    const int64_t n = std::min(kGroupQueries, question.n_queries - first);
    const RowsRead part =
        CodeSearch(question, first, n, matrix, codes, bounds, lead, threads).run(answer);
    read.rows += part.rows;
    read.codes += part.codes;
  }
  return read;
}

}  // namespace fastrag

// The search of a matrix: panels of queries, blocks of rows, and the candidates of each thread.
#include "mips/mips.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "mips/mips_kernels.h"
#include "mips/mips_parts.h"
#include "pool/thread_pool.h"

namespace fastrag {
namespace {

constexpr int64_t kNoRow = std::numeric_limits<int64_t>::max();

constexpr int64_t kBlockBytes = 256 << 10;  // rows that stay in the L2 cache for all panels
constexpr int64_t kChunkRows = 1024;        // largest number of rows that a thread takes at a time
constexpr int64_t kGroupBytes = 24 << 20;   // limit for queries and their candidates
constexpr int64_t kGroupQueries = 1024;     // larger groups are not faster
constexpr int64_t kCachedBytes = 16 << 20;  // a matrix that stays in a cache between searches
constexpr int64_t kFewCandidates = 32;      // capacity that is always cheap

// At least the best k rows of each query among those that one thread has scored. A thread scores
// rows in ascending order, so a row with the same score as the k-th best is not among the best.
class Candidates {
 public:
  static int64_t room(int64_t k, int64_t n_rows) {
    return std::min(std::max(k > n_rows ? n_rows : 2 * k, kFewCandidates), n_rows);
  }

  // n_lanes includes lanes without a query.
  Candidates(int64_t n_queries, int64_t n_lanes, int64_t k, int64_t n_rows)
      : k_(k),
        room_(room(k, n_rows)),
        keys_(new uint64_t[n_queries * room_]),
        count_(n_queries),
        threshold_(n_lanes, kInfinity) {
    std::fill_n(threshold_.begin(), n_queries, -kInfinity);
  }

  const float* thresholds() const { return threshold_.data(); }
  bool wants(int64_t query, float score) const { return score > threshold_[query]; }
  const uint64_t* begin(int64_t query) const { return &keys_[query * room_]; }
  const uint64_t* end(int64_t query) const { return begin(query) + count_[query]; }

  void add(int64_t query, float score, int64_t row) {
    uint64_t* keys = &keys_[query * room_];
    if (count_[query] == room_) {
      std::nth_element(keys, keys + k_ - 1, keys + room_, std::greater<uint64_t>());
      count_[query] = k_;
      threshold_[query] = score_of(keys[k_ - 1]);
      if (!wants(query, score)) return;
    }
    keys[count_[query]++] = key_of(score, row);
  }

 private:
  const int64_t k_, room_;
  std::unique_ptr<uint64_t[]> keys_;
  std::vector<int64_t> count_;
  std::vector<float> threshold_;
};

// The state of one thread over all its chunks.
struct Worker {
  Candidates candidates;
  TileScores scores;
  FewScores few_scores;
  std::vector<float> wide;  // a block as float32; or the last rows, with zeros to fill the tile
  std::vector<char> tail;   // the last rows in their storage format
  int64_t first_bad = kNoRow;
};

// A group of queries against the whole matrix.
class Search {
 public:
  Search(const MipsQuestion& question, int64_t first_query, int64_t n_queries,
         const MipsMatrix& matrix, Threads threads)
      : question_(question),
        first_query_(first_query),
        n_queries_(n_queries),
        matrix_(matrix),
        kernels_(mips_kernels(threads.isa)),
        exclusions_(question, first_query, n_queries),
        few_(n_queries <= kMaxFewQueries) {
    pack();
    const int64_t row_bytes = std::max<int64_t>(1, question.dim) * sizeof(float);
    const int64_t step = few_ ? few_kernel().rows : kernels_.rows;
    // A single panel uses a block only once, and a widened tile stays in the L1 cache.
    const bool alone = panels_.size() == 1 && matrix.storage != Storage::kFloat32;
    block_rows_ = alone ? step : std::max<int64_t>(1, kBlockBytes / row_bytes / step) * step;
    const int64_t share = matrix.n_rows / (8 * threads.count) + 1;
    chunk_rows_ = round_up(std::min(share, kChunkRows), block_rows_);
    n_workers_ = worth_waking(threads.count, 1.0 * question.dim * n_queries * matrix.n_rows,
                              (matrix.n_rows + chunk_rows_ - 1) / chunk_rows_);
  }

  void run(const MipsAnswer& answer) {
    workers_.reserve(n_workers_);
    for (int64_t i = 0; i < n_workers_; ++i)
      workers_.push_back({{n_queries_, n_lanes_, question_.k, matrix_.n_rows}, {}, {}, {}, {}});
    const int n_threads = static_cast<int>(n_workers_);
    std::atomic<int64_t> next{0};
    parallel_for(n_threads, n_workers_, [&](int64_t i) {
      Worker& worker = workers_[i];
      while (worker.first_bad == kNoRow) {
        const int64_t begin = next.fetch_add(chunk_rows_);
        if (begin >= matrix_.n_rows) return;
        const int64_t end = std::min(begin + chunk_rows_, matrix_.n_rows);
        few_ ? scan_few(begin, end, &worker) : scan(begin, end, &worker);
      }
    });
    // Chunks are taken in ascending order, so the lowest bad row has been found.
    int64_t bad = kNoRow;
    for (const Worker& worker : workers_) bad = std::min(bad, worker.first_bad);
    if (bad != kNoRow) refuse_row(matrix_, question_.dim, bad);
    parallel_for(n_threads, n_workers_, [&](int64_t i) {
      std::vector<uint64_t> keys;
      for (int64_t q = n_queries_ * i / n_workers_; q < n_queries_ * (i + 1) / n_workers_; ++q)
        join(q, answer, &keys);
    });
  }

 private:
  struct PanelPlace {
    int64_t first_lane;
    int n_vectors;
  };

  void pack() {
    const int64_t dim = question_.dim, width = kernels_.width;
    if (few_) {
      while (1 << few_size_ < n_queries_) ++few_size_;
      n_lanes_ = int64_t{1} << few_size_;
      queries_ = Aligned<float>(n_lanes_ * dim);
      std::copy_n(question_.query_emb + first_query_ * dim, n_queries_ * dim, queries_.data());
      return;
    }
    n_lanes_ = round_up(n_queries_, width);
    queries_ = Aligned<float>(n_lanes_ * dim);
    int64_t left = n_lanes_ / width, lane = 0;
    while (left > 0) {
      const int n_vectors = left == 1 ? 1 : left == 3 ? 3 : 2;
      panels_.push_back({lane, n_vectors});
      const int64_t lanes = n_vectors * width;
      float* packed = queries_.data() + lane * dim;
      for (int64_t i = 0; i < std::min(lanes, n_queries_ - lane); ++i) {
        const float* query = question_.query_emb + (first_query_ + lane + i) * dim;
        for (int64_t d = 0; d < dim; ++d) packed[d * lanes + i] = query[d];
      }
      lane += lanes;
      left -= n_vectors;
    }
  }

  // Scores rows [begin, end) block by block, each with all panels.
  void scan(int64_t begin, int64_t end, Worker* worker) const {
    const bool in_place = matrix_.storage == Storage::kFloat32;
    for (int64_t block = begin; block < end; block += block_rows_) {
      const int64_t block_end = std::min(block + block_rows_, end);
      if (!in_place) widen(block, block_end, worker);
      const int64_t n_panels = panels_.size();
      for (int64_t p = 0; p < n_panels; ++p) {
        for (int64_t row = block; row < block_end; row += kernels_.rows) {
          // A single panel prefetches the following rows. Of several, the last one prefetches the
          // next block, or each one a part of it.
          const int64_t turn =
              kernels_.spread ? (row - block) / kernels_.rows % n_panels : n_panels - 1;
          const int64_t step = n_panels == 1 ? kernels_.rows : p == turn ? block_rows_ : 0;
          const TileRows rows = in_place ? rows_in_place(row, row + step, worker)
                                         : rows_of(&worker->wide[(row - block) * question_.dim]);
          scan_tile(panels_[p], row, rows, worker);
        }
      }
    }
  }

  TileRows rows_of(const float* wide) const { return {wide, question_.dim, question_.dim, wide}; }

  TileRows rows_in_place(int64_t row, int64_t ahead, Worker* worker) const {
    if (row + kernels_.rows > matrix_.n_rows) {
      if (worker->wide.empty()) widen(row, matrix_.n_rows, worker);
      return rows_of(worker->wide.data());
    }
    const auto* data = static_cast<const float*>(matrix_.data);
    const int64_t next = ahead + kernels_.rows <= matrix_.n_rows ? ahead : row;
    return {data + row * matrix_.pitch, matrix_.pitch, question_.dim, data + next * matrix_.pitch};
  }

  // Converts rows [begin, end) to float32, with zeros to fill the last tile.
  void widen(int64_t begin, int64_t end, Worker* worker) const {
    const int64_t dim = question_.dim, n = end - begin;
    worker->wide.resize(std::max<int64_t>(1, round_up(n, kernels_.rows) * dim));
    std::fill(worker->wide.begin() + n * dim, worker->wide.end(), 0.0f);
    const int storage = static_cast<int>(matrix_.storage);
    kernels_.widen[storage](rows_from(matrix_, dim, begin), n, worker->wide.data());
  }

  void scan_tile(const PanelPlace& place, int64_t row, const TileRows& rows, Worker* worker) const {
    const int64_t n = std::min<int64_t>(kernels_.rows, matrix_.n_rows - row);
    const Panel panel{queries_.data() + place.first_lane * question_.dim,
                      worker->candidates.thresholds() + place.first_lane};
    switch (kernels_.tile[place.n_vectors - 1](panel, rows, &worker->scores)) {
      case TileResult::kNoHit:
        return;
      case TileResult::kHits:
        return take_hits(place, row, n, worker);
      case TileResult::kNotFinite:
        return find_bad(place, row, n, worker);
    }
  }

  const FewKernel& few_kernel() const {
    const int64_t dim = question_.dim;
    const bool cached = matrix_.n_rows * dim * int64_t{sizeof(float)} <= kCachedBytes;
    return matrix_.storage == Storage::kFloat32 && dim >= kLongRow && !cached
               ? kernels_.few_long[few_size_]
               : kernels_.few[static_cast<int>(matrix_.storage)][few_size_];
  }

  void scan_few(int64_t begin, int64_t end, Worker* worker) const {
    const FewKernel& few = few_kernel();
    const int64_t few_rows = few.rows;
    const FewQueries queries{queries_.data(), worker->candidates.thresholds()};
    const FewScores& found = worker->few_scores;
    for (int64_t row = begin; row < end; row += few_rows) {
      StoredRows rows = rows_from(matrix_, question_.dim, row);
      const int64_t n = std::min(few_rows, matrix_.n_rows - row);
      if (n < few_rows) rows = copied_tail(rows, n, few_rows, worker);
      const TileResult result = few.tile(queries, rows, &worker->few_scores);
      if (result == TileResult::kNoHit) continue;
      for (int64_t q = 0; q < n_queries_; ++q) {
        const float* scores = found.scores + q * few_rows;
        if (result == TileResult::kHits) {
          for (uint64_t hits = found.hits[q]; hits; hits &= hits - 1) {
            const int i = __builtin_ctzll(hits);
            if (i < n) offer(q, scores[i], row + i, &worker->candidates);
          }
        } else {
          for (int64_t i = 0; i < n; ++i)
            if (!std::isfinite(scores[i])) worker->first_bad = std::min(worker->first_bad, row + i);
        }
      }
    }
  }

  // Copies n rows, with zeros to fill a tile.
  StoredRows copied_tail(StoredRows rows, int64_t n, int64_t n_filled, Worker* worker) const {
    const int64_t size = element_bytes(matrix_.storage), line = rows.dim * size;
    worker->tail.assign(std::max<int64_t>(1, n_filled * line), 0);
    for (int64_t i = 0; i < n; ++i)
      std::memcpy(&worker->tail[i * line],
                  static_cast<const char*>(rows.data) + i * rows.pitch * size, line);
    rows.data = worker->tail.data();
    rows.pitch = rows.dim;
    return rows;
  }

  void offer(int64_t query, float score, int64_t row, Candidates* candidates) const {
    if (candidates->wants(query, score) && exclusions_.allow(query, row))
      candidates->add(query, score, row);
  }

  void take_hits(const PanelPlace& place, int64_t row, int64_t n, Worker* worker) const {
    for (int64_t i = 0; i < n; ++i) {
      const float* scores = worker->scores.scores + i * place.n_vectors * kernels_.width;
      for (uint64_t hits = worker->scores.hits[i]; hits; hits &= hits - 1) {
        const int lane = __builtin_ctzll(hits);
        offer(place.first_lane + lane, scores[lane], row + i, &worker->candidates);
      }
    }
  }

  void find_bad(const PanelPlace& place, int64_t row, int64_t n, Worker* worker) const {
    const int64_t lanes = place.n_vectors * kernels_.width;
    for (int64_t i = 0; i < n; ++i)
      if (!is_finite(worker->scores.scores + i * lanes, lanes))
        worker->first_bad = std::min(worker->first_bad, row + i);
  }

  void join(int64_t query, const MipsAnswer& answer, std::vector<uint64_t>* keys) const {
    keys->clear();
    for (const Worker& worker : workers_)
      keys->insert(keys->end(), worker.candidates.begin(query), worker.candidates.end(query));
    write_answer(question_, first_query_ + query, keys, answer);
  }

  const MipsQuestion& question_;
  const int64_t first_query_, n_queries_;
  const MipsMatrix& matrix_;
  const MipsKernels& kernels_;
  const Exclusions exclusions_;
  const bool few_;
  int few_size_ = 0;  // 2^few_size_ queries
  int64_t n_lanes_, block_rows_, chunk_rows_, n_workers_;
  std::vector<PanelPlace> panels_;
  Aligned<float> queries_;  // panel by panel, or query by query for few queries
  std::vector<Worker> workers_;
};

}  // namespace

void mips_topk(const MipsQuestion& question, const MipsMatrix& matrix, const MipsAnswer& answer,
               Threads threads) {
  check_queries(question);
  if (matrix.storage == Storage::kInt8) {
    if (!is_finite(matrix.scale, question.dim))
      throw std::invalid_argument("scale: expected finite values, got NaN or infinity");
    if (!is_finite(matrix.offset, question.dim))
      throw std::invalid_argument("offset: expected finite values, got NaN or infinity");
  }
  const int64_t candidates = threads.count * Candidates::room(question.k, matrix.n_rows);
  const int64_t query_bytes =
      question.dim * sizeof(float) + (candidates + question.n_exclude) * sizeof(uint64_t) + 1;
  const int64_t most = std::clamp<int64_t>(kGroupBytes / query_bytes, 1, kGroupQueries);
  const int64_t panel = 2 * mips_kernels(threads.isa).width;
  const int64_t group = most < panel ? most : most / panel * panel;
  for (int64_t first = 0; first < question.n_queries; first += group) {
    const int64_t n = std::min(group, question.n_queries - first);
    Search(question, first, n, matrix, threads).run(answer);
  }
}

void widen(const MipsMatrix& matrix, int64_t dim, float* out, Threads threads) {
  const auto widen_rows = mips_kernels(threads.isa).widen[static_cast<int>(matrix.storage)];
  const int64_t n_blocks = (matrix.n_rows + kChunkRows - 1) / kChunkRows;
  parallel_for(threads.count, n_blocks, [&](int64_t block) {
    const int64_t begin = block * kChunkRows, end = std::min(begin + kChunkRows, matrix.n_rows);
    widen_rows(rows_from(matrix, dim, begin), end - begin, out + begin * dim);
  });
}

void merge_topk(const float* scores, const int64_t* rows, int64_t n_parts, int64_t n_queries,
                int64_t k, const MipsAnswer& answer) {
  struct Hit {
    float score;
    int64_t row;
  };
  const auto better = [](const Hit& a, const Hit& b) {
    return a.score > b.score || (a.score == b.score && a.row < b.row);
  };
  std::vector<Hit> hits;
  for (int64_t b = 0; b < n_queries; ++b) {
    hits.clear();
    for (int64_t part = 0; part < n_parts; ++part) {
      const int64_t begin = (part * n_queries + b) * k;
      for (int64_t i = begin; i < begin + k; ++i) {
        if (rows[i] < 0) continue;
        if (std::isnan(scores[i]))
          throw std::invalid_argument("scores: expected numbers, got NaN at [" +
                                      std::to_string(part) + ", " + std::to_string(b) + ", " +
                                      std::to_string(i - begin) + "]");
        hits.push_back({scores[i], rows[i]});
      }
    }
    const int64_t n = std::min<int64_t>(k, hits.size());
    std::partial_sort(hits.begin(), hits.begin() + n, hits.end(), better);
    for (int64_t i = 0; i < k; ++i) {
      answer.scores[b * k + i] = i < n ? hits[i].score : -kInfinity;
      answer.rows[b * k + i] = i < n ? hits[i].row : -1;
    }
  }
}

}  // namespace fastrag

// The C++ of the index without Python: searches, each against one std::fma after another, and the
// gather of tokens. test_sanitizers.py builds it with sanitizers and runs it. Buffers end where the
// data does, so that a step beyond is seen.
//
//     driver isas | shapes | widen | passes | digits | threads | fork | gather
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "checks.h"
#include "expect.h"
#include "mips/mips.h"
#include "retrieval/gather.h"

namespace {

using fastrag::Isa;
using fastrag::Storage;
using fastrag::Threads;

struct Answer {
  std::vector<float> scores;
  std::vector<int64_t> rows;

  bool operator==(const Answer& other) const {
    return rows == other.rows &&
           !std::memcmp(scores.data(), other.scores.data(), scores.size() * sizeof(float));
  }
};

struct Problem {
  int64_t n_queries, n_rows, dim, pitch, k, n_exclude;
  std::vector<float> query_emb;
  std::unique_ptr<float[]> index_emb;
  std::unique_ptr<bool[]> removed;
  std::vector<int64_t> exclude;
  Storage storage;
  std::unique_ptr<char[]> stored;
  std::vector<float> scale, offset;

  Problem(std::mt19937* random, int64_t n_queries, int64_t n_rows, int64_t dim, int64_t gap,
          int64_t k, int64_t n_exclude, bool whole)
      : n_queries(n_queries),
        n_rows(n_rows),
        dim(dim),
        pitch(dim + gap),
        k(k),
        n_exclude(n_exclude),
        query_emb(n_queries * dim),
        index_emb(new float[(n_rows - 1) * pitch + dim]),
        removed(new bool[n_rows]),
        exclude(n_queries * n_exclude) {
    std::normal_distribution<float> normal;
    const auto number = [&] {
      return whole ? std::round(2.0f * normal(*random)) : normal(*random);
    };
    std::generate(query_emb.begin(), query_emb.end(), number);
    std::fill_n(index_emb.get(), (n_rows - 1) * pitch + dim,
                std::numeric_limits<float>::quiet_NaN());
    for (int64_t i = 0; i < n_rows; ++i) std::generate_n(&index_emb[i * pitch], dim, number);
    std::generate_n(removed.get(), n_rows, [&] { return (*random)() % 4 == 0; });
    std::generate(exclude.begin(), exclude.end(),
                  [&] { return static_cast<int64_t>((*random)() % (n_rows + 1)) - 1; });
    store(Storage::kFloat32);
  }

  // The matrix as `storage` holds it, in a buffer that ends with the last number. Numbers become
  // halves of whole numbers, which every storage has.
  void store(Storage to) {
    storage = to;
    const int64_t size = to == Storage::kInt8 ? 1 : to == Storage::kFloat32 ? 4 : 2;
    const int64_t n = (n_rows - 1) * pitch + dim;
    stored.reset(new char[n * size]);
    scale.assign(dim, 0.5f);
    offset.assign(dim, 1.0f);
    for (int64_t i = 0; i < n; ++i) {
      float& x = index_emb[i];
      const bool finite = std::isfinite(x);
      if (to != Storage::kFloat32 && finite) x = std::round(2.0f * x) / 2.0f;
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      uint32_t written = bits;
      if (to == Storage::kBfloat16) written = bits >> 16;
      if (to == Storage::kFloat16)
        written = !finite ? 0x7e00 : (bits >> 16 & 0x8000) | (x == 0.0f ? 0 : half_of(bits));
      if (to == Storage::kInt8)
        written = finite ? static_cast<uint32_t>(static_cast<int>(2.0f * (x - 1.0f))) : 0;
      std::memcpy(&stored[i * size], &written, size);
    }
  }

  // Exponent and fraction of a float16, from the bits of a float32 that is one, and not small.
  static uint32_t half_of(uint32_t bits) {
    return ((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 1023);
  }

  Answer search(Threads threads) const {
    Answer found{std::vector<float>(n_queries * k), std::vector<int64_t>(n_queries * k)};
    fastrag::mips_topk(
        {query_emb.data(), n_queries, dim, k, removed.get(), exclude.data(), n_exclude},
        {stored.get(), n_rows, pitch, storage, scale.data(), offset.data()},
        {found.scores.data(), found.rows.data()}, threads);
    return found;
  }

  // The same through int8 codes of the float32 rows, the far ones of which are clamped.
  Answer search_by_codes(Threads threads) const {
    std::unique_ptr<int8_t[]> codes(new int8_t[n_rows * dim]);
    const std::vector<float> step(dim, 0.02f), centre(dim, 0.1f);
    for (int64_t i = 0; i < n_rows; ++i)
      for (int64_t d = 0; d < dim; ++d) {
        const float code = std::round((index_emb[i * pitch + d] - centre[d]) / step[d]);
        codes[i * dim + d] = static_cast<int8_t>(std::fmin(std::fmax(code, -127.0f), 127.0f));
      }
    std::vector<float> code_norm(n_rows), rest_norm(n_rows);
    std::vector<int32_t> code_sum(n_rows);
    const fastrag::CodeBounds bounds{code_norm.data(), rest_norm.data(), code_sum.data()};
    const fastrag::MipsMatrix matrix{index_emb.get(), n_rows, pitch};
    const fastrag::MipsMatrix coded{codes.get(),    n_rows,      dim,
                                    Storage::kInt8, step.data(), centre.data()};
    fastrag::measure_codes(matrix, coded, dim, bounds, threads);
    // The leading coordinates are the first ones.
    fastrag::LeadCodes lead{};
    lead.n_lead = (dim + 1) / 2;
    std::vector<float> rotation(dim * lead.n_lead), lead_norm(n_rows), tail_norm(n_rows);
    for (int64_t j = 0; j < lead.n_lead; ++j) rotation[j * lead.n_lead + j] = 1.0f;
    std::unique_ptr<int8_t[]> lead_codes(new int8_t[n_rows * lead.n_lead]);
    std::vector<int32_t> lead_sum(n_rows);
    lead.codes = {lead_codes.get(), n_rows, lead.n_lead, Storage::kInt8};
    lead.bounds = {lead_norm.data(), tail_norm.data(), lead_sum.data()};
    lead.rotation = rotation.data();
    lead.step = 0.02;
    lead.share = 0.001;
    fastrag::make_lead_codes(matrix, centre.data(), dim, lead, threads);
    Answer found{std::vector<float>(n_queries * k), std::vector<int64_t>(n_queries * k)};
    fastrag::mips_topk_by_codes(
        {query_emb.data(), n_queries, dim, k, removed.get(), exclude.data(), n_exclude}, matrix,
        coded, bounds, &lead, {found.scores.data(), found.rows.data()}, threads);
    return found;
  }

  Answer expected() const {
    Answer best;
    for (int64_t b = 0; b < n_queries; ++b) {
      std::vector<std::pair<float, int64_t>> hits;
      const auto begin = exclude.begin() + b * n_exclude;
      for (int64_t i = 0; i < n_rows; ++i) {
        if (removed[i] || std::find(begin, begin + n_exclude, i) != begin + n_exclude) continue;
        float score = 0.0f;
        for (int64_t d = 0; d < dim; ++d)
          score = std::fma(query_emb[b * dim + d], index_emb[i * pitch + d], score);
        hits.emplace_back(-score, i);
      }
      std::sort(hits.begin(), hits.end());
      hits.resize(k, {std::numeric_limits<float>::infinity(), -1});
      for (const auto& [minus_score, row] : hits) {
        best.scores.push_back(0.0f - minus_score);
        best.rows.push_back(row);
      }
    }
    return best;
  }
};

std::vector<Isa> instruction_sets() {
  std::vector<Isa> found;
  for (const Isa isa : fastrag::kAllIsas)
    if (fastrag::has_isa(isa)) found.push_back(isa);
  return found;
}

void run_shapes() {
  std::mt19937 random(0);
  const auto draw = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random() % (high - low + 1));
  };
  for (int i = 0; i < 200; ++i) {
    Problem problem(&random, draw(1, i % 10 ? 20 : 120), draw(1, i % 9 ? 60 : 3000),
                    draw(1, i % 8 ? 40 : 150), draw(0, 3), draw(1, i % 7 ? 12 : 200), draw(0, 4),
                    i % 2);
    problem.store(static_cast<Storage>(i % fastrag::kStorages));
    const Answer expected = problem.expected();
    for (const Isa isa : instruction_sets())
      for (const int count : {1, 3})
        for (const bool by_codes : {false, true})
          expect((by_codes ? problem.search_by_codes({count, isa})
                           : problem.search({count, isa})) == expected,
                 "problem " + std::to_string(i) + " with " + fastrag::isa_name(isa) +
                     (by_codes ? " by codes" : ""));
  }
}

// Every number of a storage, and a rest of every length: the bits that scalar has.
void run_widen() {
  constexpr int64_t kDim = 61;
  std::unique_ptr<uint16_t[]> halves(new uint16_t[1 << 16]);
  for (int i = 0; i < 1 << 16; ++i) halves[i] = static_cast<uint16_t>(i);
  std::vector<float> scale(kDim), offset(kDim);
  for (int64_t d = 0; d < kDim; ++d) {
    scale[d] = 0.3f + 0.01f * d;
    offset[d] = 1.0f / (d + 3);
  }
  for (const Storage storage : {Storage::kBfloat16, Storage::kFloat16, Storage::kInt8})
    for (int64_t dim = kDim - 15; dim <= kDim; ++dim) {
      const int64_t n_rows = (storage == Storage::kInt8 ? 1 << 17 : 1 << 16) / dim;
      const auto wide = [&](Isa isa) {
        std::vector<float> out(n_rows * dim);
        fastrag::widen({halves.get(), n_rows, dim, storage, scale.data(), offset.data()}, dim,
                       out.data(), {1, isa});
        return out;
      };
      const std::vector<float> expected = wide(Isa::kScalar);
      for (const Isa isa : instruction_sets())
        expect_same(wide(isa), expected,
                    std::string("widen with ") + fastrag::isa_name(isa) + ", storage " +
                        std::to_string(static_cast<int>(storage)) + ", dim " + std::to_string(dim));
    }
}

void run_not_finite() {
  std::mt19937 random(0);
  for (const int64_t row : {0, 29, 500, 999}) {
    Problem problem(&random, row == 29 ? 3 : 40, 1000, 17, 1, 3, 0, false);
    problem.index_emb[row * problem.pitch + 16] = std::numeric_limits<float>::infinity();
    problem.store(Storage::kFloat32);
    for (const Isa isa : instruction_sets()) {
      std::string message;
      try {
        problem.search({3, isa});
      } catch (const std::invalid_argument& error) {
        message = error.what();
      }
      const std::string ending = "in row " + std::to_string(row);
      expect(message.size() > ending.size() &&
                 message.compare(message.size() - ending.size(), ending.size(), ending) == 0,
             "the row that is not finite: " + message);
    }
  }
}

void run_merge() {
  std::mt19937 random(0);
  const Problem problem(&random, 5, 900, 8, 0, 10, 0, true);
  const Answer expected = problem.expected();
  Answer parts, found = expected;
  for (int64_t begin = 0; begin < problem.n_rows; begin += 300) {
    Answer part{std::vector<float>(50), std::vector<int64_t>(50)};
    fastrag::mips_topk(
        {problem.query_emb.data(), 5, 8, 10, problem.removed.get() + begin, nullptr, 0},
        {&problem.index_emb[begin * 8], 300, 8}, {part.scores.data(), part.rows.data()},
        {1, Isa::kScalar});
    for (int64_t& row : part.rows) row += row < 0 ? 0 : begin;
    parts.scores.insert(parts.scores.end(), part.scores.begin(), part.scores.end());
    parts.rows.insert(parts.rows.end(), part.rows.begin(), part.rows.end());
  }
  std::fill(found.rows.begin(), found.rows.end(), -7);
  fastrag::merge_topk(parts.scores.data(), parts.rows.data(), 3, 5, 10,
                      {found.scores.data(), found.rows.data()});
  expect(found == expected, "merge");
}

// Callers share the pool and the matrix; each has its own answer.
void run_threads() {
  std::mt19937 random(0);
  const Problem problem(&random, 20, 6000, 24, 0, 7, 2, false);
  const Answer expected = problem.expected();
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&, i] {
      for (int repeat = 0; repeat < 10; ++repeat)
        expect((i % 2 ? problem.search_by_codes({1 + i, fastrag::best_isa()})
                      : problem.search({1 + i, fastrag::best_isa()})) == expected,
               "search beside others");
    });
  for (std::thread& caller : callers) caller.join();
}

void run_fork() {
  std::mt19937 random(0);
  const Problem problem(&random, 20, 6000, 24, 0, 7, 2, false);
  const Threads threads{3, fastrag::best_isa()};
  const Answer expected = problem.expected();
  expect(problem.search(threads) == expected, "search before the fork");
  const pid_t child = fork();
  if (child == 0) _exit(problem.search(threads) == expected ? 0 : 1);
  int status = -1;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "search in the child");
  expect(problem.search(threads) == expected, "search after the fork");
}

// Passages of 0 to 40 tokens, then offsets that leave the tokens, each of which is refused.
void run_gather() {
  std::mt19937 random(0);
  constexpr int64_t kPassages = 50;
  std::unique_ptr<int64_t[]> offsets(new int64_t[kPassages + 1]{});
  for (int64_t i = 0; i < kPassages; ++i) offsets[i + 1] = offsets[i] + random() % 41;
  const int64_t n_tokens = offsets[kPassages];
  std::unique_ptr<int32_t[]> tokens(new int32_t[n_tokens]);
  std::generate_n(tokens.get(), n_tokens, [&] { return static_cast<int32_t>(random() % 30000); });
  const fastrag::TokenTable table{tokens.get(), n_tokens, offsets.get(), kPassages};

  std::unique_ptr<int64_t[]> rows(new int64_t[kPassages + 1]);
  for (int64_t i = 0; i <= kPassages; ++i) rows[i] = kPassages - 1 - i;  // the last one: missing
  const auto gather = [&](int64_t max_length) {
    std::unique_ptr<int64_t[]> lengths(new int64_t[kPassages + 1]);
    const int64_t width =
        fastrag::passage_lengths(table, rows.get(), kPassages + 1, max_length, lengths.get());
    std::unique_ptr<int64_t[]> ids(new int64_t[(kPassages + 1) * width]);
    fastrag::gather_tokens(table, rows.get(), kPassages + 1, width, ids.get());
    for (int64_t i = 0; i <= kPassages; ++i)
      for (int64_t t = 0; t < width; ++t)
        expect(ids[i * width + t] == (t < lengths[i] ? tokens[offsets[rows[i]] + t] : 0),
               "token " + std::to_string(t) + " of row " + std::to_string(rows[i]));
  };
  for (const int64_t max_length : {0, 1, 7, 100}) gather(max_length);
  constexpr int64_t kFar = std::numeric_limits<int64_t>::max();
  for (const int64_t i : {int64_t{0}, kPassages / 2, kPassages})
    for (const int64_t bad : {-kFar - 1, int64_t{-1}, n_tokens + 1, kFar}) {
      const int64_t good = std::exchange(offsets[i], bad);
      bool refused = false;
      try {
        gather(100);
      } catch (const std::invalid_argument&) {
        refused = true;
      }
      expect(refused, "offset " + std::to_string(bad));
      offsets[i] = good;
    }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc == 2 ? argv[1] : "";
  if (what == "isas") {
    for (const Isa isa : instruction_sets()) std::printf("%s ", fastrag::isa_name(isa));
    std::printf("\n");
    return 0;
  } else if (what == "widen") {
    run_widen();
  } else if (what == "passes") {
    run_passes();
  } else if (what == "digits") {
    run_digits();
  } else if (what == "shapes") {
    run_shapes();
    run_not_finite();
    run_merge();
  } else if (what == "threads") {
    run_threads();
  } else if (what == "fork") {
    run_fork();
  } else if (what == "gather") {
    run_gather();
  } else {
    expect(false, "expected isas, shapes, widen, passes, digits, threads, fork or gather");
  }
  std::printf("%s: good\n", what.c_str());
}

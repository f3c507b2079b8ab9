// Exact maximum inner product search: the k rows of a matrix with the largest products.
//
//     score[b, n] = fma(q[b, D-1], x[n, D-1], ... fma(q[b, 1], x[n, 1], fma(q[b, 0], x[n, 0], 0)))
//
// in float32: one rounding for each element, in the order of the elements. This order is that of a
// register tile of any shape, one accumulator for each pair, so a score has the same bits for any
// number of queries and threads, any instruction set and any way to cut the rows into shards.
// The result is ordered by (score descending, row ascending); 0 and -0 are equal.
//
// Memory: row-major, sizes and pitches in elements (int64). The matrix is read in place and needs
// no alignment beyond that of its elements. Beside the arguments a search takes at most about
// 32 MiB, however many rows there are (more only where k times the number of threads asks for it).
#pragma once

#include <cstdint>

#include "row_pass.h"  // Isa, Threads

namespace fastrag {

// Rows are numbered in 32 bits while they are candidates.
constexpr int64_t kMaxRows = (int64_t{1} << 32) - 1;

struct MipsQuestion {
  const float* query_emb;  // [n_queries, dim]
  int64_t n_queries;       // B
  int64_t dim;             // D
  int64_t k;
  const bool* removed;     // [n_rows], rows that no query may get; or null
  const int64_t* exclude;  // [n_queries, n_exclude], rows that this query may not get, -1: none
  int64_t n_exclude;
};

// How the numbers of the matrix are stored. The search is over the float32 that each one stands
// for: kInt8 for fma(scale[d], code, offset[d]).
enum class Storage { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3 };
constexpr int kStorages = 4;

struct MipsMatrix {
  const void* data;  // [n_rows, dim]
  int64_t n_rows;    // N, at most kMaxRows
  int64_t pitch;
  Storage storage = Storage::kFloat32;
  const float* scale = nullptr;   // [dim], kInt8 only
  const float* offset = nullptr;  // [dim], kInt8 only
};

// [n_queries, k]; where fewer than k rows are left: -inf and row -1.
struct MipsAnswer {
  float* scores;
  int64_t* rows;
};

// Throws std::invalid_argument, which names the first row, where a query or a row of the matrix is
// not finite or a product overflows; what the answer holds then is undefined. Excluded rows count.
void mips_topk(const MipsQuestion& question, const MipsMatrix& matrix, const MipsAnswer& answer,
               Threads threads);

// The numbers of the matrix as float32, [n_rows, dim].
void widen(const MipsMatrix& matrix, int64_t dim, float* out, Threads threads);

// The answers of n_parts searches, each [n_queries, k] and in any order, as one: the best k by
// (score descending, row ascending). Rows below 0 are missing.
void merge_topk(const float* scores, const int64_t* rows, int64_t n_parts, int64_t n_queries,
                int64_t k, const MipsAnswer& answer);

}  // namespace fastrag

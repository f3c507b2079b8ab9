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

#include "isa.h"

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

// What a search through int8 codes has to know of each row x of a matrix, x = y + rest with
// y = offset + scale * code: none of it depends on a query.
struct CodeBounds {
  float* code_norm;  // [n_rows], at least |code|
  float*
      rest_norm;  // [n_rows], at least |rest| + g |x|, g |q| |x| being what rounding adds to q . x
  int32_t* code_sum;  // [n_rows]
};

// codes: kInt8. Throws std::invalid_argument for a row of the matrix that is not finite.
void measure_codes(const MipsMatrix& matrix, const MipsMatrix& codes, int64_t dim,
                   const CodeBounds& bounds, Threads threads);

// The answer of mips_topk(question, matrix), to the bit, read off the codes of the matrix but for
// those rows that could be in it. With w = q scale and its rounding to whole multiples of t,
//
//     | q . x - q . offset - t sum_d round(w_d / t) code_d | <= |w - t round(w / t)| |code| + |q|
//     |rest|
//
// so a row is left out where k others have larger lower bounds than its upper bound. What this
// leaves is bounded again, with w - t round(w / t) rounded to multiples of a finer unit too, before
// any row of the matrix is read. The matrix is float32; a product that overflows there is found
// only among the rows that are looked at. Returns how many rows of the matrix were, over all
// queries.
int64_t mips_topk_by_codes(const MipsQuestion& question, const MipsMatrix& matrix,
                           const MipsMatrix& codes, const CodeBounds& bounds,
                           const MipsAnswer& answer, Threads threads);

// The numbers of the matrix as float32, [n_rows, dim].
void widen(const MipsMatrix& matrix, int64_t dim, float* out, Threads threads);

// The answers of n_parts searches, each [n_queries, k] and in any order, as one: the best k by
// (score descending, row ascending). Rows below 0 are missing.
void merge_topk(const float* scores, const int64_t* rows, int64_t n_parts, int64_t n_queries,
                int64_t k, const MipsAnswer& answer);

}  // namespace fastrag

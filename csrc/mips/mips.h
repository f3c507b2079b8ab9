// Exact maximum inner product search: the k rows of a matrix with the largest products.
//
//     score[b, n] = fma(q[b, D-1], x[n, D-1], ... fma(q[b, 1], x[n, 1], fma(q[b, 0], x[n, 0], 0)))
//
// in float32: one rounding for each element, in the order of the elements. Register tiles of any
// shape add in this order, with one accumulator for each pair, so a score has the same bits for any
// number of queries and threads, any instruction set and any split of the rows into shards. The
// result is ordered by (score descending, row ascending); 0 and -0 are equal.
//
// Memory: row-major, sizes and pitches in elements (int64). The matrix is read in place and needs
// no alignment beyond that of its elements. A search allocates at most about 32 MiB for any number
// of rows, and more only if k times the number of threads is large.
#pragma once

#include <cmath>
#include <cstdint>

#include "isa.h"

namespace fastrag {

// The row number of a candidate has 32 bits.
constexpr int64_t kMaxRows = (int64_t{1} << 32) - 1;

struct MipsQuestion {
  const float* query_emb;  // [n_queries, dim]
  int64_t n_queries;       // B
  int64_t dim;             // D
  int64_t k;
  const bool* removed;     // [n_rows], rows excluded for all queries; or null
  const int64_t* exclude;  // [n_queries, n_exclude], rows excluded for one query, -1 for no row
  int64_t n_exclude;
};

// Storage format of the numbers of the matrix. The search uses the float32 number that each one
// represents: kInt8 represents fma(scale[d], code, offset[d]).
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

// [n_queries, k]; score -inf and row -1 if fewer than k rows are left.
struct MipsAnswer {
  float* scores;
  int64_t* rows;
};

// Throws std::invalid_argument, which names the first row, if a query or a row of the matrix is not
// finite or a product overflows, in excluded rows too. The answer is undefined then.
void mips_topk(const MipsQuestion& question, const MipsMatrix& matrix, const MipsAnswer& answer,
               Threads threads);

// A bound of the rounding error of a float32 sum of n products, relative to the sum of their sizes.
inline double sum_error(int64_t n) { return n * 0x1p-24 / (1.0 - n * 0x1p-24); }

// Values of each row x of a matrix for a search through int8 codes; they do not depend on a query.
// x = y + rest with y = offset + scale * code, and g |q| |x| bounds the rounding error of q . x.
struct CodeBounds {
  float* code_norm;   // [n_rows], at least |code|
  float* rest_norm;   // [n_rows], at least |rest| + g |x|
  int32_t* code_sum;  // [n_rows]
};

// Codes of few coordinates of the rows in an orthonormal basis whose first vectors are those along
// which the rows differ most. With P [n_lead, dim] these first vectors, z = x - offset, p = P q,
// and t the part of a vector that is orthogonal to all of P,
//
//     |q . z - step p . code| <= |p| |P z - step code| + |t(q)| |t(z)|
//
// so most rows are dropped by n_lead codes. P is orthonormal up to `defect`, a bound of
// |P P^T - I|, and the bounds of a row contain this and all rounding errors.
struct LeadCodes {
  MipsMatrix codes;       // [n_rows, n_lead], kInt8 without factors
  CodeBounds bounds;      // code_norm is at least |P z - step code| / share too; rest_norm: |t(z)|
  const float* rotation;  // P
  int64_t n_lead;
  double step;
  double share;  // of the rest in |code|, for a usual row
  double defect;

  // A bound of the rounding error of P x / |x|, from float32 sums of D products in any order.
  double lost(int64_t dim) const {
    return sum_error(dim) * std::sqrt(1.0 * n_lead) * (1.0 + defect);
  }
};

// codes: kInt8. Throws std::invalid_argument for a row of the matrix that is not finite.
void measure_codes(const MipsMatrix& matrix, const MipsMatrix& codes, int64_t dim,
                   const CodeBounds& bounds, Threads threads);

// Writes lead.codes and lead.bounds of finite rows, whose offset is [dim].
void make_lead_codes(const MipsMatrix& matrix, const float* offset, int64_t dim,
                     const LeadCodes& lead, Threads threads);

// Numbers of rows that a search has read, summed over the queries.
struct RowsRead {
  int64_t rows;   // of the matrix
  int64_t codes;  // of the codes; those of `lead` do not count
};

// The answer of mips_topk(question, matrix), bit for bit, from the codes of all rows and only those
// rows of the matrix that could be in the answer. With w = q scale rounded to multiples of t,
//
//     | q . x - q . offset - t sum_d round(w_d / t) code_d |
//         <= |w - t round(w / t)| |code| + |q| |rest|
//
// A row is dropped if k others have larger lower bounds than its upper bound. With `lead`, which
// may be null and has the offset of the codes, its bound is tried first, and the codes are read of
// the rows that it leaves; where it leaves many, the codes of all rows are. The remaining rows are
// bounded again, with w - t round(w / t) rounded to multiples of a finer unit, before any row of
// the matrix is read. The matrix is float32. An overflowing product is only detected in the rows
// that are read.
RowsRead mips_topk_by_codes(const MipsQuestion& question, const MipsMatrix& matrix,
                            const MipsMatrix& codes, const CodeBounds& bounds,
                            const LeadCodes* lead, const MipsAnswer& answer, Threads threads);

// The numbers of the matrix as float32, [n_rows, dim].
void widen(const MipsMatrix& matrix, int64_t dim, float* out, Threads threads);

// Merges the answers of n_parts searches, each [n_queries, k] in any order, into the best k by
// (score descending, row ascending). Rows below 0 are missing.
void merge_topk(const float* scores, const int64_t* rows, int64_t n_parts, int64_t n_queries,
                int64_t k, const MipsAnswer& answer);

}  // namespace fastrag

// The part of the search that is compiled once per instruction set: one tile of scores.
//
// There are two kinds of tile: many queries in the lanes of vectors with rows broadcast, or rows in
// the lanes with few queries broadcast, which converts rows of any storage in registers. Both add
// in the same order.
//
// These functions do not allocate, throw or use templates of the standard library: the linker may
// keep any one of several copies of a template function, and that copy must not need AVX-512.
#pragma once

#include <cstdint>

#include "mips/mips.h"  // Storage

namespace fastrag {

constexpr int kMaxTileRows = 14;
constexpr int kMaxPanelVectors = 3;
constexpr int kMaxPanelLanes = 48;

// Queries in the lanes of vectors: [dim, n_vectors * width], element d of all of them next to each
// other. Lanes without a query hold zeros and a threshold of +inf.
struct Panel {
  const float* queries;
  const float* thresholds;  // [n_vectors * width]: a row with a larger score is a candidate
};

struct TileRows {
  const float* data;  // [rows, dim]
  int64_t pitch;
  int64_t dim;
  const float* ahead;  // rows of the same pitch that will be read next
};

struct TileScores {
  uint64_t hits[kMaxTileRows];                  // bit = lane; one word for each row
  float scores[kMaxTileRows * kMaxPanelLanes];  // [rows, n_vectors * width]
};

enum class TileResult { kNoHit, kHits, kNotFinite };

constexpr int kMaxFewQueries = 8;
constexpr int kMaxFewRows = 64;
constexpr int kFewSizes = 4;  // 1, 2, 4 and 8 queries
constexpr int64_t kLongRow = 256;

// Rows in their storage format.
struct StoredRows {
  const void* data;
  int64_t pitch;  // elements
  int64_t dim;
  const float* scale;   // [dim], kInt8 only
  const float* offset;  // [dim], kInt8 only
};

struct FewQueries {
  const float* queries;  // [1, 2, 4 or 8, dim]
  const float* thresholds;
};

struct FewScores {
  uint64_t hits[kMaxFewQueries];               // bit = row; one word for each query
  float scores[kMaxFewQueries * kMaxFewRows];  // [queries, rows]
};

constexpr int kMaxGathered = 16;
constexpr int kAdded = 4;

struct FewKernel {
  int rows;  // of a tile
  TileResult (*tile)(const FewQueries&, const StoredRows&, FewScores*);
};

struct MipsKernels {
  int width;    // lanes of a vector
  int rows;     // of a tile
  bool spread;  // whether all panels share the prefetching of the next block
  // One for each number of vectors of a panel, from 1.
  TileResult (*tile[kMaxPanelVectors])(const Panel&, const TileRows&, TileScores*);
  FewKernel few[kStorages][kFewSizes];
  FewKernel few_long[kFewSizes];  // for float32 rows of at least kLongRow numbers from memory
  // Converts n_rows rows to float32, [n_rows, dim].
  void (*widen[kStorages])(const StoredRows&, int64_t n_rows, float* out);
  // Scores of one query with `width` rows at any addresses.
  void (*gathered)(const float* query, const float* const* rows, int64_t dim, float* scores);
  // sum_d x[d] y[d], with the terms in 32 lanes that are added as a tree. Prefetches n numbers of
  // `next`.
  float (*dot)(const float* x, const float* y, const float* next, int64_t n);
  // out += sum_i factors[i] rows[i] for i < kAdded, as a tree.
  void (*add_scaled)(const float* factors, const float* const* rows, int64_t n, float* out);
};

// Products of queries rounded to 8-bit integers (digits) with int8 codes of rows. There are two
// kinds of tile as well: many queries in the lanes of vectors, or few queries with the components
// of one query in the lanes.
constexpr int kMaxDigitRows = 32;
constexpr int kMaxDigitLanes = 32;

struct DigitPanel {
  // The digit plus `bias`, and 0 beyond dim: [dim / 4, n_vectors * width, 4] for many queries,
  // [dim / (4 * width), queries, 4 * width] for few.
  const uint8_t* digits;
  const float* unit;  // the value of a digit of 1; this and the following arrays: one per lane
  const float* rest;  // |w - unit digits|
  const float* norm;  // |q|
  const float* threshold;
};

struct CodeRows {
  const int8_t* codes;  // [rows, dim]
  int64_t pitch;
  int64_t dim;
  const float* code_norm;
  const float* rest_norm;
  const int32_t* code_sum;
};

// With many queries, a line of n_vectors * width lanes for each row. With few queries, a line for
// as many rows as fill a vector with all queries, in lane query * (rows per line) + row.
struct DigitScores {
  uint64_t hits[kMaxDigitRows];  // bit = lane; set if the upper bound reaches the threshold
  float upper[kMaxDigitRows * kMaxDigitLanes];
  float lower[kMaxDigitRows * kMaxDigitLanes];
};

using DigitTile = bool (*)(const DigitPanel&, const CodeRows&, DigitScores*);  // true: hits

struct DigitKernels {
  int width;
  int rows;
  int depth;          // `tile` reads digits and rows up to the next multiple of so many components
  int largest;        // largest digit
  int bias;           // added to each digit
  DigitTile tile[2];  // with panels of 1 and 2 vectors
  // `width` rows with 1, 2, 4 and 8 queries; null if so many queries fill the lanes of a tile.
  // Reads rows up to the next multiple of 4 * width bytes.
  DigitTile few[kFewSizes];
  // A thread calls these before and after its calls of `tile`; null if there is nothing to do.
  void (*enter)();
  void (*leave)();
  // The sums of one query with `width` rows at any addresses, which are read as by `few`.
  void (*gathered)(const uint8_t* digits, const int8_t* const* rows, int64_t dim, int32_t* sums);
};

// Null if this build lacks the instruction set.
const MipsKernels* scalar_mips_kernels();
const MipsKernels* avx2_mips_kernels();
const MipsKernels* avx512_mips_kernels();
const MipsKernels* neon_mips_kernels();
const DigitKernels* scalar_digit_kernels();
const DigitKernels* avx2_digit_kernels();
const DigitKernels* vnni_digit_kernels();
const DigitKernels* amx_digit_kernels();
const DigitKernels* emulated_amx_digit_kernels();  // in every build
const DigitKernels* neon_digit_kernels();
const DigitKernels* dotprod_digit_kernels();

}  // namespace fastrag

// The part of the search that is compiled once per instruction set: one tile of scores.
//
// Two tiles: many queries in the lanes of vectors and rows broadcast, or few queries broadcast and
// rows in the lanes, which rows of any storage reach through registers. Both add in one order.
//
// Nothing here allocates, throws or names a template of the standard library: a function that the
// linker shares between translation units must not be one that needs AVX-512.
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
  const float* thresholds;  // [n_vectors * width]: who scores above is a candidate
};

struct TileRows {
  const float* data;  // [rows, dim]
  int64_t pitch;
  int64_t dim;
  const float* ahead;  // rows of the same pitch that will be wanted after these
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

// Rows as they are stored.
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
  int width;  // lanes of a vector
  int rows;   // of a tile
  // One for each number of vectors of a panel, from 1.
  TileResult (*tile[kMaxPanelVectors])(const Panel&, const TileRows&, TileScores*);
  FewKernel few[kStorages][kFewSizes];
  FewKernel few_long[kFewSizes];  // for float32 rows from kLongRow on that come from memory
  // n_rows rows as float32, [n_rows, dim].
  void (*widen[kStorages])(const StoredRows&, int64_t n_rows, float* out);
  // Scores of one query with `width` rows from anywhere.
  void (*gathered)(const float* query, const float* const* rows, int64_t dim, float* scores);
  // sum_d x[d] y[d], the terms in 32 lanes that are added as a tree. Fetches n numbers of `next`.
  float (*dot)(const float* x, const float* y, const float* next, int64_t n);
  // out += sum of factors[i] rows[i] over the kAdded of them, as a tree.
  void (*add_scaled)(const float* factors, const float* const* rows, int64_t n, float* out);
};

// Whole numbers of queries with the codes of rows, both as digits of eight bits. Two tiles here
// too: many queries in the lanes of vectors, or few queries and a vector of components of one.
struct DigitPanel {
  // The digit plus `bias`, and 0 beyond dim: [dim / 4, n_vectors * width, 4] for many queries,
  // [dim / (4 * width), queries, 4 * width] for few.
  const uint8_t* digits;
  const float* unit;  // what follows: of each lane. Value of a one
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

// Scores of many queries: a line for each row, of n_vectors * width lanes. Of few: a line for as
// many rows as fill a vector with all queries, lane query * rows of the line + row.
struct DigitScores {
  uint64_t hits[kMaxTileRows];  // bit = lane, upper bound not below the threshold
  float upper[kMaxTileRows * kMaxPanelLanes];
  float lower[kMaxTileRows * kMaxPanelLanes];
};

struct DigitKernels {
  int width;
  int rows;
  int largest;                                                        // digit
  int bias;                                                           // what is added to digits
  bool (*tile[2])(const DigitPanel&, const CodeRows&, DigitScores*);  // true: hits
  // `width` rows with 1, 2, 4 and 8 queries; null where these fill the lanes of a tile. Reads rows
  // up to the next multiple of 4 * width bytes.
  bool (*few[kFewSizes])(const DigitPanel&, const CodeRows&, DigitScores*);
};

// Null where this build lacks the instruction set.
const MipsKernels* scalar_mips_kernels();
const MipsKernels* avx2_mips_kernels();
const MipsKernels* avx512_mips_kernels();
const MipsKernels* neon_mips_kernels();
const DigitKernels* scalar_digit_kernels();
const DigitKernels* avx2_digit_kernels();
const DigitKernels* vnni_digit_kernels();
const DigitKernels* neon_digit_kernels();
const DigitKernels* dotprod_digit_kernels();

}  // namespace fastrag

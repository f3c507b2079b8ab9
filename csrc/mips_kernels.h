// The part of the search that is compiled once per instruction set: one tile of scores.
//
// Nothing here allocates, throws or names a template of the standard library: a function that the
// linker shares between translation units must not be one that needs AVX-512.
#pragma once

#include <cstdint>

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

struct MipsKernels {
  int width;  // lanes of a vector
  int rows;   // rows of a tile
  // One for each number of vectors of a panel, from 1.
  TileResult (*tile[kMaxPanelVectors])(const Panel&, const TileRows&, TileScores*);
};

// Null where this build lacks the instruction set.
const MipsKernels* scalar_mips_kernels();
const MipsKernels* avx2_mips_kernels();
const MipsKernels* avx512_mips_kernels();

}  // namespace fastrag

// The tile on a vector type Vec, of which each mips_<instruction set>.cpp defines its own before it
// includes this file, inside its unnamed namespace, together with kTileRows and, for each number
// of vectors in a panel, how many rows the registers hold at a time (a divisor of kTileRows).

using F = Vec::F;

constexpr int kLineFloats = 16;  // of a cache line, the unit of prefetching
constexpr int kSteps = 4;        // elements that one turn of the loop takes

// Scores of kRows rows with a panel of kVectors: for each element d, an outer product of kRows
// broadcasts and kVectors vectors of queries. False unless all of them are finite.
template <int kVectors, int kRows>
inline bool outer_products(const Panel& panel, const TileRows& rows, uint64_t* hits,
                           float* scores) {
  constexpr int64_t kLanes = kVectors * Vec::kWidth;
  F sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec::set(0.0f);

  const auto step = [&](int64_t d) __attribute__((always_inline)) {
    F query[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v)
      query[v] = Vec::load(panel.queries + d * kLanes + v * Vec::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const F x = Vec::set(rows.data[r * rows.pitch + d]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec::fma(query[v], x, sum[r][v]);
    }
  };
  int64_t d = 0;
  for (; d + kLineFloats <= rows.dim; d += kLineFloats) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(rows.ahead + r * rows.pitch + d);
    for (int64_t e = d; e < d + kLineFloats; e += kSteps)
#pragma GCC unroll 16
      for (int i = 0; i < kSteps; ++i) step(e + i);
  }
  for (; d < rows.dim; ++d) step(d);

  // 0 * score is 0 for a finite score and NaN for all others.
  F zero = Vec::set(0.0f);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    hits[r] = 0;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      zero = Vec::fma(sum[r][v], Vec::set(0.0f), zero);
      const F threshold = Vec::load(panel.thresholds + v * Vec::kWidth);
      hits[r] |= Vec::greater(sum[r][v], threshold) << (v * Vec::kWidth);
      Vec::store(scores + r * kLanes + v * Vec::kWidth, sum[r][v]);
    }
  }
  return Vec::all_zero(zero);
}

template <int kVectors, int kRows>
TileResult tile(const Panel& panel, const TileRows& rows, TileScores* out) {
  constexpr int64_t kLanes = kVectors * Vec::kWidth;
  static_assert(kTileRows % kRows == 0 && kTileRows <= kMaxTileRows, "rows of a tile");
  static_assert(kLanes <= kMaxPanelLanes, "a word of hits, and the buffer of scores");
  bool all_finite = true;
  uint64_t any = 0;
  for (int r = 0; r < kTileRows; r += kRows) {
    const TileRows part{rows.data + r * rows.pitch, rows.pitch, rows.dim,
                        rows.ahead + r * rows.pitch};
    all_finite &=
        outer_products<kVectors, kRows>(panel, part, out->hits + r, out->scores + r * kLanes);
  }
  for (int r = 0; r < kTileRows; ++r) any |= out->hits[r];
  return !all_finite ? TileResult::kNotFinite : any ? TileResult::kHits : TileResult::kNoHit;
}

// The tiles for a vector type Vec. Each mips_<instruction set>.cpp defines its own Vec, kTileRows
// and its divisors kRowsOf1, kRowsOf2 and kRowsOf3 (how many rows the registers hold at a time for
// a panel of 1, 2 or 3 vectors) and kRowsOfOneSet (at most so many if all of them share a set of
// the L1 cache); kPrefetchTo (3 for the L1 cache, 2 for L2) and kSpreadPrefetch. It then includes
// this file inside its unnamed namespace.

using F = Vec::F;

// The compiler must not move loads across this. It then repeats a load instead of keeping its
// result in a register that the sums need.
#define FASTRAG_KEEP_LOADS asm volatile("" ::: "memory")

// Must be inlined: the compiler keeps the sums in registers only then.
#define FASTRAG_INLINE inline __attribute__((always_inline))

constexpr int kLineFloats = 16;     // floats of a cache line, the unit of prefetching
constexpr int kSteps = 4;           // elements per iteration of the loop
constexpr int kBytesOfSets = 4096;  // lines at this distance share a set of the L1 cache

// Adds the products of kSteps elements from d on, for a Vec that can multiply a vector by one
// element of another. V is Vec; it is a parameter because not every Vec has this product.
template <class V, int kVectors, int kRows>
FASTRAG_INLINE void add_by_element(const Panel& panel, const TileRows& rows, int64_t d,
                                   F (*sum)[kVectors]) {
  static_assert(V::kWidth == kSteps, "one vector of each row");
  F x[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) x[r] = Vec::load(rows.data + r * rows.pitch + d);
#pragma GCC unroll 16
  for (int i = 0; i < kSteps; ++i) {
    F query[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v)
      query[v] = Vec::load(panel.queries + ((d + i) * kVectors + v) * Vec::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] = V::fma_element(query[v], x[r], i, sum[r][v]);
  }
}

// Computes the scores of kRows rows with a panel of kVectors: for each element d, an outer product
// of kRows broadcasts and kVectors vectors of queries. Returns false if a score is not finite.
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
    for (int r = 0; r < kRows; ++r)
      __builtin_prefetch(rows.ahead + r * rows.pitch + d, 0, kPrefetchTo);
    for (int64_t e = d; e < d + kLineFloats; e += kSteps) {
      if constexpr (Vec::kByElement) {
        add_by_element<Vec, kVectors, kRows>(panel, rows, e, sum);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kSteps; ++i) step(e + i);
      }
    }
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
  if constexpr (kRows > kRowsOfOneSet)
    if (rows.pitch * sizeof(float) % kBytesOfSets == 0)
      return tile<kVectors, kRowsOfOneSet>(panel, rows, out);
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

// ---------------------------------------------------------------------------- storage

// Returns kWidth numbers from element d of a row on, as float32.
template <Storage kStorage>
struct Stored;

template <>
struct Stored<Storage::kFloat32> {
  using T = float;
  static F load(const T* p, const StoredRows&, int64_t) { return Vec::load(p); }
};

template <>
struct Stored<Storage::kBfloat16> {
  using T = uint16_t;
  static F load(const T* p, const StoredRows&, int64_t) { return Vec::load_bfloat16(p); }
};

template <>
struct Stored<Storage::kFloat16> {
  using T = uint16_t;
  static F load(const T* p, const StoredRows&, int64_t) { return Vec::load_float16(p); }
};

template <>
struct Stored<Storage::kInt8> {
  using T = int8_t;
  static F load(const T* p, const StoredRows& rows, int64_t d) {
    return Vec::fma(Vec::load(rows.scale + d), Vec::load_int8(p), Vec::load(rows.offset + d));
  }
};

// Returns the last n < kWidth numbers of a row, padded to a vector.
template <Storage kStorage>
inline F load_part(const typename Stored<kStorage>::T* p, const StoredRows& rows, int64_t d,
                   int64_t n) {
  typename Stored<kStorage>::T values[Vec::kWidth] = {};
  float scale[Vec::kWidth] = {}, offset[Vec::kWidth] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = p[i];
  if (kStorage == Storage::kInt8)
    for (int64_t i = 0; i < n; ++i) {
      scale[i] = rows.scale[d + i];
      offset[i] = rows.offset[d + i];
    }
  return Stored<kStorage>::load(values, {nullptr, 0, 0, scale, offset}, 0);
}

template <Storage kStorage>
void widen(const StoredRows& rows, int64_t n_rows, float* out) {
  const auto* data = static_cast<const typename Stored<kStorage>::T*>(rows.data);
  for (int64_t r = 0; r < n_rows; ++r, data += rows.pitch, out += rows.dim) {
    int64_t d = 0;
    for (; d + Vec::kWidth <= rows.dim; d += Vec::kWidth) {
      __builtin_prefetch(data + n_rows * rows.pitch + d);
      Vec::store(out + d, Stored<kStorage>::load(data + d, rows, d));
    }
    if (d == rows.dim) continue;
    float last[Vec::kWidth];
    Vec::store(last, load_part<kStorage>(data + d, rows, d, rows.dim - d));
    for (int64_t i = 0; d + i < rows.dim; ++i) out[d + i] = last[i];
  }
}

// ------------------------------------------------------------------------- rows from anywhere

// Without intrinsics and contraction, the lanes have the same numbers in vectors of any width.
inline float dot(const float* x, const float* y, const float* next, int64_t n) {
  constexpr int64_t kLanes = 32, kLine = 16;
  float lanes[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) {
    for (int64_t i = 0; i < kLanes; i += kLine) __builtin_prefetch(next + d + i);
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += x[d + i] * y[d + i];
  }
  for (int64_t i = 0; d + i < n; ++i) lanes[i] += x[d + i] * y[d + i];
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

inline void add_scaled(const float* factors, const float* const* rows, int64_t n,
                       float* __restrict out) {
  const float f0 = factors[0], f1 = factors[1], f2 = factors[2], f3 = factors[3];
  const float *x0 = rows[0], *x1 = rows[1], *x2 = rows[2], *x3 = rows[3];
  for (int64_t d = 0; d < n; ++d) out[d] += (f0 * x0[d] + f1 * x1[d]) + (f2 * x2[d] + f3 * x3[d]);
}

// ------------------------------------------------------------------------- few queries

// Whether several squares of kWidth rows and kWidth elements fit the registers at the same time.
constexpr bool kSmallSquares = Vec::kWidth == 4;

// Whether a row of a square is a cache line; long rows are then prefetched in runs of lines.
constexpr bool kRunsOfLines = Vec::kWidth == kLineFloats;

// The number of groups of kWidth rows that are summed at the same time. A sum is a chain of
// dependent additions, so several independent chains are faster. But one chain keeps up with
// memory, and memory is faster if fewer long rows are read at the same time.
constexpr int few_groups(Storage storage, int n_queries, bool in_runs) {
  if (kSmallSquares) return n_queries < 4 ? 4 : 2;
  if (in_runs) return 1;
  return (storage == Storage::kInt8 ? 2 : 1) * (n_queries < 8 ? 2 : 1);
}

// Prefetches the elements of kWidth rows that are read 16 KiB after element d, late enough that
// they are still in the L1 cache then. Fetching eight lines of one row is faster than one line of
// each.
FASTRAG_INLINE void fetch_run(const float* data, int64_t pitch, int64_t dim, int64_t d) {
  constexpr int64_t kRun = 8 * kLineFloats, kAhead = (4 << 10) / Vec::kWidth;
  const int64_t first = d / kRun * kRun, end = (dim + kRun - 1) / kRun * kRun;
  const float* run = data + first + kAhead;
  if (first + kAhead >= end) run += Vec::kWidth * pitch - end;
  run += (d - first) / kLineFloats * (Vec::kWidth / 8) * pitch;
#pragma GCC unroll 2
  for (int64_t r = 0; r < Vec::kWidth / 8; ++r)
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRun; i += kLineFloats) __builtin_prefetch(run + r * pitch + i);
}

// The sums of kGroups * kWidth rows.
template <int kGroups, int kQueries>
struct FewSums {
  F sum[kGroups][kQueries];
  const float* queries;  // [kQueries, dim]
  int64_t dim;

  FewSums(const float* queries, int64_t dim) : queries(queries), dim(dim) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q) sum[g][q] = Vec::set(0.0f);
  }

  // Element d of all rows of a group.
  FASTRAG_INLINE void add(int group, int64_t d, F x) {
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q)
      sum[group][q] = Vec::fma(Vec::set(queries[q * dim + d]), x, sum[group][q]);
  }
};

// Adds squares of kWidth rows and kWidth elements, which are transposed in registers. Returns the
// first element that remains.
template <Storage kStorage, bool kInRuns, int kGroups, int kQueries>
FASTRAG_INLINE int64_t add_squares(const StoredRows& rows, int64_t d,
                                   FewSums<kGroups, kQueries>* sums) {
  constexpr int64_t kWidth = Vec::kWidth;
  constexpr bool kKeepLoads = !kSmallSquares || kQueries > 2;  // to leave registers for the sums
  using T = typename Stored<kStorage>::T;
  const T* data = static_cast<const T*>(rows.data);
  const T* ahead = data + kGroups * kWidth * rows.pitch;
  const auto add_square = [&](int g) __attribute__((always_inline)) {
    F square[kWidth];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kWidth; ++i) {
      const T* row = data + (g * kWidth + i) * rows.pitch + d;
      square[i] = Stored<kStorage>::load(row, rows, d);
    }
    if (kKeepLoads) FASTRAG_KEEP_LOADS;
    Vec::transpose(square);
    if constexpr (kInRuns) fetch_run(data, rows.pitch, rows.dim, d);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kWidth; ++i) {
      // a small square is no more than a cache line
      if (!kInRuns && (!kSmallSquares || i == 0)) __builtin_prefetch(ahead + kWidth * i);
      sums->add(g, d + i, square[i]);
    }
    ahead += kWidth * kWidth;
    if (kKeepLoads) FASTRAG_KEEP_LOADS;
  };
  for (; d + kWidth <= rows.dim; d += kWidth) {
    if constexpr (kSmallSquares) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) add_square(g);
    } else {
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) add_square(g);
    }
  }
  return d;
}

// The same for bytes, of which four are transposed as one number. The transposed squares of all
// groups are stored in the L1 cache first, so that the chains of the groups run in parallel.
template <int kGroups, int kQueries>
FASTRAG_INLINE int64_t add_squares_of_bytes(const StoredRows& rows,
                                            FewSums<kGroups, kQueries>* sums) {
  constexpr int64_t kWidth = Vec::kWidth;
  const auto* data = static_cast<const int8_t*>(rows.data);
  const int8_t* ahead = data + kGroups * kWidth * rows.pitch;
  F squares[kGroups][kWidth];
  int64_t d = 0;
  for (; d + 4 * kWidth <= rows.dim; d += 4 * kWidth) {
#pragma GCC unroll 1
    for (int g = 0; g < kGroups; ++g) {
      F square[kWidth];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) {
        square[i] = Vec::load_bytes(data + (g * kWidth + i) * rows.pitch + d);
      }
      Vec::transpose(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) squares[g][i] = square[i];
    }
#pragma GCC unroll 1
    for (int64_t i = 0; i < kWidth; ++i)
#pragma GCC unroll 4
      for (int byte = 0; byte < 4; ++byte) {
        const int64_t e = d + 4 * i + byte;
        const F scale = Vec::set(rows.scale[e]), offset = Vec::set(rows.offset[e]);
        if (byte < kGroups) __builtin_prefetch(ahead + 4 * kWidth * (kGroups * i + byte));
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g)
          sums->add(g, e, Vec::fma(scale, Vec::byte(squares[g][i], byte), offset));
      }
    ahead += kGroups * 4 * kWidth * kWidth;
  }
  return d;
}

template <Storage kStorage, int kGroups, int kQueries>
FASTRAG_INLINE void add_last(const StoredRows& rows, int64_t d, FewSums<kGroups, kQueries>* sums) {
  constexpr int64_t kWidth = Vec::kWidth;
  const auto* data = static_cast<const typename Stored<kStorage>::T*>(rows.data);
  for (int g = 0; g < kGroups; ++g) {
    F square[kWidth];
    for (int64_t i = 0; i < kWidth; ++i)
      square[i] =
          load_part<kStorage>(data + (g * kWidth + i) * rows.pitch + d, rows, d, rows.dim - d);
    Vec::transpose(square);
    for (int64_t i = 0; d + i < rows.dim; ++i) sums->add(g, d + i, square[i]);
  }
}

template <Storage kStorage, int kQueries, bool kInRuns>
TileResult few(const FewQueries& panel, const StoredRows& rows, FewScores* out) {
  constexpr int kGroups = few_groups(kStorage, kQueries, kInRuns), kRows = kGroups * Vec::kWidth;
  static_assert(kQueries <= kMaxFewQueries && kRows <= kMaxFewRows, "sizes of FewScores");
  FewSums<kGroups, kQueries> sums(panel.queries, rows.dim);
  int64_t d = 0;
  if constexpr (kStorage == Storage::kInt8) d = add_squares_of_bytes(rows, &sums);
  d = add_squares<kStorage, kInRuns>(rows, d, &sums);
  if (d < rows.dim) add_last<kStorage>(rows, d, &sums);

  F zero = Vec::set(0.0f);
  uint64_t any = 0;
#pragma GCC unroll 8
  for (int q = 0; q < kQueries; ++q) {
    out->hits[q] = 0;
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      const F sum = sums.sum[g][q];
      zero = Vec::fma(sum, Vec::set(0.0f), zero);
      out->hits[q] |= Vec::greater(sum, Vec::set(panel.thresholds[q])) << (g * Vec::kWidth);
      Vec::store(out->scores + q * kRows + g * Vec::kWidth, sum);
    }
    any |= out->hits[q];
  }
  return !Vec::all_zero(zero) ? TileResult::kNotFinite
         : any                ? TileResult::kHits
                              : TileResult::kNoHit;
}

inline void gathered(const float* query, const float* const* rows, int64_t dim, float* scores) {
  constexpr int64_t kWidth = Vec::kWidth;
  FewSums<1, 1> sums(query, dim);
  int64_t d = 0;
  for (; d + kWidth <= dim; d += kWidth) {
    F square[kWidth];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kWidth; ++i) square[i] = Vec::load(rows[i] + d);
    Vec::transpose(square);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kWidth; ++i) sums.add(0, d + i, square[i]);
  }
  for (; d < dim; ++d) {
    float column[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) column[i] = rows[i][d];
    sums.add(0, d, Vec::load(column));
  }
  Vec::store(scores, sums.sum[0][0]);
}

// ------------------------------------------------------------------------------- table

template <Storage kStorage, int kQueries, bool kInRuns = false>
constexpr FewKernel few_kernel() {
  return {few_groups(kStorage, kQueries, kInRuns) * int{Vec::kWidth},
          few<kStorage, kQueries, kInRuns>};
}

template <int kQueries>
constexpr FewKernel few_long() {
  return few_kernel<Storage::kFloat32, kQueries, kRunsOfLines>();
}

#define FASTRAG_FEW(storage)                                                     \
  {few_kernel<storage, 1>(), few_kernel<storage, 2>(), few_kernel<storage, 4>(), \
   few_kernel<storage, 8>()}

constexpr MipsKernels kTable = {Vec::kWidth,
                                kTileRows,
                                kSpreadPrefetch,
                                {tile<1, kRowsOf1>, tile<2, kRowsOf2>, tile<3, kRowsOf3>},
                                {FASTRAG_FEW(Storage::kFloat32), FASTRAG_FEW(Storage::kBfloat16),
                                 FASTRAG_FEW(Storage::kFloat16), FASTRAG_FEW(Storage::kInt8)},
                                {few_long<1>(), few_long<2>(), few_long<4>(), few_long<8>()},
                                {widen<Storage::kFloat32>, widen<Storage::kBfloat16>,
                                 widen<Storage::kFloat16>, widen<Storage::kInt8>},
                                gathered,
                                dot,
                                add_scaled};

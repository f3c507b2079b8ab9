// The tiles of integer products for a type Dot. Each mips_digits_<instruction set>.cpp defines its
// own Dot and kDigitRows, and then includes this file inside its unnamed namespace.

using I = Dot::I;
using F = Dot::F;

// Adds the products of 16 components from d on, for a Dot that can multiply a vector by four bytes
// of another. D is Dot; it is a parameter because not every Dot has this product.
template <class D, int kVectors, int kRows>
inline __attribute__((always_inline)) void add_by_element(const DigitPanel& panel,
                                                          const int8_t* codes, int64_t pitch,
                                                          int64_t d, I (*sum)[kVectors]) {
  static_assert(D::kWidth == 4, "a vector of the 16 codes of each row");
  I code[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) code[r] = D::load(codes + r * pitch + d);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    I digits[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      digits[v] = D::load(panel.digits + ((d + 4 * i) * kVectors + 4 * v) * D::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = D::add_element(sum[r][v], digits[v], code[r], i);
  }
}

// The norms of the rows in the lanes of a vector.
struct LaneNorms {
  F code, rest;
};

// Computes the bounds of the scores in the lanes of a vector, the first of which is lane `lane` of
// the panel. Returns the hits.
inline __attribute__((always_inline)) uint64_t bound_scores(I sum, I bias, const LaneNorms& norm,
                                                            const DigitPanel& panel, int64_t lane,
                                                            float* upper_bounds,
                                                            float* lower_bounds) {
  const F score = Dot::mul(Dot::number(sum, bias), Dot::load(panel.unit + lane));
  const F slack = Dot::add(Dot::mul(norm.code, Dot::load(panel.rest + lane)),
                           Dot::mul(norm.rest, Dot::load(panel.norm + lane)));
  const F upper = Dot::add(score, slack);
  Dot::store(upper_bounds, upper);
  Dot::store(lower_bounds, Dot::sub(score, slack));
  return Dot::not_below(upper, Dot::load(panel.threshold + lane));
}

// The same for all lanes of a panel and one row of a tile.
template <int kVectors>
inline __attribute__((always_inline)) uint64_t bound_row(const I* sum, const DigitPanel& panel,
                                                         const CodeRows& rows, int row,
                                                         DigitScores* out) {
  const I bias = Dot::set(Dot::kBias * rows.code_sum[row]);
  const LaneNorms norm{Dot::set(rows.code_norm[row]), Dot::set(rows.rest_norm[row])};
  uint64_t hits = 0;
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t lane = v * Dot::kWidth, at = row * kVectors * Dot::kWidth + lane;
    hits |= bound_scores(sum[v], bias, norm, panel, lane, out->upper + at, out->lower + at) << lane;
  }
  out->hits[row] = hits;
  return hits;
}

template <int kVectors, int kRows>
inline __attribute__((always_inline)) uint64_t digit_products(const DigitPanel& panel,
                                                              const CodeRows& rows, int first,
                                                              DigitScores* out) {
  constexpr int64_t kLanes = kVectors * Dot::kWidth;
  const int8_t* codes = rows.codes + first * rows.pitch;
  I sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Dot::set(0);

  const auto step = [&](int64_t d, int64_t n) __attribute__((always_inline)) {
    I digits[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      digits[v] = Dot::load(panel.digits + d * kLanes + v * 4 * Dot::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      int32_t four = 0;
      __builtin_memcpy(&four, codes + r * rows.pitch + d, n);
      const I code = Dot::set(four);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Dot::add(sum[r][v], digits[v], code);
    }
  };
  int64_t d = 0;
  for (; d + 64 <= rows.dim; d += 64) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(codes + (kDigitRows + r) * rows.pitch + d);
    for (int64_t e = d; e < d + 64; e += 16) {
      if constexpr (Dot::kByElement) {
        add_by_element<Dot, kVectors, kRows>(panel, codes, rows.pitch, e, sum);
      } else {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) step(e + 4 * i, 4);
      }
    }
  }
  for (; d + 4 <= rows.dim; d += 4) step(d, 4);
  if (d < rows.dim) step(d, rows.dim - d);

  uint64_t any = 0;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) any |= bound_row<kVectors>(sum[r], panel, rows, first + r, out);
  return any;
}

template <int kVectors, int kRows>
bool digit_tile(const DigitPanel& panel, const CodeRows& rows, DigitScores* out) {
  static_assert(kDigitRows % kRows == 0 && kDigitRows <= kMaxDigitRows, "rows of a tile");
  static_assert(kVectors * Dot::kWidth <= kMaxDigitLanes, "lanes of a panel");
  uint64_t any = 0;
  for (int r = 0; r < kDigitRows; r += kRows)
    any |= digit_products<kVectors, kRows>(panel, rows, r, out);
  return any != 0;
}

// Few queries: the lanes hold components until the sums are complete. The sums then share a vector,
// in lane query * kRows + row.
template <int kQueries>
bool digit_few(const DigitPanel& panel, const CodeRows& rows, DigitScores* out) {
  constexpr int kRows = Dot::kWidth / kQueries;
  constexpr int64_t kBytes = 4 * Dot::kWidth;
  static_assert(kQueries * kRows == Dot::kWidth && kQueries <= kMaxDigitRows, "words of hits");
  uint64_t any = 0;
#pragma GCC unroll 1
  for (int g = 0; g < kQueries; ++g) {
    const int first = g * kRows;
    const int8_t* codes = rows.codes + first * rows.pitch;
    I sum[Dot::kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < Dot::kWidth; ++i) sum[i] = Dot::set(0);
    for (int64_t d = 0; d < rows.dim; d += kBytes) {
      I digits[kQueries];
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q)
        digits[q] = Dot::load(panel.digits + d * kQueries + q * kBytes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const int8_t* code = codes + r * rows.pitch + d;
        __builtin_prefetch(code + Dot::kWidth * rows.pitch);
        const I bytes = Dot::load(code);
#pragma GCC unroll 8
        for (int q = 0; q < kQueries; ++q)
          sum[q * kRows + r] = Dot::add(sum[q * kRows + r], digits[q], bytes);
      }
    }
    const I bias = Dot::mul(Dot::set(Dot::kBias), Dot::repeat<kRows>(rows.code_sum + first));
    const LaneNorms norm{Dot::repeat<kRows>(rows.code_norm + first),
                         Dot::repeat<kRows>(rows.rest_norm + first)};
    const int64_t at = g * Dot::kWidth;
    out->hits[g] =
        bound_scores(Dot::sums(sum), bias, norm, panel, 0, out->upper + at, out->lower + at);
    any |= out->hits[g];
  }
  return any != 0;
}

inline void gathered(const uint8_t* digits, const int8_t* const* rows, int64_t dim, int32_t* sums) {
  I sum[Dot::kWidth];
#pragma GCC unroll 16
  for (int r = 0; r < Dot::kWidth; ++r) sum[r] = Dot::set(0);
  for (int64_t d = 0; d < dim; d += 4 * Dot::kWidth) {
    const I digit = Dot::load(digits + d);
#pragma GCC unroll 16
    for (int r = 0; r < Dot::kWidth; ++r) sum[r] = Dot::add(sum[r], digit, Dot::load(rows[r] + d));
  }
  const I total = Dot::sums(sum);
  __builtin_memcpy(sums, &total, sizeof(total));
}

template <int kQueries>
constexpr DigitTile few_or_null() {
  if constexpr (kQueries < Dot::kWidth)
    return digit_few<kQueries>;
  else
    return nullptr;
}

constexpr DigitKernels digit_table(DigitTile tile_of_1, DigitTile tile_of_2, int depth = 1,
                                   void (*enter)() = nullptr, void (*leave)() = nullptr) {
  return {Dot::kWidth,
          kDigitRows,
          depth,
          Dot::kLargest,
          Dot::kBias,
          {tile_of_1, tile_of_2},
          {few_or_null<1>(), few_or_null<2>(), few_or_null<4>(), few_or_null<8>()},
          enter,
          leave,
          gathered};
}

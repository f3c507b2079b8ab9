// The tile of whole numbers, on a type Dot that each mips_digits_<instruction set>.cpp defines
// before it includes this file, inside its unnamed namespace, together with kDigitRows.

using I = Dot::I;
using F = Dot::F;

// 16 components from d on, where a vector can be multiplied by four bytes of another. D is Dot, as
// a parameter because not every Dot has such a product.
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
  for (int r = 0; r < kRows; ++r) {
    uint64_t hits = 0;
    const int row = first + r;
    const I bias = Dot::set(Dot::kBias * rows.code_sum[row]);
    const F code_norm = Dot::set(rows.code_norm[row]), rest_norm = Dot::set(rows.rest_norm[row]);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = v * Dot::kWidth;
      const F score = Dot::mul(Dot::number(sum[r][v], bias), Dot::load(panel.unit + at));
      const F slack = Dot::add(Dot::mul(code_norm, Dot::load(panel.rest + at)),
                               Dot::mul(rest_norm, Dot::load(panel.norm + at)));
      const F upper = Dot::add(score, slack);
      hits |= Dot::not_below(upper, Dot::load(panel.threshold + at)) << at;
      Dot::store(out->upper + row * kLanes + at, upper);
      Dot::store(out->lower + row * kLanes + at, Dot::sub(score, slack));
    }
    out->hits[row] = hits;
    any |= hits;
  }
  return any;
}

template <int kVectors, int kRows>
bool digit_tile(const DigitPanel& panel, const CodeRows& rows, DigitScores* out) {
  static_assert(kDigitRows % kRows == 0 && kDigitRows <= kMaxTileRows, "rows of a tile");
  static_assert(kVectors * Dot::kWidth <= kMaxPanelLanes, "lanes of a panel");
  uint64_t any = 0;
  for (int r = 0; r < kDigitRows; r += kRows)
    any |= digit_products<kVectors, kRows>(panel, rows, r, out);
  return any != 0;
}

constexpr DigitKernels kDigitTable = {Dot::kWidth,
                                      kDigitRows,
                                      Dot::kLargest,
                                      Dot::kBias,
                                      {digit_tile<1, kRowsOf1>, digit_tile<2, kRowsOf2>}};

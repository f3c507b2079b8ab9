// The tiles of integer products for a Dot of 16 lanes and the tile registers Tiles: those of AMX,
// or their emulation. Included after mips_digits.inc.h, inside the same unnamed namespace.
//
// A product of registers adds C [16 rows, 16 queries] += A [16 rows, 64 codes] B [64 digits, 16
// queries]. Codes are in the layout of A as they are stored, and the digits of a panel in that of
// B, four of a query next to each other. Registers 0 to 3 hold the sums of 32 rows and 32 queries,
// 4 and 5 codes, 6 and 7 digits.
//
// Arithmetic, for a core with a multiplier of 1024 products per cycle (16 cycles for a product of
// registers), two loads of 64 bytes per cycle and two units for vectors: 64 components take 64
// cycles of the multiplier and 4 KiB of loads, or 32 cycles. Half of these bytes are codes, which
// come from the L2 cache at 32 bytes per cycle; it delivers about 48. The bounds of a tile take 9
// operations for each of 64 vectors, or 290 cycles, and storing the sums 64. With 768 components
// (768 cycles), the multiplier is busy for at least 0.68 of the time, and for more where bounds
// overlap with the next tile. A panel of 16 queries has only two sums in flight, whose latency of
// 52 cycles then decides: 2 KiB of codes, 39 bytes per cycle, which is more than memory delivers.
// None of this has been measured.

constexpr int kRegisterRows = 16;
constexpr int kRegisterBytes = 64;  // of a row of a register
static_assert(Dot::kWidth == kRegisterRows && kDigitRows == 2 * kRegisterRows, "a tile");

template <class Tiles, int kVectors>
bool register_tile(const DigitPanel& panel, const CodeRows& rows, DigitScores* out) {
  constexpr int64_t kLanes = kVectors * Dot::kWidth, kLine = 4 * kLanes;  // bytes of four digits
  const int64_t half = kRegisterRows * rows.pitch;
  Tiles::template zero<0>();
  Tiles::template zero<2>();
  if constexpr (kVectors == 2) {
    Tiles::template zero<1>();
    Tiles::template zero<3>();
  }
  for (int64_t d = 0; d < rows.dim; d += kRegisterBytes) {
    const int8_t* codes = rows.codes + d;
    const uint8_t* digits = panel.digits + d * kLanes;
    // Into the L2 cache: the L1 cache has no room for this tile, the next one and a panel.
#pragma GCC unroll 32
    for (int r = 0; r < kDigitRows; ++r)
      __builtin_prefetch(codes + (kDigitRows + r) * rows.pitch, 0, 2);
    Tiles::template load<4>(codes, rows.pitch);
    Tiles::template load<6>(digits, kLine);
    Tiles::template add_products<0, 4, 6>();
    if constexpr (kVectors == 2) {
      Tiles::template load<7>(digits + kRegisterBytes, kLine);
      Tiles::template add_products<1, 4, 7>();
    }
    Tiles::template load<5>(codes + half, rows.pitch);
    Tiles::template add_products<2, 5, 6>();
    if constexpr (kVectors == 2) Tiles::template add_products<3, 5, 7>();
  }

  alignas(64) int32_t sums[kDigitRows * kLanes];
  Tiles::template store<0>(sums, kLine);
  Tiles::template store<2>(sums + kRegisterRows * kLanes, kLine);
  if constexpr (kVectors == 2) {
    Tiles::template store<1>(sums + kRegisterRows, kLine);
    Tiles::template store<3>(sums + kRegisterRows * kLanes + kRegisterRows, kLine);
  }
  uint64_t any = 0;
  for (int r = 0; r < kDigitRows; ++r) {
    I sum[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[v] = Dot::load(sums + r * kLanes + v * Dot::kWidth);
    any |= bound_row<kVectors>(sum, panel, rows, r, out);
  }
  return any != 0;
}

// The operand of the instruction that configures the registers: each has 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "the format is the processor's");

template <class Tiles>
constexpr DigitKernels register_table() {
  return digit_table(register_tile<Tiles, 1>, register_tile<Tiles, 2>, kRegisterBytes, Tiles::enter,
                     Tiles::leave);
}

// The kernels for AMX with the tile registers emulated, for tests on any machine.
#include <cstring>
#include <stdexcept>

#include "mips/mips_kernels.h"

namespace fastrag {
namespace {

#include "mips/mips_digits_scalar.inc.h"

using Dot = ScalarDot<16>;

constexpr int kDigitRows = 32;

#include "mips/mips_digits.inc.h"
#include "mips/mips_digits_amx.inc.h"

// The instructions as Intel's manual defines them (SDM, volume 2: LDTILECFG, TILELOADD, TILESTORED,
// TILEZERO, TDPBSUD). Errors stand for its #UD.
class EmulatedTiles {
 public:
  static void enter() {
    config_ = {};
    configured_ = true;
    std::memset(data_, 0, sizeof(data_));
  }
  static void leave() { configured_ = false; }

  template <int kTile>
  static void zero() {
    check();
    std::memset(data_[kTile], 0, sizeof(data_[kTile]));
  }

  template <int kTile>
  static void load(const void* p, int64_t row_step) {
    zero<kTile>();
    for (int r = 0; r < config_.rows[kTile]; ++r)
      std::memcpy(data_[kTile][r], static_cast<const char*>(p) + r * row_step,
                  config_.row_bytes[kTile]);
  }

  template <int kTile>
  static void store(void* p, int64_t row_step) {
    check();
    for (int r = 0; r < config_.rows[kTile]; ++r)
      std::memcpy(static_cast<char*>(p) + r * row_step, data_[kTile][r], config_.row_bytes[kTile]);
  }

  template <int kSum, int kA, int kB>
  static void add_products() {
    check();
    const int n_rows = config_.rows[kSum], n_columns = config_.row_bytes[kSum] / 4;
    const int n_fours = config_.row_bytes[kA] / 4;
    if (config_.rows[kA] != n_rows || config_.rows[kB] != n_fours ||
        config_.row_bytes[kB] != config_.row_bytes[kSum])
      throw std::logic_error("tdpbsud: the shapes of the registers disagree");
    for (int m = 0; m < n_rows; ++m)
      for (int k = 0; k < n_fours; ++k)
        for (int n = 0; n < n_columns; ++n) {
          uint8_t* place = data_[kSum][m] + 4 * n;
          uint32_t sum;
          std::memcpy(&sum, place, 4);
          for (int i = 0; i < 4; ++i)
            sum += static_cast<int8_t>(data_[kA][m][4 * k + i]) * int{data_[kB][k][4 * n + i]};
          std::memcpy(place, &sum, 4);
        }
  }

 private:
  static void check() {
    if (!configured_) throw std::logic_error("tiles: the registers are not configured");
  }

  static thread_local TileConfig config_;
  static thread_local bool configured_;
  static thread_local uint8_t data_[8][kRegisterRows][kRegisterBytes];
};

thread_local TileConfig EmulatedTiles::config_;
thread_local bool EmulatedTiles::configured_ = false;
thread_local uint8_t EmulatedTiles::data_[8][kRegisterRows][kRegisterBytes];

constexpr DigitKernels kDigitTable = register_table<EmulatedTiles>();

}  // namespace

const DigitKernels* emulated_amx_digit_kernels() { return &kDigitTable; }

}  // namespace fastrag

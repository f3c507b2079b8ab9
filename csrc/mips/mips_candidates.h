// The rows that a search through codes has not ruled out yet.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "mips/mips_parts.h"

namespace fastrag {

constexpr int64_t kFirstRoom = 64;  // initial capacity for candidates besides that for the k best

struct Candidate {
  // Bounds are useless if one of them has overflowed.
  Candidate(float upper, float lower, int64_t row)
      : upper(std::isnan(upper) ? kInfinity : upper),
        lower(std::isnan(lower) ? -kInfinity : lower),
        row(static_cast<uint32_t>(row)) {}

  float upper, lower;
  uint32_t row;
};

// The rows of one query that may be among its best k, and the threshold for further rows.
class CandidateRows {
 public:
  explicit CandidateRows(int64_t k) : k_(k), room_(2 * k + kFirstRoom) {}

  float threshold() const { return threshold_; }
  std::vector<Candidate>& rows() { return rows_; }

  void add(const Candidate& candidate) {
    rows_.push_back(candidate);
    if (static_cast<int64_t>(rows_.size()) < room_) return;
    prune();
    room_ = std::max<int64_t>(room_, 2 * rows_.size());
  }

  void add_all(const CandidateRows& other) {
    threshold_ = std::max(threshold_, other.threshold_);
    rows_.insert(rows_.end(), other.rows_.begin(), other.rows_.end());
  }

  // k rows score at least as much as the k-th largest lower bound.
  void prune() {
    if (static_cast<int64_t>(rows_.size()) > k_) {
      std::nth_element(rows_.begin(), rows_.begin() + k_ - 1, rows_.end(),
                       [](const Candidate& a, const Candidate& b) { return a.lower > b.lower; });
      threshold_ = std::max(threshold_, rows_[k_ - 1].lower);
    }
    const auto beaten = [&](const Candidate& x) { return x.upper < threshold_; };
    rows_.erase(std::remove_if(rows_.begin(), rows_.end(), beaten), rows_.end());
  }

 private:
  int64_t k_;
  int64_t room_;
  std::vector<Candidate> rows_;
  float threshold_ = -kInfinity;
};

}  // namespace fastrag

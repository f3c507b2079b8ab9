#include "retrieval/gather.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fastrag {
namespace {

struct Span {
  int64_t begin, length;
};

// Each offset is read only once, so that the checked value is the one that is used.
Span span_of(const TokenTable& table, int64_t row) {
  if (row < -1 || row >= table.n_passages)
    throw std::invalid_argument("rows: expected -1 to " + std::to_string(table.n_passages - 1) +
                                ", got " + std::to_string(row));
  if (row < 0) return {0, 0};
  const int64_t begin = table.offsets[row], end = table.offsets[row + 1];
  if (begin < 0 || end < begin || end > table.n_tokens)
    throw std::invalid_argument("offsets: expected a part of the " +
                                std::to_string(table.n_tokens) + " tokens for row " +
                                std::to_string(row) + ", got " + std::to_string(begin) + " to " +
                                std::to_string(end) + ": the store is damaged");
  return {begin, end - begin};
}

}  // namespace

int64_t passage_lengths(const TokenTable& table, const int64_t* rows, int64_t n_rows,
                        int64_t max_length, int64_t* lengths) {
  int64_t longest = 0;
  for (int64_t i = 0; i < n_rows; ++i) {
    lengths[i] = std::min(span_of(table, rows[i]).length, max_length);
    longest = std::max(longest, lengths[i]);
  }
  return longest;
}

void gather_tokens(const TokenTable& table, const int64_t* rows, int64_t n_rows, int64_t width,
                   int64_t* token_ids) {
  for (int64_t i = 0; i < n_rows; ++i) {
    const Span span = span_of(table, rows[i]);
    const int64_t n = std::min(span.length, width);
    int64_t* line = token_ids + i * width;
    std::copy_n(table.tokens + span.begin, n, line);
    std::fill(line + n, line + width, 0);
  }
}

}  // namespace fastrag

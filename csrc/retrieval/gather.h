// Token ids of passages, from the flat array that holds all of them.
//
// Passage i is tokens[offsets[i]] to tokens[offsets[i + 1] - 1]; row -1 is a passage without
// tokens. Both arrays may be maps of files: every offset is checked before a token is read.
#pragma once

#include <cstdint>

namespace fastrag {

struct TokenTable {
  const int32_t* tokens;
  int64_t n_tokens;
  const int64_t* offsets;  // [n_passages + 1]
  int64_t n_passages;
};

// lengths[i] = tokens of passage rows[i], at most max_length; returns the largest, 0 for no rows.
//
// Throws std::invalid_argument: a row outside [-1, n_passages), offsets that leave the tokens.
int64_t passage_lengths(const TokenTable& table, const int64_t* rows, int64_t n_rows,
                        int64_t max_length, int64_t* lengths);

// token_ids [n_rows, width], row-major: the passages, cut at width, and zeros behind them.
//
// One thread: 64 passages of 256 tokens take 3 microseconds, less than waking a second one, and
// batches beyond the caches wait for memory.
//
// Throws what passage_lengths throws.
void gather_tokens(const TokenTable& table, const int64_t* rows, int64_t n_rows, int64_t width,
                   int64_t* token_ids);

}  // namespace fastrag

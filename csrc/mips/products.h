// All inner products of some vectors with the rows of a matrix.
#pragma once

#include <cstdint>
#include <functional>

#include "mips/mips.h"

namespace fastrag {

// out[i, r] = x_i . row r of a matrix of float32, [n, n_rows], for x [n, dim]: the scores of a
// search for all rows, to the bit. Numbers need not be finite. A thread that has written the
// products of all x with the rows [begin, end) calls on_block(begin, end); begin is a multiple of
// products_block.
void products(const float* x, int64_t n, int64_t dim, const MipsMatrix& matrix, float* out,
              Threads threads, const std::function<void(int64_t begin, int64_t end)>& on_block);

int64_t products_block(int64_t dim, Isa isa);

}  // namespace fastrag

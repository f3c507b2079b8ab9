// Whether the tile registers of AMX can be used: the processor reports them, but the operating
// system has to allow them, and their products are checked once before they are used.
#pragma once

#include "mips/mips_kernels.h"

namespace fastrag {

// Asks the operating system for the tile registers, for all threads of this process.
bool allow_tiles();

// Whether the tiles of a table have the sums of plain loops, for fixed digits and codes.
bool multiplies_right(const DigitKernels& kernels);

// Why the tiles cannot be used; null if they can. Calls `allow` at most once.
const char* why_no_tiles(bool (*allow)(), const DigitKernels& kernels);

}  // namespace fastrag

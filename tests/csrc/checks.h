// What the driver runs from other files: bits of one instruction set against those of another.
#pragma once

// The row passes, of all sets that round a product and its sum once.
void run_passes();

// The sums of whole numbers and the bounds made of them, of NEON with and without products of bytes
// and of tile registers, real or emulated; and when tile registers are not used.
void run_digits();

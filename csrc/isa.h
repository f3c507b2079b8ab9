// The instruction sets that the kernels are written for, of which each machine runs the best.
#pragma once

namespace fastrag {

// kDotprod is kNeon with products of bytes, as ARMv8.2 has them.
enum class Isa { kScalar, kAvx2, kAvx512, kNeon, kDotprod };

// The better one first, of those that one machine may have.
constexpr Isa kAllIsas[] = {Isa::kAvx512, Isa::kAvx2, Isa::kDotprod, Isa::kNeon, Isa::kScalar};

// Whether both this machine and this build have it.
bool has_isa(Isa isa);
Isa best_isa();
const char* isa_name(Isa isa);

struct Threads {
  int count;
  Isa isa;
};

}  // namespace fastrag

// The instruction sets for which there are kernels. The best one of the machine is used.
#pragma once

namespace fastrag {

// kDotprod is kNeon with the dot products of bytes of ARMv8.2.
enum class Isa { kScalar, kAvx2, kAvx512, kNeon, kDotprod };

// For each kind of processor, better instruction sets come first.
constexpr Isa kAllIsas[] = {Isa::kAvx512, Isa::kAvx2, Isa::kDotprod, Isa::kNeon, Isa::kScalar};

// Whether both this machine and this build have the instruction set.
bool has_isa(Isa isa);
Isa best_isa();
const char* isa_name(Isa isa);

struct Threads {
  int count;
  Isa isa;
};

}  // namespace fastrag

// The instruction sets for which there are kernels. The best one of the machine is used.
#pragma once

namespace fastrag {

// kAmx is kAvx512 with products of tiles of bytes, and kDotprod is kNeon with the dot products of
// bytes of ARMv8.2. kEmulatedAmx is kScalar with the tiles of kAmx in plain C++, for tests.
enum class Isa { kScalar, kAvx2, kAvx512, kAmx, kNeon, kDotprod, kEmulatedAmx };

// Those of this kind of processor; better ones come first.
constexpr Isa kAllIsas[] = {
#if defined(__x86_64__) || defined(__i386__)
    Isa::kAmx,    Isa::kAvx512,      Isa::kAvx2,
#elif defined(__aarch64__)
    Isa::kDotprod, Isa::kNeon,
#endif
    Isa::kScalar, Isa::kEmulatedAmx,
};

// Why this machine or this build cannot run the instruction set; null if it can.
const char* why_not(Isa isa);
inline bool has_isa(Isa isa) { return !why_not(isa); }
Isa best_isa();
const char* isa_name(Isa isa);

struct Threads {
  int count;
  Isa isa;
};

}  // namespace fastrag

// The peak rates of this machine, for benchmarks: multiplications and additions in registers, and
// reading of memory with almost no arithmetic.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string>

#include "buffers.h"
#include "pool/thread_pool.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define FASTRAG_X86 1
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace py = pybind11;

namespace fastrag {
namespace {

constexpr int64_t kFmasOfATask = int64_t{1} << 26;

// Runs n_steps of x = a x + b, or x + a b, on enough vectors to hide the latency, and returns the
// result. Each function has its own target attribute, because this file is compiled for any
// processor.
#ifdef FASTRAG_X86
constexpr int kChains512 = 16, kChains256 = 12;

__attribute__((target("avx512f"))) float fma_avx512(int64_t n_steps) {
  const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(1.0f);
  __m512 x[kChains512];
  for (int i = 0; i < kChains512; ++i) x[i] = _mm512_set1_ps(static_cast<float>(i));
  for (int64_t step = 0; step < n_steps; ++step)
#pragma GCC unroll 16
    for (int i = 0; i < kChains512; ++i) x[i] = _mm512_fmadd_ps(x[i], a, b);
  __m512 sum = x[0];
  for (int i = 1; i < kChains512; ++i) sum = _mm512_add_ps(sum, x[i]);
  return _mm512_cvtss_f32(sum);
}

__attribute__((target("avx2,fma"))) float fma_avx2(int64_t n_steps) {
  const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(1.0f);
  __m256 x[kChains256];
  for (int i = 0; i < kChains256; ++i) x[i] = _mm256_set1_ps(static_cast<float>(i));
  for (int64_t step = 0; step < n_steps; ++step)
#pragma GCC unroll 16
    for (int i = 0; i < kChains256; ++i) x[i] = _mm256_fmadd_ps(x[i], a, b);
  __m256 sum = x[0];
  for (int i = 1; i < kChains256; ++i) sum = _mm256_add_ps(sum, x[i]);
  return _mm256_cvtss_f32(sum);
}
#elif defined(__aarch64__)
constexpr int kChains128 = 20;

float fma_neon(int64_t n_steps) {
  const float32x4_t a = vdupq_n_f32(0.5f), b = vdupq_n_f32(1.0f);
  float32x4_t x[kChains128];
  for (int i = 0; i < kChains128; ++i) x[i] = vdupq_n_f32(static_cast<float>(i));
  for (int64_t step = 0; step < n_steps; ++step)
#pragma GCC unroll 20
    for (int i = 0; i < kChains128; ++i) x[i] = vfmaq_f32(x[i], a, b);
  float32x4_t sum = x[0];
  for (int i = 1; i < kChains128; ++i) sum = vaddq_f32(sum, x[i]);
  return vgetq_lane_f32(sum, 0);
}
#endif

constexpr int kLanes = 32;

float multiply_add(int64_t n_steps) {
  float x[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(i);
  for (int64_t step = 0; step < n_steps; ++step)
    for (int i = 0; i < kLanes; ++i) x[i] = x[i] * 0.5f + 1.0f;
  return std::accumulate(x, x + kLanes, 0.0f);
}

struct FmaLoop {
  float (*run)(int64_t n_steps);
  int64_t fmas_of_a_step;
};

FmaLoop fma_loop_of(Isa isa) {
#ifdef FASTRAG_X86
  if (isa == Isa::kAvx512 || isa == Isa::kAmx) return {fma_avx512, kChains512 * 16};
  if (isa == Isa::kAvx2) return {fma_avx2, kChains256 * 8};
#elif defined(__aarch64__)
  if (isa != Isa::kScalar) return {fma_neon, kChains128 * 4};
#endif
  return {multiply_add, kLanes};
}

void fma_loop(int64_t n_fmas, int threads, const std::string& isa) {
  if (n_fmas < 1)
    throw py::value_error("n_fmas: expected at least 1, got " + std::to_string(n_fmas));
  const Threads with = threads_of(threads, isa);
  const FmaLoop loop = fma_loop_of(with.isa);
  const py::gil_scoped_release nogil;
  const int64_t n_tasks = (n_fmas + kFmasOfATask - 1) / kFmasOfATask;
  parallel_for(with.count, n_tasks, [&](int64_t task) {
    const int64_t n = std::min(kFmasOfATask, n_fmas - task * kFmasOfATask);
    // The compiler must assume that the result is used.
    volatile float seen = loop.run((n + loop.fmas_of_a_step - 1) / loop.fmas_of_a_step);
    (void)seen;
  });
}

constexpr int64_t kBytesOfATask = int64_t{1} << 20;
constexpr int64_t kLine = 64;  // bytes of a cache line
// Several streams are read in parallel, which is faster than one after another. There is no
// explicit prefetch: with so little work per line, the processor has enough loads in flight.
constexpr int64_t kStreams = 4;

// Writes words whose exclusive or is that of kStreams times n bytes; n is a multiple of kLine.
#ifdef FASTRAG_X86
__attribute__((target("avx512f"))) void fold_avx512(const int8_t* bytes, int64_t n,
                                                    uint64_t* words) {
  __m512i x[kStreams];
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) x[s] = _mm512_setzero_si512();
  for (int64_t at = 0; at < n; at += kLine)
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s)
      x[s] = _mm512_xor_si512(x[s], _mm512_loadu_si512(bytes + s * n + at));
  const __m512i all = _mm512_xor_si512(_mm512_xor_si512(x[0], x[1]), _mm512_xor_si512(x[2], x[3]));
  _mm512_storeu_si512(words, all);
}

__attribute__((target("avx2"))) void fold_avx2(const int8_t* bytes, int64_t n, uint64_t* words) {
  __m256i x[kStreams][2];
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) x[s][0] = x[s][1] = _mm256_setzero_si256();
  for (int64_t at = 0; at < n; at += kLine)
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const auto* line = reinterpret_cast<const __m256i*>(bytes + s * n + at);
      x[s][0] = _mm256_xor_si256(x[s][0], _mm256_loadu_si256(line));
      x[s][1] = _mm256_xor_si256(x[s][1], _mm256_loadu_si256(line + 1));
    }
  for (int half = 0; half < 2; ++half) {
    const __m256i all = _mm256_xor_si256(_mm256_xor_si256(x[0][half], x[1][half]),
                                         _mm256_xor_si256(x[2][half], x[3][half]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + 4 * half), all);
  }
}
#endif

constexpr int64_t kLineWords = kLine / sizeof(uint64_t);

void fold(const int8_t* bytes, int64_t n, uint64_t* words) {
  uint64_t all[kLineWords] = {};
  for (int64_t at = 0; at < n; at += kLine)
    for (int s = 0; s < kStreams; ++s) {
      uint64_t line[kLineWords];
      std::memcpy(line, bytes + s * n + at, sizeof(line));
      for (int i = 0; i < kLineWords; ++i) all[i] ^= line[i];
    }
  std::copy_n(all, kLineWords, words);
}

using Fold = void (*)(const int8_t*, int64_t, uint64_t*);

Fold fold_of([[maybe_unused]] Isa isa) {
#ifdef FASTRAG_X86
  if (isa == Isa::kAvx512 || isa == Isa::kAmx) return fold_avx512;
  if (isa == Isa::kAvx2) return fold_avx2;
#endif
  return fold;
}

// Returns the exclusive or of the bytes, repeated in each byte of the result.
uint64_t folded(Fold fold_streams, const int8_t* bytes, int64_t n) {
  const int64_t n_stream = n / (kStreams * kLine) * kLine;
  uint64_t words[kLineWords];
  fold_streams(bytes, n_stream, words);
  uint64_t all = 0;
  for (int i = 0; i < kLineWords; ++i) all ^= words[i];
  for (int64_t at = kStreams * n_stream; at < n; ++at) all ^= static_cast<uint8_t>(bytes[at]);
  for (int shift = 32; shift >= 8; shift /= 2) all ^= all >> shift;
  return all & 0xff;
}

int read_loop(const py::buffer& bytes, int threads, const std::string& isa) {
  const Array<int8_t> read("bytes", bytes, {-1});
  const Threads with = threads_of(threads, isa);
  const Fold fold_streams = fold_of(with.isa);
  const py::gil_scoped_release nogil;
  std::atomic<uint64_t> all{0};
  const int64_t n_tasks = (read.size(0) + kBytesOfATask - 1) / kBytesOfATask;
  parallel_for(with.count, n_tasks, [&](int64_t task) {
    const int64_t begin = task * kBytesOfATask;
    all ^= folded(fold_streams, read.data() + begin, std::min(kBytesOfATask, read.size(0) - begin));
  });
  return static_cast<int>(all);
}

}  // namespace

void bind_peaks(py::module_& m) {
  m.def("read_loop", &read_loop, py::arg("bytes"), py::kw_only(), py::arg("threads") = 1,
        py::arg("isa") = "");
  m.def("fma_loop", &fma_loop, py::arg("n_fmas"), py::kw_only(), py::arg("threads") = 1,
        py::arg("isa") = "");
}

}  // namespace fastrag

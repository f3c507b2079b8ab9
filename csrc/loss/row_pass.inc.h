// The kernels for a vector type Vec. Each row_pass_<instruction set>.cpp defines its own Vec and
// then includes this file inside its unnamed namespace.
//
// Vec::max returns its second argument if either is NaN, like the instructions, and comparisons
// with NaN are false. So a maximum may miss a NaN, but a sum never does.

using F = Vec::F;

// ------------------------------------------------------------------------------------- functions

// exp(x) for x <= 88, within 1.5 ulp; 0 below -87.33, where the result would be subnormal.
// Reduction to [-ln2 / 2, ln2 / 2] and the polynomial of Cephes' expf.
inline F vexp(F x) {
  const F kLowest = Vec::set(-87.33f);
  const F kMagic = Vec::set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F clamped = Vec::max(kLowest, x);
  const F rounded = Vec::fma(clamped, Vec::set(1.44269504088896341f), kMagic);
  const F n = Vec::sub(rounded, kMagic);
  F r = Vec::fma(n, Vec::set(-0.693359375f), clamped);
  r = Vec::fma(n, Vec::set(2.12194440e-4f), r);
  F p = Vec::set(1.9875691500e-4f);
  p = Vec::fma(p, r, Vec::set(1.3981999507e-3f));
  p = Vec::fma(p, r, Vec::set(8.3334519073e-3f));
  p = Vec::fma(p, r, Vec::set(4.1665795894e-2f));
  p = Vec::fma(p, r, Vec::set(1.6666665459e-1f));
  p = Vec::fma(p, r, Vec::set(5.0000001201e-1f));
  p = Vec::add(Vec::fma(p, Vec::mul(r, r), r), Vec::set(1.0f));
  return Vec::less(x, kLowest, Vec::set(0.0f), Vec::mul(p, Vec::pow2_of_rounded(rounded)));
}

// log(x) for finite x >= 1, within 1.5 ulp; NaN for NaN. The polynomial of Cephes' logf.
inline F vlog(F x) {
  F m, e;
  Vec::split(x, &m, &e);
  const F r = Vec::sub(m, Vec::set(1.0f));
  F p = Vec::set(7.0376836292e-2f);
  p = Vec::fma(p, r, Vec::set(-1.1514610310e-1f));
  p = Vec::fma(p, r, Vec::set(1.1676998740e-1f));
  p = Vec::fma(p, r, Vec::set(-1.2420140846e-1f));
  p = Vec::fma(p, r, Vec::set(1.4249322787e-1f));
  p = Vec::fma(p, r, Vec::set(-1.6668057665e-1f));
  p = Vec::fma(p, r, Vec::set(2.0000714765e-1f));
  p = Vec::fma(p, r, Vec::set(-2.4999993993e-1f));
  p = Vec::fma(p, r, Vec::set(3.3333331174e-1f));
  const F r2 = Vec::mul(r, r);
  p = Vec::mul(Vec::mul(p, r), r2);
  p = Vec::fma(e, Vec::set(-2.12194440e-4f), p);
  p = Vec::fma(r2, Vec::set(-0.5f), p);
  const F y = Vec::fma(e, Vec::set(0.693359375f), Vec::add(r, p));
  return Vec::equal(x, x, y, x);
}

// tanh(u) within 3 ulp and 1 - tanh(u)^2 within 6 ulp, without cancellation for large |u|.
inline F vtanh(F u, F* sech2) {
  const F a = Vec::abs(u);
  const F e = vexp(Vec::mul(a, Vec::set(-2.0f)));
  const F d = Vec::div(Vec::set(1.0f), Vec::add(e, Vec::set(1.0f)));
  *sech2 = Vec::mul(Vec::mul(Vec::set(4.0f), e), Vec::mul(d, d));
  const F large = Vec::mul(Vec::sub(Vec::set(1.0f), e), d);
  // Cephes' tanhf below 0.625
  const F s = Vec::mul(u, u);
  F p = Vec::set(-5.70498872745e-3f);
  p = Vec::fma(p, s, Vec::set(2.06390887954e-2f));
  p = Vec::fma(p, s, Vec::set(-5.37397155531e-2f));
  p = Vec::fma(p, s, Vec::set(1.33314422036e-1f));
  p = Vec::fma(p, s, Vec::set(-3.33332819422e-1f));
  const F small = Vec::fma(Vec::mul(p, s), a, a);
  return Vec::copysign(Vec::less(a, Vec::set(0.625f), small, large), u);
}

// ---------------------------------------------------------------------------------------- logits

struct Head {
  F scale, cap;

  template <class Logits>
  explicit Head(const Logits& logits)
      : scale(Vec::set(logits.logit_scale)), cap(Vec::set(logits.softcap)) {}

  // The argument of the softcap; the logit itself without one.
  F argument(F z0, F bias) const { return Vec::mul(Vec::add(z0, bias), scale); }

  template <bool kCap>
  F logit(F argument) const {
    if (!kCap) return argument;
    F sech2;
    return Vec::mul(vtanh(Vec::div(argument, cap), &sech2), cap);
  }

  // The logit, and its derivative in z0.
  template <bool kCap>
  F logit(F argument, F* slope) const {
    *slope = scale;
    if (!kCap) return argument;
    F sech2;
    const F z = Vec::mul(vtanh(Vec::div(argument, cap), &sech2), cap);
    *slope = Vec::mul(sech2, scale);
    return z;
  }
};

inline F bias_of(const Logits& logits, int64_t id) {
  return Vec::set(logits.bias ? logits.bias[id] : 0.0f);
}

// A whole vector or its first `count` lanes.
template <bool kWhole>
F load(const float* p, int64_t count) {
  return kWhole ? Vec::load(p) : Vec::load(p, count);
}

template <bool kWhole>
F load(const Bfloat16* p, int64_t count) {
  if (kWhole) return Vec::load(p);
  Bfloat16 lanes[Vec::kWidth] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return Vec::load(lanes);
}

template <bool kWhole>
void store(float* p, F x, int64_t count) {
  if (kWhole)
    Vec::store(p, x);
  else
    Vec::store(p, x, count);
}

template <bool kWhole>
void store(Bfloat16* p, F x, int64_t count) {
  if (kWhole) return Vec::store(p, x);
  Bfloat16 lanes[Vec::kWidth];
  Vec::store(lanes, x);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

template <class T>
T* line_of(const Logits& logits, int64_t id) {
  return static_cast<T*>(logits.z0) + id * logits.pitch;
}

// The type of the numbers in the buffer, and whether there is a softcap.
template <class T, bool kHasCap>
struct Kind {
  using Number = T;
  static constexpr bool kCap = kHasCap;
};

// Calls f with the Kind of the logits.
template <class Call>
void with_kind(const Logits& logits, Call f) {
  if (logits.softcap > 0.0f)
    logits.bfloat16 ? f(Kind<Bfloat16, true>()) : f(Kind<float, true>());
  else
    logits.bfloat16 ? f(Kind<Bfloat16, false>()) : f(Kind<float, false>());
}

// Calls f<number of vectors, whole>(first row, rows) on tiles of rows that cover [0, n).
constexpr int kTileVectors = 4;

template <class Tile>
void for_each_tile(int64_t n, Tile tile) {
  constexpr int64_t kTile = kTileVectors * Vec::kWidth;
  int64_t row = 0;
  for (; row + kTile <= n; row += kTile) tile.template run<kTileVectors, true>(row, Vec::kWidth);
  for (; row + Vec::kWidth <= n; row += Vec::kWidth) tile.template run<1, true>(row, Vec::kWidth);
  if (row < n) tile.template run<1, false>(row, n - row);
}

// ------------------------------------------------------------------------------------ row passes

template <class Kind>
struct StatisticsTile {
  const Logits& logits;
  IdRange ids;
  float *max, *sum, *centred;

  // The tile of the block stays in the first-level cache from the maximum to the sum.
  template <int kVectors, bool kWhole>
  void run(int64_t row, int64_t count) const {
    const Head head(logits);
    F top[kVectors], total[kVectors], mean[kVectors];
    for (int j = 0; j < kVectors; ++j) top[j] = Vec::set(-__builtin_inff());
    for (int64_t v = ids.begin; v < ids.end; ++v) {
      const auto* z0 = line_of<typename Kind::Number>(logits, v) + row;
      const F bias = bias_of(logits, v);
      for (int j = 0; j < kVectors; ++j) {
        const F z = load<kWhole>(z0 + j * Vec::kWidth, count);
        top[j] = Vec::max(top[j], head.argument(z, bias));
      }
    }
    for (int j = 0; j < kVectors; ++j) {
      top[j] = head.template logit<Kind::kCap>(top[j]);  // monotonic, so this is the largest logit
      store<kWhole>(max + row + j * Vec::kWidth, top[j], count);
      const F lowest = Vec::set(-__builtin_inff());
      top[j] = Vec::equal(top[j], lowest, Vec::set(0.0f), top[j]);
      total[j] = mean[j] = Vec::set(0.0f);
    }
    for (int64_t v = ids.begin; v < ids.end; ++v) {
      const auto* z0 = line_of<typename Kind::Number>(logits, v) + row;
      const F bias = bias_of(logits, v);
      for (int j = 0; j < kVectors; ++j) {
        const F z = load<kWhole>(z0 + j * Vec::kWidth, count);
        const F x = Vec::sub(head.template logit<Kind::kCap>(head.argument(z, bias)), top[j]);
        total[j] = Vec::add(total[j], vexp(x));
        mean[j] = Vec::add(mean[j], x);
      }
    }
    for (int j = 0; j < kVectors; ++j) {
      store<kWhole>(sum + row + j * Vec::kWidth, total[j], count);
      if (centred) store<kWhole>(centred + row + j * Vec::kWidth, mean[j], count);
    }
  }
};

void statistics(const Logits& logits, IdRange ids, float* max, float* sum, float* centred) {
  with_kind(logits, [&](auto kind) {
    using Tile = StatisticsTile<decltype(kind)>;
    for_each_tile(logits.n_rows, Tile{logits, ids, max, sum, centred});
  });
}

template <class Kind>
struct GradientTile {
  const Logits& logits;
  IdRange ids;
  const GradientRows& rows;

  template <int kVectors, bool kWhole>
  void run(int64_t row, int64_t count) const {
    const Head head(logits);
    F shift[kVectors], factor[kVectors], constant[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      shift[j] = load<kWhole>(rows.shift + row + j * Vec::kWidth, count);
      factor[j] = load<kWhole>(rows.factor + row + j * Vec::kWidth, count);
      constant[j] = load<kWhole>(rows.constant + row + j * Vec::kWidth, count);
    }
    for (int64_t v = ids.begin; v < ids.end; ++v) {
      auto* z0 = line_of<typename Kind::Number>(logits, v) + row;
      const F bias = bias_of(logits, v);
      for (int j = 0; j < kVectors; ++j) {
        auto* p = z0 + j * Vec::kWidth;
        F slope;
        const F argument = head.argument(load<kWhole>(p, count), bias);
        const F z = head.template logit<Kind::kCap>(argument, &slope);
        const F e = vexp(Vec::sub(z, shift[j]));
        const F dz = Vec::sub(Vec::mul(e, factor[j]), constant[j]);
        store<kWhole>(p, Vec::mul(dz, slope), count);
      }
    }
  }
};

void gradient(const Logits& logits, IdRange ids, const GradientRows& rows) {
  with_kind(logits, [&](auto kind) {
    for_each_tile(logits.n_rows, GradientTile<decltype(kind)>{logits, ids, rows});
  });
}

// ---------------------------------------------------------------------------------- mixture passes

// Calls f<whole>(first row, rows) on vectors that cover [0, n).
template <class Step>
void for_each_vector(int64_t n, Step step) {
  int64_t row = 0;
  for (; row + Vec::kWidth <= n; row += Vec::kWidth) step.template run<true>(row, Vec::kWidth);
  if (row < n) step.template run<false>(row, n - row);
}

inline int64_t round_up(int64_t n) { return (n + Vec::kWidth - 1) / Vec::kWidth * Vec::kWidth; }

// Scratch of one block. by_row [n] and share [n] are position-major like the buffer. joint
// [K, columns] and totals [columns] are passage-major, so that the sum over passages adds vectors.
// columns is G rounded up to whole vectors.
struct Scratch {
  int64_t columns;
  float *by_row, *probability, *joint, *mixture_sum, *mixture_rest, *share_sum, *share_rest;

  Scratch(float* memory, int64_t n_rows, int64_t n_passages)
      : columns(round_up(n_rows / n_passages)) {
    by_row = memory;
    probability = by_row + n_rows;
    joint = probability + n_rows;
    mixture_sum = joint + n_passages * columns;
    mixture_rest = mixture_sum + columns;
    share_sum = mixture_rest + columns;
    share_rest = share_sum + n_passages * columns;
  }

  static int64_t size(int64_t n_rows, int64_t n_passages) {
    const int64_t columns = round_up(n_rows / n_passages);
    return 2 * n_rows + (3 * n_passages + 2) * columns;
  }

  void clear(int64_t n_passages) {
    for (int64_t i = 0; i < (3 * n_passages + 2) * columns; ++i) joint[i] = 0.0f;
  }
};

// by_row = a + log p of one token id, and probability = p if requested.
template <class Kind, bool kProbability>
struct JointStep {
  const Logits& logits;
  const MixtureRows& rows;
  const Scratch& scratch;
  const typename Kind::Number* z0;
  F bias;

  template <bool kWhole>
  void run(int64_t row, int64_t count) const {
    const Head head(logits);
    const F argument = head.argument(load<kWhole>(z0 + row, count), bias);
    const F z =
        Vec::sub(head.template logit<Kind::kCap>(argument), load<kWhole>(rows.shift + row, count));
    const F logp = Vec::sub(z, load<kWhole>(rows.log_sum + row, count));
    const F joint = Vec::add(logp, load<kWhole>(rows.prior + row, count));
    store<kWhole>(scratch.by_row + row, joint, count);
    if (kProbability) store<kWhole>(scratch.probability + row, vexp(logp), count);
  }
};

inline void to_passage_major(const float* from, float* to, int64_t n_rows, int64_t n_passages,
                             int64_t columns) {
  const int64_t n_positions = n_rows / n_passages;
  for (int64_t k = 0; k < n_passages; ++k)
    for (int64_t g = 0; g < n_positions; ++g) to[k * columns + g] = from[g * n_passages + k];
}

inline void to_position_major(const float* from, float* to, int64_t n_rows, int64_t n_passages,
                              int64_t columns) {
  const int64_t n_positions = n_rows / n_passages;
  for (int64_t k = 0; k < n_passages; ++k)
    for (int64_t g = 0; g < n_positions; ++g) to[g * n_passages + k] = from[k * columns + g];
}

// Replaces joint [K, columns] by exp(joint - max_k joint); returns max_k joint and the sum over k.
inline void exponentiate(const Scratch& scratch, int64_t n_passages, int64_t column, F* top,
                         F* sum) {
  F m = Vec::set(-__builtin_inff());
  for (int64_t k = 0; k < n_passages; ++k)
    m = Vec::max(m, Vec::load(scratch.joint + k * scratch.columns + column));
  F s = Vec::set(0.0f);
  for (int64_t k = 0; k < n_passages; ++k) {
    float* p = scratch.joint + k * scratch.columns + column;
    const F e = vexp(Vec::sub(Vec::load(p), m));
    Vec::store(p, e);
    s = Vec::add(s, e);
  }
  *top = m;
  *sum = s;
}

// sum += x, and adds the rounding error to rest: if M_v or r_kv is nearly equal for all token ids,
// the rounding errors of a plain sum would all have the same sign.
inline void add_compensated(float* sum, float* rest, F x) {
  const F before = Vec::load(sum);
  const F corrected = Vec::sub(x, Vec::load(rest));
  const F after = Vec::add(before, corrected);
  const F lost = Vec::sub(Vec::sub(after, before), corrected);
  Vec::store(sum, after);
  Vec::store(rest, Vec::equal(lost, lost, lost, Vec::set(0.0f)));  // NaN after an infinity
}

template <class Kind>
void mixture_statistics_of(const Logits& logits, IdRange ids, const MixtureRows& rows,
                           float* mixture, float* share, float* memory) {
  const int64_t n_passages = rows.n_passages;
  Scratch scratch(memory, logits.n_rows, n_passages);
  scratch.clear(n_passages);
  const F lowest = Vec::set(-__builtin_inff());
  for (int64_t v = ids.begin; v < ids.end; ++v) {
    const auto* z0 = line_of<typename Kind::Number>(logits, v);
    for_each_vector(logits.n_rows,
                    JointStep<Kind, false>{logits, rows, scratch, z0, bias_of(logits, v)});
    to_passage_major(scratch.by_row, scratch.joint, logits.n_rows, n_passages, scratch.columns);
    for (int64_t column = 0; column < scratch.columns; column += Vec::kWidth) {
      F top, sum;
      exponentiate(scratch, n_passages, column, &top, &sum);
      // A token id with probability 0 under every passage: M = -inf, and all shares are 0.
      const F log_mixture = Vec::equal(top, lowest, lowest, Vec::add(top, vlog(sum)));
      add_compensated(scratch.mixture_sum + column, scratch.mixture_rest + column, log_mixture);
      for (int64_t k = 0; k < n_passages; ++k) {
        const F e = Vec::load(scratch.joint + k * scratch.columns + column);
        const int64_t at = k * scratch.columns + column;
        add_compensated(scratch.share_sum + at, scratch.share_rest + at, Vec::div(e, sum));
      }
    }
  }
  for (int64_t g = 0; g < logits.n_rows / n_passages; ++g) mixture[g] = scratch.mixture_sum[g];
  to_position_major(scratch.share_sum, share, logits.n_rows, n_passages, scratch.columns);
}

void mixture_statistics(const Logits& logits, IdRange ids, const MixtureRows& rows, float* mixture,
                        float* share, float* memory) {
  with_kind(logits, [&](auto kind) {
    mixture_statistics_of<decltype(kind)>(logits, ids, rows, mixture, share, memory);
  });
}

template <class Kind>
struct MixtureGradientStep {
  const Logits& logits;
  const MixtureRows& rows;
  const Scratch& scratch;
  typename Kind::Number* z0;
  F bias;

  template <bool kWhole>
  void run(int64_t row, int64_t count) const {
    const Head head(logits);
    F slope;
    head.template logit<Kind::kCap>(head.argument(load<kWhole>(z0 + row, count), bias), &slope);
    const F p = load<kWhole>(scratch.probability + row, count);
    const F r = load<kWhole>(scratch.by_row + row, count);
    const F dz = Vec::sub(Vec::mul(load<kWhole>(rows.target + row, count), p),
                          Vec::mul(load<kWhole>(rows.spread + row, count), r));
    store<kWhole>(z0 + row, Vec::mul(dz, slope), count);
  }
};

template <class Kind>
void mixture_gradient_of(const Logits& logits, IdRange ids, const MixtureRows& rows,
                         float* memory) {
  const int64_t n_passages = rows.n_passages;
  Scratch scratch(memory, logits.n_rows, n_passages);
  scratch.clear(n_passages);
  for (int64_t v = ids.begin; v < ids.end; ++v) {
    auto* z0 = line_of<typename Kind::Number>(logits, v);
    const F bias = bias_of(logits, v);
    for_each_vector(logits.n_rows, JointStep<Kind, true>{logits, rows, scratch, z0, bias});
    to_passage_major(scratch.by_row, scratch.joint, logits.n_rows, n_passages, scratch.columns);
    for (int64_t column = 0; column < scratch.columns; column += Vec::kWidth) {
      F top, sum;
      exponentiate(scratch, n_passages, column, &top, &sum);
      for (int64_t k = 0; k < n_passages; ++k) {
        float* p = scratch.joint + k * scratch.columns + column;
        Vec::store(p, Vec::div(Vec::load(p), sum));
      }
    }
    to_position_major(scratch.joint, scratch.by_row, logits.n_rows, n_passages, scratch.columns);
    for_each_vector(logits.n_rows, MixtureGradientStep<Kind>{logits, rows, scratch, z0, bias});
  }
}

void mixture_gradient(const Logits& logits, IdRange ids, const MixtureRows& rows, float* memory) {
  with_kind(logits,
            [&](auto kind) { mixture_gradient_of<decltype(kind)>(logits, ids, rows, memory); });
}

// ------------------------------------------------------------------------------------ line passes

// The logits of the ids v to v + kWidth of a row; the last `count` of them if not kWhole.
template <bool kCap, bool kWhole>
inline F logits_at(const LogitHead& head, const float* z0, int64_t v, int64_t count) {
  const Head parts(head);
  const F bias = head.bias ? load<kWhole>(head.bias + v, count) : Vec::set(0.0f);
  return parts.logit<kCap>(parts.argument(load<kWhole>(z0 + v, count), bias));
}

template <bool kCap>
void line_statistics_of(const LogitHead& head, const float* z0, IdRange ids, float* max,
                        float* sum) {
  const int64_t whole = ids.begin + (ids.end - ids.begin) / Vec::kWidth * Vec::kWidth;
  float lanes[Vec::kWidth], top = -__builtin_inff(), total = 0.0f;
  const auto join_max = [&](F x, int64_t count) {
    Vec::store(lanes, x);
    for (int64_t i = 0; i < count; ++i) top = lanes[i] > top ? lanes[i] : top;
  };
  const auto join_sum = [&](F x, int64_t count) {
    Vec::store(lanes, x);
    for (int64_t i = 0; i < count; ++i) total += lanes[i];
  };
  F each = Vec::set(top);
  for (int64_t v = ids.begin; v < whole; v += Vec::kWidth)
    each = Vec::max(each, logits_at<kCap, true>(head, z0, v, Vec::kWidth));
  join_max(each, Vec::kWidth);
  const int64_t rest = ids.end - whole;
  if (rest > 0) join_max(logits_at<kCap, false>(head, z0, whole, rest), rest);
  *max = top;
  const F shift = Vec::set(top == -__builtin_inff() ? 0.0f : top);
  each = Vec::set(0.0f);
  for (int64_t v = ids.begin; v < whole; v += Vec::kWidth)
    each = Vec::add(each, vexp(Vec::sub(logits_at<kCap, true>(head, z0, v, Vec::kWidth), shift)));
  join_sum(each, Vec::kWidth);
  if (rest > 0)
    join_sum(vexp(Vec::sub(logits_at<kCap, false>(head, z0, whole, rest), shift)), rest);
  *sum = total;
}

void line_statistics(const LogitHead& head, const float* z0, IdRange ids, float* max, float* sum) {
  if (head.softcap > 0.0f)
    line_statistics_of<true>(head, z0, ids, max, sum);
  else
    line_statistics_of<false>(head, z0, ids, max, sum);
}

template <bool kCap>
struct LineMixtureStep {
  const LogitHead& head;
  const MixtureLines& lines;
  int64_t first;  // token id
  float* out;

  template <bool kWhole>
  void run(int64_t at, int64_t count) const {
    const F lowest = Vec::set(-__builtin_inff());
    const int64_t v = first + at;
    const auto joint = [&](int64_t k) {
      const F z = logits_at<kCap, kWhole>(head, lines.z0 + k * lines.n_ids, v, count);
      return Vec::add(z, Vec::set(lines.shift[k]));
    };
    F top = lowest, sum = Vec::set(0.0f);
    for (int64_t k = 0; k < lines.n_passages; ++k) top = Vec::max(top, joint(k));
    // An id with probability 0 under every passage, where the sum is then 0, or NaN.
    const F shift = Vec::equal(top, lowest, Vec::set(0.0f), top);
    for (int64_t k = 0; k < lines.n_passages; ++k)
      sum = Vec::add(sum, vexp(Vec::sub(joint(k), shift)));
    const F mixture = Vec::equal(top, lowest, Vec::add(lowest, sum), Vec::add(top, vlog(sum)));
    store<kWhole>(out + v, mixture, count);
  }
};

void line_mixture(const LogitHead& head, const MixtureLines& lines, IdRange ids, float* out) {
  const int64_t n = ids.end - ids.begin;
  if (head.softcap > 0.0f)
    for_each_vector(n, LineMixtureStep<true>{head, lines, ids.begin, out});
  else
    for_each_vector(n, LineMixtureStep<false>{head, lines, ids.begin, out});
}

// ------------------------------------------------------------------------------------------ table

struct SoftcapStep {
  F cap;
  float* x;

  template <bool kWhole>
  void run(int64_t row, int64_t count) const {
    F sech2;
    const F u = Vec::div(load<kWhole>(x + row, count), cap);
    store<kWhole>(x + row, Vec::mul(vtanh(u, &sech2), cap), count);
  }
};

void softcap(float cap, float* x, int64_t n) { for_each_vector(n, SoftcapStep{Vec::set(cap), x}); }

struct RoundStep {
  const float* x;
  Bfloat16* y;

  template <bool kWhole>
  void run(int64_t row, int64_t count) const {
    store<kWhole>(y + row, load<kWhole>(x + row, count), count);
  }
};

void to_bfloat16(const float* x, Bfloat16* y, int64_t n) { for_each_vector(n, RoundStep{x, y}); }

struct ElementwiseStep {
  char kind;
  const float* x;
  float* y;

  template <bool kWhole>
  void run(int64_t row, int64_t count) const {
    const F in = load<kWhole>(x + row, count);
    F sech2;
    const F tanh = vtanh(in, &sech2);
    const F out = kind == 'e' ? vexp(in) : kind == 'l' ? vlog(in) : kind == 't' ? tanh : sech2;
    store<kWhole>(y + row, out, count);
  }
};

bool elementwise(const char* name, const float* x, float* y, int64_t n) {
  const char kind = name[0];
  if (kind != 'e' && kind != 'l' && kind != 't' && kind != 's') return false;
  for_each_vector(n, ElementwiseStep{kind, x, y});
  return true;
}

const KernelTable kTable = {statistics,    gradient,        mixture_statistics, mixture_gradient,
                            Scratch::size, line_statistics, line_mixture,       softcap,
                            to_bfloat16,   elementwise};

// Vectors of any width without intrinsics.
template <int64_t kLanes>
struct ScalarDot {
  static constexpr int64_t kWidth = kLanes;
  static constexpr int kLargest = 127;
  static constexpr int kBias = kLargest;
  static constexpr bool kByElement = false;
  struct I {
    int32_t lane[kWidth];
  };
  struct F {
    float lane[kWidth];
  };

  template <class T>
  static T load_as(const void* p) {
    T x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
  template <class Op>
  static F each(Op op) {
    F x;
    for (int i = 0; i < kWidth; ++i) x.lane[i] = op(i);
    return x;
  }

  static I load(const void* p) { return load_as<I>(p); }
  static F load(const float* p) { return load_as<F>(p); }
  static void store(float* p, F x) { std::memcpy(p, &x, sizeof(x)); }
  static I set(int32_t x) { return repeat<1>(&x); }
  static F set(float x) { return repeat<1>(&x); }
  static I add(I sum, I digits, I codes) {
    for (int i = 0; i < kWidth; ++i) {
      uint8_t digit[4];
      int8_t code[4];
      std::memcpy(digit, &digits.lane[i], 4);
      std::memcpy(code, &codes.lane[i], 4);
      for (int j = 0; j < 4; ++j) sum.lane[i] += digit[j] * code[j];
    }
    return sum;
  }
  static I mul(I a, I b) {
    for (int i = 0; i < kWidth; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  static F number(I sum, I bias) {
    return each([&](int i) { return static_cast<float>(sum.lane[i] - bias.lane[i]); });
  }
  static F mul(F a, F b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static F add(F a, F b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static F sub(F a, F b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static uint64_t not_below(F a, F b) {
    uint64_t mask = 0;
    for (int i = 0; i < kWidth; ++i) mask |= uint64_t{!(a.lane[i] < b.lane[i])} << i;
    return mask;
  }

  // Repeats the n numbers at p.
  template <int n>
  static F repeat(const float* p) {
    return each([&](int i) { return p[i % n]; });
  }
  template <int n>
  static I repeat(const int32_t* p) {
    I x;
    for (int i = 0; i < kWidth; ++i) x.lane[i] = p[i % n];
    return x;
  }

  // Lane i: the sum of the lanes of x[i].
  static I sums(const I* x) {
    I sum = set(0);
    for (int i = 0; i < kWidth; ++i)
      for (const int32_t part : x[i].lane) sum.lane[i] += part;
    return sum;
  }
};

#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

inline void expect(bool good, const std::string& what) {
  if (good) return;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  std::exit(1);
}

// To the bit, but for those of a NaN.
inline void expect_same(const std::vector<float>& found, const std::vector<float>& expected,
                        const std::string& what) {
  expect(found.size() == expected.size(), what + ": sizes");
  for (size_t i = 0; i < found.size(); ++i) {
    if (!std::memcmp(&found[i], &expected[i], sizeof(float))) continue;
    expect(std::isnan(found[i]) && std::isnan(expected[i]),
           what + ": [" + std::to_string(i) + "] is " + std::to_string(found[i]) + ", not " +
               std::to_string(expected[i]));
  }
}

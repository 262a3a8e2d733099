// What the kernels use of CUDA's header of this name.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float f = exponent == 0    ? std::ldexp(static_cast<float>(fraction), -24)
            : exponent == 31 ? (fraction ? NAN : INFINITY)
                             : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return x.bits >> 15 ? -f : f;
}

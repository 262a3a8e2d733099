// What a number is on a GPU, how arrays are laid out, and how a thread reads and writes four
// neighbouring steps of one. Raw pointers and sizes; nothing of torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#define FASTRL_DEVICE_NAMESPACE fastrl::cuda
#define FASTRL_DEVICE __device__ __forceinline__
#include "../estimators.h"

namespace fastrl::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLanes = 32;

// Not inlined: eight at a time have no room beside eight of each input.
inline __device__ __noinline__ double exp_of(double x) { return ::exp(x); }

// A double beside what it is in the results' dtype V: a conversion takes as long as eight sums, and
// whichever of the two is not used is not computed.
template <class V>
struct Wide {
  double wide;
  V narrow;

  Wide() = default;
  __host__ FASTRL_DEVICE Wide(double x) : wide(x), narrow(static_cast<V>(x)) {}
  __host__ FASTRL_DEVICE Wide(double x, V v) : wide(x), narrow(v) {}
  FASTRL_DEVICE operator double() const { return wide; }

  FASTRL_DEVICE Wide operator*(const Wide& x) const { return wide * x.wide; }
  FASTRL_DEVICE Wide operator+(const Wide& x) const { return wide + x.wide; }
  FASTRL_DEVICE bool operator==(const Wide& x) const { return narrow == x.narrow; }
};

// Results have the dtype R. The files here are compiled without contraction of a * b + c: a row
// must give the same bits wherever the compiler has put a copy of an expression.
template <class R>
struct Numbers {
  using V = R;
  using D = Wide<V>;
  using M = bool;

  FASTRL_DEVICE static V narrow(const D& x) { return x.narrow; }
  FASTRL_DEVICE static D wide(V x) { return {x, x}; }
  FASTRL_DEVICE static V number(double x) { return static_cast<V>(x); }
  FASTRL_DEVICE static float exp(float x) { return expf(x); }
  FASTRL_DEVICE static double exp(double x) { return exp_of(x); }
};

template <class T>
struct ResultOf {
  using type = float;
};
template <>
struct ResultOf<double> {
  using type = double;
};
template <class T>
using Result = typename ResultOf<T>::type;

FASTRL_DEVICE float number_of(float x) { return x; }
FASTRL_DEVICE double number_of(double x) { return x; }
FASTRL_DEVICE float number_of(__nv_bfloat16 x) { return __bfloat162float(x); }
FASTRL_DEVICE float number_of(__half x) { return __half2float(x); }

// data[row][step], strides in elements. Packed rows lie one behind the other: their `row` is where
// they begin, and row_stride is step_stride.
template <class T>
struct Array {
  T* data;
  int64_t row_stride, step_stride;

  __host__ FASTRL_DEVICE explicit operator bool() const { return data != nullptr; }
  FASTRL_DEVICE T* at(int64_t row, int64_t step) const {
    return data + row * row_stride + step * step_stride;
  }
};

constexpr int kSteps = 8;  // of a thread, neighbours in time

// A thread's entries of an array, in the order of time, as they lie in memory.
template <class T>
struct alignas(sizeof(T) == 1 ? kSteps : 16) Entries {
  static constexpr int kWords = kSteps * sizeof(T) / 4;
  uint32_t words[kWords];

  FASTRL_DEVICE T operator[](int i) const {
    T entry;
    __builtin_memcpy(&entry, reinterpret_cast<const char*>(words) + i * sizeof(T), sizeof(T));
    return entry;
  }
  FASTRL_DEVICE void set(int i, T entry) {
    __builtin_memcpy(reinterpret_cast<char*>(words) + i * sizeof(T), &entry, sizeof(T));
  }
  // What was computed from the entries is not kept in registers, but computed again.
  FASTRL_DEVICE void forget_results() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) asm volatile("" : "+r"(words[i]));
  }
};

// Bit i of flag i; torch's bools are 0 or 1.
FASTRL_DEVICE unsigned bits_of(const Entries<uint8_t>& flags) {
  static_assert(kSteps == 8);
  return (flags.words[0] * 0x01020408u >> 24 & 0xf) | (flags.words[1] * 0x01020408u >> 20 & 0xf0);
}

// Steps first .. first + 7 of a row, of which those of `from` .. `to` - 1 exist.
struct Span {
  int64_t row, first;
  int from, to;

  FASTRL_DEVICE bool whole() const { return from == 0 && to == kSteps; }
  FASTRL_DEVICE bool has(int i) const { return from <= i && i < to; }
};

template <class T>
FASTRL_DEVICE bool is_vector(const Span& s, int64_t step_stride, const T* at) {
  return s.whole() && step_stride == 1 &&
         reinterpret_cast<uintptr_t>(at) % alignof(Entries<T>) == 0;
}

template <class T>
FASTRL_DEVICE Entries<T> load(const Array<const T>& x, const Span& s) {
  const T* at = x.at(s.row, s.first);
  Entries<T> entries;
  if (is_vector(s, x.step_stride, at)) {
    entries = *reinterpret_cast<const Entries<T>*>(at);
  } else {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) entries.set(i, s.has(i) ? at[i * x.step_stride] : T{});
  }
  return entries;
}

template <class T>
FASTRL_DEVICE void store(const Array<T>& x, const Span& s, const Entries<T>& entries) {
  T* at = x.at(s.row, s.first);
  if (is_vector(s, x.step_stride, at)) {
    *reinterpret_cast<Entries<T>*>(at) = entries;
  } else {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (s.has(i)) at[i * x.step_stride] = entries[i];
    }
  }
}

// Where all lanes have whole entries: 32 bytes each, a sector of memory, of which one store has
// half. So lanes trade with their neighbour, and store the even lane's sector together, then the
// odd one's: no sector is written in parts.
FASTRL_DEVICE void store_sectors(float* to, int64_t at, const Entries<float>& entries) {
  struct alignas(16) Half {
    uint32_t words[4];
  } keeps, gets;
  const bool odd = threadIdx.x & 1;
  const int64_t other = __shfl_xor_sync(kAllLanes, at, 1);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = entries.words[i], high = entries.words[4 + i];
    gets.words[i] = __shfl_xor_sync(kAllLanes, odd ? low : high, 1);
    keeps.words[i] = odd ? high : low;
  }
  Half* of_even = reinterpret_cast<Half*>(to + (odd ? other : at));
  Half* of_odd = reinterpret_cast<Half*>(to + (odd ? at : other));
  of_even[odd] = odd ? gets : keeps;
  of_odd[odd] = odd ? keeps : gets;
}
FASTRL_DEVICE void store_sectors(double* to, int64_t at, const Entries<double>& entries) {
  *reinterpret_cast<Entries<double>*>(to + at) = entries;
}

}  // namespace fastrl::cuda

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

// Not inlined: four at a time, side by side, have no room beside four of each input.
inline __device__ __noinline__ double exp_of(double x) { return ::exp(x); }

// Results have the dtype R. The files here are compiled without contraction of a * b + c: a row
// must give the same bits wherever the compiler has put a copy of an expression.
template <class R>
struct Numbers {
  using V = R;
  using D = double;
  using M = bool;

  FASTRL_DEVICE static V narrow(D x) { return static_cast<V>(x); }
  FASTRL_DEVICE static D wide(V x) { return x; }
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

// Four of an array's entries, in the order of time, as they lie in memory.
template <class T>
struct alignas(sizeof(T) == 8 ? 16 : 4 * sizeof(T)) Four {
  uint32_t words[sizeof(T)];

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
    for (int i = 0; i < static_cast<int>(sizeof(T)); ++i) asm volatile("" : "+r"(words[i]));
  }
};

template <class T>
FASTRL_DEVICE bool is_aligned(const T* at) {
  return reinterpret_cast<uintptr_t>(at) % alignof(Four<T>) == 0;
}

// Steps first .. first + 3 of a row, of which those of `from` .. `to` - 1 exist.
struct Span {
  int64_t row, first;
  int from, to;

  FASTRL_DEVICE bool whole() const { return from == 0 && to == 4; }
  FASTRL_DEVICE bool has(int i) const { return from <= i && i < to; }
};

template <class T>
FASTRL_DEVICE Four<T> load(const Array<const T>& x, const Span& s) {
  const T* at = x.at(s.row, s.first);
  Four<T> four;
  if (s.whole() && x.step_stride == 1 && is_aligned(at)) {
    four = *reinterpret_cast<const Four<T>*>(at);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) four.set(i, s.has(i) ? at[i * x.step_stride] : T{});
  }
  return four;
}

template <class T>
FASTRL_DEVICE void store(const Array<T>& x, const Span& s, const Four<T>& four) {
  T* at = x.at(s.row, s.first);
  if (s.whole() && x.step_stride == 1 && is_aligned(at)) {
    *reinterpret_cast<Four<T>*>(at) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (s.has(i)) at[i * x.step_stride] = four[i];
    }
  }
}

}  // namespace fastrl::cuda

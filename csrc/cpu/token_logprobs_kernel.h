// Log-softmax statistics of a row, and its gradient: the loops, at one instruction set's width.
// Included by kernels_*.cpp after simd.h.

namespace fastrl::FASTRL_SIMD {

// 8 KB of floats: a block is read from memory once, for its maximum, and then again from L1.
constexpr int64_t kBlock = 2048;
constexpr int64_t kStep = 2 * kLanes;
constexpr int64_t kPrefetch = 4096;  // elements ahead; the hardware stops at every 4 KB page

// Fetches what stands kPrefetch elements behind x[i], and once a page the address of one two pages
// further: finding a page takes as long as reading from it.
// Through an integer: the address may lie behind the row, where a pointer may not be formed.
template <class T>
inline void prefetch(const T* x, int64_t i) {
  constexpr uintptr_t kPage = 4096;
  const uintptr_t at = reinterpret_cast<uintptr_t>(x) + (i + kPrefetch) * sizeof(T);
  __builtin_prefetch(reinterpret_cast<const void*>(at));
  if constexpr (kStep * sizeof(T) > 64) __builtin_prefetch(reinterpret_cast<const void*>(at + 64));
  if (i * sizeof(T) % kPage == 0) {
    __builtin_prefetch(reinterpret_cast<const void*>(at + 2 * kPage));
  }
}

struct BlockSums {
  VecF rest[2] = {}, count[2] = {}, weighted[2] = {};
};

// Sums a block against its maximum `m`, which stays out of `rest`.
template <bool kEntropy, class T, class Exp>
inline void add_max_block(const T* x, int64_t n, VecF m, const Exp& exp, BlockSums& sums) {
  for (int64_t i = 0; i < n; i += kStep) {
    for (int u = 0; u < 2; ++u) {
      const VecF zero{}, d = exp.clamp(load(x + i + u * kLanes) - m);
      const VecF e = d == zero ? zero : exp(d);
      sums.count[u] += d == zero ? zero + 1.0f : zero;
      sums.rest[u] += e;
      if constexpr (kEntropy) sums.weighted[u] -= e * d;
    }
  }
}

// Sums a block against an `m` that it need not reach, and finds its maximum, in one pass. Where
// that is m or larger, the sums are good for nothing.
template <bool kEntropy, class T, class Exp>
inline float add_block_below(const T* x, int64_t n, VecF m, const Exp& exp, BlockSums& sums) {
  VecF top[2] = {splat(-__builtin_inff()), splat(-__builtin_inff())};
  for (int64_t i = 0; i < n; i += kStep) {
    prefetch(x, i);
    for (int u = 0; u < 2; ++u) {
      const VecF v = load(x + i + u * kLanes);
      top[u] = max(v, top[u]);
      const VecF d = exp.clamp(v - m);
      const VecF e = exp(d);
      sums.rest[u] += e;
      if constexpr (kEntropy) sums.weighted[u] -= e * d;
    }
  }
  return max_lane(max(top[0], top[1]));
}

template <class T>
inline float block_max(const T* x, int64_t n) {
  VecF m0 = splat(-__builtin_inff()), m1 = m0;
  for (int64_t i = 0; i < n; i += kStep) {
    prefetch(x, i);
    m0 = max(load(x + i), m0);
    m1 = max(load(x + i + kLanes), m1);
  }
  return max_lane(max(m0, m1));
}

// RowState of a chunk, each sum still spread over lanes.
struct ChunkState {
  float max = -__builtin_inff();
  WideSum rest, count, weighted;

  void raise_max(float m, double scale) {
    if (max != -__builtin_inff()) {
      const double gap = static_cast<double>(m) - max, shrink = std::exp(-gap * scale);
      shift(rest.low, count.low, weighted.low, gap, shrink);
      shift(rest.high, count.high, weighted.high, gap, shrink);
    }
    max = m;
  }
  template <bool kEntropy>
  void add(const BlockSums& sums) {
    rest.add(sums.rest[0] + sums.rest[1]);
    count.add(sums.count[0] + sums.count[1]);
    if constexpr (kEntropy) weighted.add(sums.weighted[0] + sums.weighted[1]);
  }
  static void shift(VecD& rest, VecD& count, VecD& weighted, double gap, double shrink) {
    rest += count;
    count = VecD{};
    weighted = shrink * (weighted + gap * rest);
    rest *= shrink;
  }
};

template <class T>
inline bool has_nan(const T* x, int64_t n) {
  VecI found{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecF v = load(x + i);
    found |= v != v;
  }
  int32_t any = 0;
  for (int l = 0; l < kLanes; ++l) any |= found[l];
  return any != 0;
}

template <bool kEntropy, class T, class Exp>
inline void add_to_state(const T* x, int64_t n, double scale, const Exp& exp, ChunkState& s) {
  float m;
  if (s.max != -__builtin_inff()) {  // most blocks do not reach the maximum of those before
    BlockSums sums;
    m = add_block_below<kEntropy>(x, n, splat(s.max), exp, sums);
    if (m < s.max) return s.add<kEntropy>(sums);
  } else {
    m = block_max(x, n);
  }
  if (m > s.max) s.raise_max(m, scale);
  if (s.max == -__builtin_inff()) {  // nothing finite yet: -inf adds nothing, NaN must not vanish
    if (has_nan(x, n)) s.rest.low += __builtin_nan("");
    return;
  }
  BlockSums sums;
  add_max_block<kEntropy>(x, n, splat(s.max), exp, sums);
  s.add<kEntropy>(sums);
}

template <class T>
constexpr T kMinusInf = T{};
template <>
constexpr float kMinusInf<float> = -__builtin_inff();
template <>
constexpr BFloat16 kMinusInf<BFloat16> = {0xff80};
template <>
constexpr Half kMinusInf<Half> = {0xfc00};

template <bool kEntropy, class Exp, class T>
inline RowState sum_chunk(const T* x, int64_t n, double scale) {
  const Exp exp(scale);
  ChunkState state;
  int64_t i = 0;
  for (; i + kStep <= n; i += kBlock) {
    const int64_t block = n - i < kBlock ? (n - i) / kStep * kStep : kBlock;
    add_to_state<kEntropy>(x + i, block, scale, exp, state);
    if (block < kBlock) {
      i += block;
      break;
    }
  }
  if (i < n) {  // the tail, padded with what adds nothing: never a read past the row's end
    T tail[kStep];
    for (int64_t j = 0; j < kStep; ++j) tail[j] = i + j < n ? x[i + j] : kMinusInf<T>;
    add_to_state<kEntropy>(tail, kStep, scale, exp, state);
  }
  return {state.max, state.rest.total(), state.count.total(), state.weighted.total()};
}

template <class T>
RowState chunk_state(const T* x, int64_t n, double temperature, bool entropy) {
  const double scale = 1.0 / temperature;
  if (needs_low_part(scale)) {
    return entropy ? sum_chunk<true, ExpOf<true>>(x, n, scale)
                   : sum_chunk<false, ExpOf<true>>(x, n, scale);
  }
  return entropy ? sum_chunk<true, ExpOf<false>>(x, n, scale)
                 : sum_chunk<false, ExpOf<false>>(x, n, scale);
}

// d = (delta_jt - p_j) g - h p_j (log p_j + H), over the temperature; the target's own entry comes
// from "everything but the target" = -expm1(log p_t), or p -> 1 would cancel.
template <bool kEntropy, bool kStream, class T>
inline void grad_block(const T* x, int64_t n, VecF m, const ScaledExp& exp, VecF a, VecF b,
                       T* out) {
  for (int64_t i = 0; i < n; i += kStep) {
    prefetch(x, i);
    for (int u = 0; u < 2; ++u) {
      const int64_t at = i + u * kLanes;
      const VecF d = exp.clamp(load(x + at) - m);
      const VecF grad = exp(d) * (kEntropy ? b * d + a : a);
      if constexpr (kStream) {
        stream(out + at, grad);
      } else {
        store(out + at, grad);
      }
    }
  }
}

template <bool kEntropy, class T>
inline void fill_grad(const T* x, int64_t n, VecF m, const ScaledExp& exp, VecF a, VecF b,
                      [[maybe_unused]] bool streamed, T* out) {
  const int64_t whole = n / kStep * kStep;
  if constexpr (std::is_same_v<T, float>) {
    if (streamed && reinterpret_cast<uintptr_t>(out) % sizeof(VecF) == 0) {
      grad_block<kEntropy, true>(x, whole, m, exp, a, b, out);
      end_of_stream();
    } else {
      grad_block<kEntropy, false>(x, whole, m, exp, a, b, out);
    }
  } else {
    grad_block<kEntropy, false>(x, whole, m, exp, a, b, out);
  }
  if (whole == n) return;
  T tail[kStep], grad[kStep];
  for (int64_t j = 0; j < kStep; ++j) tail[j] = whole + j < n ? x[whole + j] : kMinusInf<T>;
  grad_block<kEntropy, false>(tail, kStep, m, exp, a, b, grad);
  __builtin_memcpy(out + whole, grad, (n - whole) * sizeof(T));
}

// At tiny temperatures: infinity times the 0 of the row's maximum would be NaN.
inline float finite(double x) {
  return static_cast<float>(x > 3.4e38 ? 3.4e38 : x < -3.4e38 ? -3.4e38 : x);
}

template <class T>
inline void from_double(double value, T* x) {
  T padded[kLanes];
  store(padded, splat(static_cast<float>(value)));
  *x = padded[0];
}

template <class T>
void row_grad(const T* x, int64_t n, const TokenLogprobsGrad& row, T* grad) {
  const double scale = 1.0 / row.temperature;
  const ScaledExp exp(scale);
  const double g = row.grad_logprob, h = row.grad_entropy;
  const double inv_total = std::exp(-row.log_total);
  const VecF m = splat(static_cast<float>(row.max));
  const double a = -(g + h * (row.entropy - row.log_total)) * scale * inv_total;
  const double b = -h * scale * scale * inv_total;
  const VecF va = splat(finite(a)), vb = splat(finite(b));
  if (h == 0.0) {
    fill_grad<false>(x, n, m, exp, va, vb, row.stream, grad);
  } else {
    fill_grad<true>(x, n, m, exp, va, vb, row.stream, grad);
  }
  if (row.token_id < 0) return;
  const double logprob = row.logprob, p = std::exp(logprob);
  const double entropy_part = p > 0.0 ? h * p * (logprob + row.entropy) : 0.0;
  const double grad_target = (-g * std::expm1(logprob) - entropy_part) * scale;
  from_double(grad_target, grad + row.token_id);
}

template <class T>
constexpr LogprobKernels<T> kLogprobs = {&chunk_state<T>, &row_grad<T>};

}  // namespace fastrl::FASTRL_SIMD

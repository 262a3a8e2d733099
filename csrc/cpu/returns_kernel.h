// Returns and advantages of one trajectory: x_t = b_t + a_t x_{t+1}, from the last step to the
// first. Included by kernels_*.cpp, once per instruction set; the estimators differ in the few
// lines that form (a_t, b_t) and in what they write.

namespace fastrl::FASTRL_SIMD {

constexpr int64_t kSteps = 1024;  // a block of a trajectory: its buffers stay in L1

// A block of the recursion. a is double: (gamma lambda)^T over a long row would magnify the
// rounding of gamma itself to float.
template <class T>
struct Block {
  double a[kSteps];
  T b[kSteps];
  T c[kSteps];       // gamma_t (1 - terminated_t)
  T v_next[kSteps];  // the value after each step
};

inline void clear_where(const uint8_t* flags, int64_t n, double* x) {
  if (!flags) return;
  for (int64_t i = 0; i < n; ++i) x[i] = flags[i] ? 0.0 : x[i];
}

// c_t = gamma_t (1 - terminated_t), and a_t = c_t lambda_t (1 - truncated_t).
template <class T>
inline void load_discounts(const Trajectory<T>& row, int64_t start, int64_t n, Block<T>& s) {
  const auto from = [start](const uint8_t* flags) { return flags ? flags + start : nullptr; };
  const double gamma = row.constant_gamma, lambda = row.constant_lambda;
  if (row.gamma) {
    for (int64_t i = 0; i < n; ++i) s.a[i] = row.gamma[start + i];
  } else {
    for (int64_t i = 0; i < n; ++i) s.a[i] = gamma;
  }
  clear_where(from(row.terminated), n, s.a);
  for (int64_t i = 0; i < n; ++i) s.c[i] = static_cast<T>(s.a[i]);
  if (row.gae_lambda) {
    for (int64_t i = 0; i < n; ++i) s.a[i] *= row.gae_lambda[start + i];
  } else {
    for (int64_t i = 0; i < n; ++i) s.a[i] *= lambda;
  }
  clear_where(from(row.truncated), n, s.a);
}

// v_{t+1} for each step of the block: given, or the value of the next step that is an action.
// `after` is the value behind the block on entry, and that of the block's first action on return.
template <class T>
inline void load_next_values(const Trajectory<T>& row, int64_t start, int64_t n, T* v_next,
                             T& after) {
  if (row.next_values) {
    std::memcpy(v_next, row.next_values + start, n * sizeof(T));
    return;
  }
  const T* v = row.values + start;
  if (row.mask) {
    for (int64_t i = n - 1; i >= 0; --i) {
      v_next[i] = after;
      after = row.mask[start + i] ? v[i] : after;
    }
    return;
  }
  std::memcpy(v_next, v + 1, (n - 1) * sizeof(T));
  v_next[n - 1] = after;
  after = v[0];
}

// A masked step is (a, b) = (1, 0): the recursion carries over it, and nothing there is looked at.
template <class T>
inline void skip_masked(const Trajectory<T>& row, int64_t start, int64_t n, Block<T>& s) {
  if (!row.mask) return;
  const uint8_t* mask = row.mask + start;
  for (int64_t i = 0; i < n; ++i) s.a[i] = mask[i] ? s.a[i] : 1.0;
  for (int64_t i = 0; i < n; ++i) s.b[i] = mask[i] ? s.b[i] : T(0);
}

// (a, b) of lane i composed with those of the lanes behind it, S at a time: a scan in log2 steps.
template <int S>
inline void compose(VecD& a, VecD& b) {
  if constexpr (S < kDoubles) {
    b += a * shift<S>(b, VecD{});
    a *= shift<S>(a, VecD{} + 1.0);
    compose<2 * S>(a, b);
  }
}

// What a block will be written to. Its lines are claimed while the block is scanned, which touches
// no memory: a store that first waits for its line costs more than the recursion.
template <class T>
struct Outputs {
  T* first;
  T* second = nullptr;

  void claim(int64_t i) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    if (i % kLine != 0) return;
    __builtin_prefetch(first + i, 1);
    if (second) __builtin_prefetch(second + i, 1);
  }
  Outputs from(int64_t start) const { return {first + start, second ? second + start : nullptr}; }
};

// x_i = b_i + a_i x_{i+1} over the block, in place of b. The sum is carried in double, and the
// chain from one vector to the next is a single multiply-add. Short blocks end on a few plain
// steps.
template <class T>
inline double scan_block(const double* a, T* b, int64_t n, const Outputs<T>& outputs, double x) {
  int64_t i = n;
  for (; i >= kDoubles; i -= kDoubles) {
    outputs.claim(i - kDoubles);
    VecD va = load_doubles(a + i - kDoubles), vb = load_doubles(b + i - kDoubles);
    compose<1>(va, vb);
    const VecD scanned = vb + va * x;
    store_doubles(b + i - kDoubles, scanned);
    x = scanned[0];
  }
  for (; i > 0; --i) {
    x = b[i - 1] + a[i - 1] * x;
    b[i - 1] = static_cast<T>(x);
  }
  return x;
}

template <class T>
inline T end_value(const Trajectory<T>& row) {
  return row.bootstrap_value ? *row.bootstrap_value : T(0);
}

// Blocks are cut from the row's end: a trajectory is summed in the same steps wherever it stands.
template <class Body>
inline void for_each_block_backwards(int64_t length, Body body) {
  for (int64_t end = length; end > 0;) {
    const int64_t n = end < kSteps ? end : kSteps;
    body(end - n, n);
    end -= n;
  }
}

// A_t = delta_t + c_t lambda_t k_t A_{t+1}, delta_t = r_t + c_t v_{t+1} - v_t; write(start, n, A).
template <class T, class Write>
inline void for_each_advantage(const Trajectory<T>& row, const Outputs<T>& outputs, Write write) {
  Block<T> s;
  T after = end_value(row);
  double advantage = 0.0;
  for_each_block_backwards(row.length, [&](int64_t start, int64_t n) {
    load_discounts(row, start, n, s);
    load_next_values(row, start, n, s.v_next, after);
    const T *r = row.rewards + start, *v = row.values + start;
    for (int64_t i = 0; i < n; ++i) {
      // 0 * inf would be nan: behind a termination nothing is looked at.
      s.b[i] = r[i] + (s.c[i] == T(0) ? T(0) : s.c[i] * s.v_next[i]) - v[i];
    }
    skip_masked(row, start, n, s);
    advantage = scan_block(s.a, s.b, n, outputs.from(start), advantage);
    write(start, n, s.b);
  });
}

template <class T>
inline void zero_masked(const Trajectory<T>& row, int64_t start, int64_t n, T* out) {
  if (!row.mask) return;
  for (int64_t i = 0; i < n; ++i) out[start + i] = row.mask[start + i] ? out[start + i] : T(0);
}

template <class T>
void gae(const Trajectory<T>& row, T* advantages, T* returns) {
  const Outputs<T> outputs{advantages, returns};
  for_each_advantage(row, outputs, [&](int64_t start, int64_t n, const T* advantage) {
    std::memcpy(advantages + start, advantage, n * sizeof(T));
    for (int64_t i = 0; i < n; ++i) returns[start + i] = advantage[i] + row.values[start + i];
    zero_masked(row, start, n, advantages);
    zero_masked(row, start, n, returns);
  });
}

template <class T>
void lambda_returns(const Trajectory<T>& row, T* returns) {
  for_each_advantage(row, Outputs<T>{returns}, [&](int64_t start, int64_t n, const T* advantage) {
    for (int64_t i = 0; i < n; ++i) returns[start + i] = advantage[i] + row.values[start + i];
    zero_masked(row, start, n, returns);
  });
}

template <class T>
inline int64_t last_action(const Trajectory<T>& row) {
  int64_t t = row.length - 1;
  while (row.mask && t >= 0 && !row.mask[t]) --t;
  return t;
}

// R_t = r_t + c_t (k_t R_{t+1} + (1 - k_t) v_{t+1}); after the last action comes the bootstrap
// value.
template <class T>
void discounted_returns(const Trajectory<T>& row, T* returns) {
  const int64_t last = last_action(row);
  if (last < 0) {
    std::memset(returns, 0, row.length * sizeof(T));
    return;
  }
  Block<T> s;
  double x = row.next_values ? row.next_values[last] : end_value(row);
  for_each_block_backwards(row.length, [&](int64_t start, int64_t n) {
    load_discounts(row, start, n, s);
    std::memcpy(s.b, row.rewards + start, n * sizeof(T));
    if (row.truncated) {
      for (int64_t i = 0; i < n; ++i) {
        const bool cut = row.truncated[start + i] && s.c[i] != T(0);
        s.b[i] += cut ? s.c[i] * row.next_values[start + i] : T(0);
      }
    }
    skip_masked(row, start, n, s);
    x = scan_block(s.a, s.b, n, Outputs<T>{returns + start}, x);
    std::memcpy(returns + start, s.b, n * sizeof(T));
    zero_masked(row, start, n, returns);
  });
}

// The transpose of the recursion runs forward in time: s_t = grad_t + a_{t-1} s_{t-1}. `td` tells
// that v_{t+1} enters every step (gae, lambda_returns) and not only where the recursion is cut.
template <class T>
void returns_bwd(const Trajectory<T>& row, bool td, const T* grad, T* grad_rewards, T* grad_next,
                 T* grad_bootstrap) {
  double s = 0.0, carried = 0.0, to_value = 0.0;
  const int64_t last = last_action(row);
  for (int64_t t = 0; t < row.length; ++t) {
    grad_rewards[t] = T(0);
    if (grad_next) grad_next[t] = T(0);
    if (row.mask && !row.mask[t]) continue;
    const double gamma = row.gamma ? row.gamma[t] : row.constant_gamma;
    const double lambda = row.gae_lambda ? row.gae_lambda[t] : row.constant_lambda;
    const double c = row.terminated && row.terminated[t] ? 0.0 : gamma;
    const double k = row.truncated && row.truncated[t] ? 0.0 : 1.0;
    s = grad[t] + carried;
    carried = c * k * lambda * s;
    grad_rewards[t] = static_cast<T>(s);
    if (grad_next && !row.next_values && td) grad_next[t] = static_cast<T>(to_value);
    to_value = td ? c * s : c * (1.0 - k) * s;
    if (!td && t == last) to_value = c * s;  // the end of the row stands for v_{t+1}
    if (grad_next && row.next_values) grad_next[t] = static_cast<T>(to_value);
  }
  if (grad_bootstrap) *grad_bootstrap = static_cast<T>(row.next_values ? 0.0 : to_value);
}

template <class T>
constexpr Kernels<T> kReturns = {&gae<T>, &lambda_returns<T>, &discounted_returns<T>,
                                 &returns_bwd<T>};

}  // namespace fastrl::FASTRL_SIMD

// One step of a call on trajectories after another, kDoubles at a time: what csrc/estimators.h sees
// of it, loaded from any dtype and layout, and where its results go. Included by kernels_*.cpp.

namespace fastrl::FASTRL_SIMD {

struct Lanes {
  using V = VecD;
  using D = VecD;
  using M = VecL;
  static VecD number(double x) { return splat_double(x); }
  static VecD wide(VecD x) { return x; }
  static VecD narrow(VecD x) { return x; }
};

// Which lanes of a vector are in memory: all, or those from `first` on.
struct Present {
  int first, count;
};

template <class T>
FASTRL_INLINE VecD load_present(const T* p, const Present& in) {
  T lanes[kDoubles] = {};
  __builtin_memcpy(lanes + in.first, p + in.first, in.count * sizeof(T));
  return load_doubles(lanes);
}

template <bool kAll, class T>
FASTRL_INLINE VecD load_as(const void* data, int64_t at, const Present& in) {
  const T* p = static_cast<const T*>(data) + at;
  if constexpr (kAll) return load_doubles(p);
  return load_present(p, in);
}

// A call's own dtypes: the branch is the same for all of its vectors.
template <bool kAll>
FASTRL_INLINE VecD load(const Floats& x, int64_t at, const Present& in) {
  if (__builtin_expect(x.type == Float::f32, true)) return load_as<kAll, float>(x.data, at, in);
  if (x.type == Float::f64) return load_as<kAll, double>(x.data, at, in);
  if (x.type == Float::bf16) return load_as<kAll, BFloat16>(x.data, at, in);
  return load_as<kAll, Half>(x.data, at, in);
}
template <bool kAll>
FASTRL_INLINE VecD load_or(const Floats& x, int64_t at, const Present& in, double missing) {
  return x.data ? load<kAll>(x, at, in) : splat_double(missing);
}
template <bool kAll>
FASTRL_INLINE VecL load(const Flags& x, int64_t at, const Present& in) {
  if (!x.data) return VecL{};
  if constexpr (kAll) return load_flags(x.data + at);
  uint8_t lanes[kDoubles] = {};
  __builtin_memcpy(lanes + in.first, x.data + at + in.first, in.count);
  return load_flags(lanes);
}

// exp of a log-ratio, in the precision that it was given in.
template <bool kAll>
FASTRL_INLINE VecD load_ratio(const Floats& x, int64_t at, const Present& in) {
  if (kAll && __builtin_expect(x.type == Float::f32, true)) {
    return widen(exp_floats(load_floats(static_cast<const float*>(x.data) + at)));
  }
  const VecD log_ratio = load<kAll>(x, at, in);
  if (x.type == Float::f64) return exp_doubles(log_ratio);
  return widen(exp_floats(__builtin_convertvector(log_ratio, VecHalfF)));
}

inline double value_at(const Floats& x, int64_t at) {
  return load<false>(Floats{x.data, x.type, 0}, at, Present{0, 1})[0];
}

template <bool kAll, class T>
FASTRL_INLINE void store_as(T* p, VecD v, const Present& in) {
  if constexpr (kAll) {
    store_doubles(p, v);
  } else {
    T lanes[kDoubles];
    store_doubles(lanes, v);
    __builtin_memcpy(p + in.first, lanes + in.first, in.count * sizeof(T));
  }
}
template <bool kAll>
FASTRL_INLINE void store(const Results& x, int64_t at, VecD v, const Present& in) {
  if (x.type == Float::f32) {
    store_as<kAll>(static_cast<float*>(x.data) + at, v, in);
  } else {
    store_as<kAll>(static_cast<double*>(x.data) + at, v, in);
  }
}

inline int size_of(Float type) { return type == Float::f64 ? 8 : type == Float::f32 ? 4 : 2; }

// The arrays of a call from step 0 of one row on, or of the first of rows side by side.
inline Trajectories from_row(Trajectories x, int64_t row, int64_t origin) {
  const auto offset = [&](int64_t stride) { return x.time_major ? row : row * stride + origin; };
  for (Floats* f : {&x.rewards, &x.values, &x.next_values, &x.q_values, &x.log_ratio, &x.grad_first,
                    &x.grad_second, &x.td_error, &x.carried, &x.gamma, &x.gae_lambda}) {
    if (f->data) f->data = static_cast<const char*>(f->data) + offset(f->stride) * size_of(f->type);
  }
  for (Flags* f : {&x.terminated, &x.truncated, &x.mask}) {
    if (f->data) f->data += offset(f->stride);
  }
  for (Results& r : x.results) {
    if (r.data) r.data = static_cast<char*>(r.data) + offset(r.stride) * size_of(r.type);
  }
  return x;
}

// Where step t of a row, or of the row that is lane 0 of rows side by side, stands in an array.
template <bool kTimeMajor>
struct Place {
  int64_t t, lane;

  template <class Array>
  int64_t in(const Array& x) const {
    return kTimeMajor ? t * x.stride + lane : t;
  }
};

// Most calls are plain: float32, one gamma and one lambda, nothing masked or truncated. Where the
// compiler is told so, most branches of the loop over a row go.
inline bool is_plain(const Trajectories& x) {
  bool plain = !x.gamma.data && !x.gae_lambda.data && !x.mask.data && !x.truncated.data;
  for (const Floats* f : {&x.rewards, &x.values, &x.next_values, &x.q_values, &x.log_ratio,
                          &x.grad_first, &x.grad_second, &x.td_error, &x.carried}) {
    plain &= f->type == Float::f32;
  }
  return plain && x.results[0].type == Float::f32;
}
FASTRL_INLINE void assume_plain(Trajectories& x) {
  x.gamma = x.gae_lambda = Floats{};
  x.mask = x.truncated = Flags{};
  x.rewards.type = x.values.type = x.next_values.type = x.q_values.type = Float::f32;
  x.log_ratio.type = x.grad_first.type = x.grad_second.type = Float::f32;
  x.td_error.type = x.carried.type = Float::f32;
  for (Results& r : x.results) r.type = Float::f32;
}

// Asks for the lines of kDoubles further steps of rows side by side, which are far apart in memory:
// no processor guesses them.
inline void prefetch_steps(const Trajectories& rows, int64_t t, int64_t lane) {
  for (const Floats* f : {&rows.rewards, &rows.values, &rows.next_values, &rows.log_ratio}) {
    if (!f->data) continue;
    const char* p = static_cast<const char*>(f->data) + (t * f->stride + lane) * size_of(f->type);
    for (int i = 0; i < kDoubles; ++i) __builtin_prefetch(p + i * f->stride * size_of(f->type));
  }
  for (const Results& r : rows.results) {
    if (!r.data) continue;
    const char* p = static_cast<const char*>(r.data) + (t * r.stride + lane) * size_of(r.type);
    for (int i = 0; i < kDoubles; ++i) __builtin_prefetch(p + i * r.stride * size_of(r.type), 1);
  }
}

inline int64_t place(const Trajectories& x, int64_t stride, int64_t t, int64_t lane) {
  return x.time_major ? t * stride + lane : t;
}

inline bool is_action(const Trajectories& row, int64_t t, int64_t lane) {
  return !row.mask.data || row.mask.data[place(row, row.mask.stride, t, lane)];
}

// The last action before `end` and from `begin` on; begin - 1 where there is none.
inline int64_t last_action(const Trajectories& row, int64_t end, int64_t lane, int64_t begin = 0) {
  int64_t t = end - 1;
  while (t >= begin && !is_action(row, t, lane)) --t;
  return t;
}

// The first action from `begin` on; `end` where there is none before it.
inline int64_t next_action(const Trajectories& row, int64_t begin, int64_t end, int64_t lane) {
  while (begin < end && !is_action(row, begin, lane)) ++begin;
  return begin;
}

// ratio: exp of log_ratio where the caller has it already.
template <class E, bool kAll, class At>
FASTRL_INLINE Step<Lanes> load_step(const Trajectories& x, const At& at, const Present& in,
                                    const VecD* ratio = nullptr) {
  const auto floats = [&](const Floats& f)
                          __attribute__((always_inline)) { return load<kAll>(f, at.in(f), in); };
  const auto floats_or = [&](const Floats& f, double missing) __attribute__((always_inline)) {
    return load_or<kAll>(f, f.data ? at.in(f) : 0, in, missing);
  };
  const auto flags = [&](const Flags& f) __attribute__((always_inline)) {
    return load<kAll>(f, f.data ? at.in(f) : 0, in);
  };
  Step<Lanes> s{};
  if constexpr (E::kReads & kReward) s.reward = floats(x.rewards);
  if constexpr (E::kReads & kValue) s.value = floats(x.values);
  if constexpr (E::kReads & (kNextValue | kValueAtCut))
    s.next_value = floats_or(x.next_values, 0.0);
  if constexpr (E::kReads & kQValue) s.q_value = floats(x.q_values);
  if constexpr (E::kReads & kLogRatio) {
    s.ratio = ratio ? *ratio : load_ratio<kAll>(x.log_ratio, at.in(x.log_ratio), in);
  }
  if constexpr (E::kReads & kGrads) {
    s.grad_first = floats_or(x.grad_first, 0.0);
    s.grad_second = floats_or(x.grad_second, 0.0);
  }
  if constexpr (E::kReads & kErrors) {
    s.td_error = floats_or(x.td_error, 0.0);
    s.carried = floats_or(x.carried, 0.0);
  }
  s.gamma = floats_or(x.gamma, x.constant_gamma);
  s.lambda = floats_or(x.gae_lambda, x.constant_lambda);
  s.terminated = flags(x.terminated);
  s.truncated = flags(x.truncated);
  return s;
}

// The steps that exist: those of the row that mask keeps.
template <bool kAll, class At>
FASTRL_INLINE VecL load_actions(const Trajectories& x, const At& at, const Present& in) {
  if (x.mask.data) return load<kAll>(x.mask, at.in(x.mask), in);
  if constexpr (kAll) return VecL{} - 1;
  uint8_t lanes[kDoubles] = {};
  for (int i = 0; i < in.count; ++i) lanes[in.first + i] = 1;
  return load_flags(lanes);
}

}  // namespace fastrl::FASTRL_SIMD

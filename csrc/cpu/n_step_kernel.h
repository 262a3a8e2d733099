// n-step returns of whole rows, in time that does not grow with n. Included by kernels_*.cpp after
// value_grads_kernel.h.
//
// Step t maps what follows it, f_t(x) = b_t + a_t x, and a window of n steps ends on a value of its
// own, e. Steps are cut into blocks of n: a window is the end of one block and the beginning of the
// next, so it is a composition from inside the block applied to one that grows from the next
// block's beginning (van Herk 1992; Gil and Werman 1993). Nothing is divided or subtracted.

namespace fastrl::FASTRL_SIMD {

// As apply and further of the scan.
template <bool kGuarded = true>
inline double apply_one(double a, double b, double x) {
  return kGuarded && a == 0.0 ? b : b + a * x;
}
template <bool kGuarded>
inline double further_one(double a, double next) {
  if (!kGuarded) return a * next;
  return a == 0.0 || next == 0.0 ? 0.0 : std::max(a * next, kLeastFactor);
}

// The actions of one row, one after another.
struct Actions {
  double *a, *b, *e, *out;  // [count]
  double *inner_a, *inner_b;
  int64_t count;
};

// out_i = f_i(f_{i+1}(... e_{i+n-1})), or up to the last action where fewer are left. n >= 1. False
// if one of them is not finite.
template <bool kGuarded>
inline bool solve_windows(const Actions& x, int64_t n) {
  bool finite = true;
  for (int64_t start = 0; start < x.count; start += n) {
    const int64_t end = std::min(start + n, x.count), next = std::min(end + n, x.count) - end;
    double whole = x.e[end - 1], a = x.a[end - 1], b = x.b[end - 1];
    x.inner_a[end - 1] = a;
    x.inner_b[end - 1] = b;
    x.out[end - 1] = whole;
    for (int64_t i = end - 2; i >= start; --i) {
      whole = apply_one<kGuarded>(x.a[i], x.b[i], whole);
      b = apply_one<kGuarded>(x.a[i], x.b[i], b);
      a = further_one<kGuarded>(x.a[i], a);
      x.inner_a[i] = a;
      x.inner_b[i] = b;
      x.out[i] = whole;
      finite &= whole - whole == 0.0;
    }
    finite &= x.out[end - 1] - x.out[end - 1] == 0.0;
    if (next == 0) break;  // the last block: its windows end where the row does
    double outer_a = 1.0, outer_b = 0.0, value = 0.0;
    for (int64_t o = 1; o < end - start; ++o) {
      if (o <= next) {
        const int64_t j = end + o - 1;
        value = apply_one<kGuarded>(outer_a, outer_b, x.e[j]);
        outer_b = apply_one<kGuarded>(outer_a, outer_b, x.b[j]);
        outer_a = further_one<kGuarded>(outer_a, x.a[j]);
      }
      const double out = apply_one<kGuarded>(x.inner_a[start + o], x.inner_b[start + o], value);
      x.out[start + o] = out;
      finite &= out - out == 0.0;
    }
  }
  return finite;
}

inline void windows(const Actions& x, int64_t n) {
  if (!solve_windows<false>(x, n)) solve_windows<true>(x, n);
}

struct NStep {
  static constexpr unsigned kReads = kReward | kValue | kNextValue;
  static constexpr bool kForwardInTime = false;
};
struct NStepBackward {
  static constexpr unsigned kReads = kGrads;
  static constexpr bool kForwardInTime = true;
};

// body(step, exists, lanes) in the scan's order, for kDoubles steps of a row or for one step of up
// to kDoubles rows.
template <class E, class Body>
inline void for_each_step(const Trajectories& row, const Piece& p, Body body) {
  if (row.time_major) {
    const Present in{0, p.count};
    for (int64_t k = 0; k < p.length; ++k) {
      const Place<true> at{E::kForwardInTime ? k : p.length - 1 - k, 0};
      body(load_step<E, false>(row, at, in), load_actions<false>(row, at, in), in);
    }
    return;
  }
  for_each_vector<E>(0, p.length, [&](int64_t t, const Present& in) {
    const Place<false> at{t, 0};
    if (in.count == kDoubles) {
      body(load_step<E, true>(row, at, in), load_actions<true>(row, at, in), in);
    } else {
      body(load_step<E, false>(row, at, in), load_actions<false>(row, at, in), in);
    }
  });
}

// The memory of one of the rows together: kWindowScratch arrays of its length.
inline Actions actions_of(const Piece& p, int lane, double* scratch) {
  double* s = scratch + lane * kWindowScratch * p.length;
  const int64_t n = p.length;
  return {s, s + n, s + 2 * n, s + 3 * n, s + 4 * n, s + 5 * n, 0};
}

// Writes the actions' numbers to their steps, 0 to the others.
inline void store_actions(const Trajectories& row, const Results& r, int64_t length, int lane,
                          const double* numbers) {
  int64_t t = 0;
  if (!row.mask.data && !row.time_major) {
    for (; t + kDoubles <= length; t += kDoubles) {
      store<true>(r, t, load_doubles(numbers + t), Present{0, kDoubles});
    }
  }
  for (int64_t i = t; t < length; ++t) {
    const bool exists = is_action(row, t, lane);
    store_at(r, place(row, r.stride, t, lane), exists ? numbers[i] : 0.0);
    i += exists;
  }
}

// body(piece, scratch) for as many rows together as there are lanes.
template <class Body>
inline void in_lanes(const Piece& p, double* scratch, int scratch_per_step, Body body) {
  for (int lane = 0; lane < p.count; lane += kDoubles) {
    Piece part = p;
    part.row += lane;
    part.number += lane;
    part.count = std::min(kDoubles, p.count - lane);
    body(part, scratch + lane * scratch_per_step * p.length);
  }
}

inline void n_step_returns_part(const Trajectories& x, const Piece& p, int64_t n, double* scratch) {
  const Trajectories row = from_row(x, p.row, p.origin);
  Actions actions[kWindowRows];
  VecD later{};
  for (int l = 0; l < p.count; ++l) {
    actions[l] = actions_of(p, l, scratch);
    const double end = value_behind<NStep>(row, p, l);
    later = row.time_major ? later : splat_double(end);
    later[l] = end;
  }
  // From the last step to the first: the arrays fill from their ends.
  for_each_step<NStep>(row, p, [&](Step<Lanes> s, VecL exists, const Present& in) {
    if (!row.next_values.data) {
      const VecD v = row.time_major ? s.value : fill<NStep>(s.value, exists, later);
      s.next_value = row.time_major ? later : neighbour<1>(v, later);
      later = row.time_major ? (exists ? v : later) : v;
    }
    const VecD beyond = through<Lanes>(s.discount(), s.next_value);
    const VecD b = s.reward + (s.truncated ? beyond : VecD{}), e = s.reward + beyond;
    const VecD a = s.unbroken();
    if (in.count == kDoubles && !row.mask.data && !row.time_major) {
      const int64_t at = p.length - (actions[0].count += kDoubles);
      store_doubles(actions[0].a + at, a);
      store_doubles(actions[0].b + at, b);
      store_doubles(actions[0].e + at, e);
      return;
    }
    for (int i = in.first + in.count - 1; i >= in.first; --i) {
      if (!exists[i]) continue;
      Actions& to = actions[row.time_major ? i : 0];
      const int64_t at = p.length - 1 - to.count++;
      to.a[at] = a[i];
      to.b[at] = b[i];
      to.e[at] = e[i];
    }
  });
  for (int l = 0; l < p.count; ++l) {
    Actions found = actions[l];
    const int64_t skipped = p.length - found.count;
    found.a += skipped;
    found.b += skipped;
    found.e += skipped;
    windows(found, n);
    store_actions(row, row.results[0], p.length, l, found.out);
  }
}

// grad_rewards_j: s_j = sum over t of g_t a_t ... a_{j-1}, j - n < t <= j; grad_next_j: what is
// owed to v_{j+1}, by the window that ends at j and by all of them where the row is cut or ends.
//
// Backwards in time, z_t = a_t (g_t + z_{t-1}) is a window of n - 1 steps like the above, ending on
// a_t g_t, and s_j = g_j + z_{j-1}. The share of the window that ends at j is the same with b = 0.
inline void n_step_grads(const Actions& found, const double* g, const double* discounts,
                         const double* cut, int64_t n, double* s, double* next) {
  const int64_t count = found.count;
  for (int64_t i = 0; i < count; ++i) found.b[i] = found.e[i];
  if (n > 1) windows(found, n - 1);
  // Arrays run backwards in time: action j is number i = count - 1 - j, and j - 1 is i + 1.
  for (int64_t i = 0; i < count; ++i)
    s[i] = g[i] + (n > 1 && i + 1 < count ? found.out[i + 1] : 0.0);
  for (int64_t i = 0; i < count; ++i) found.b[i] = 0.0;
  if (n > 1) windows(found, n - 1);
  for (int64_t i = 0; i < count; ++i) {
    const bool begins_inside = i + n - 1 < count;
    const double ending = n == 1 ? g[i] : begins_inside ? found.out[i + 1] : 0.0;
    const bool all = i == 0 || cut[i] != 0.0;
    next[i] = discounts[i] == 0.0 ? 0.0 : discounts[i] * (all ? s[i] : ending);
  }
}

// With windows as long as the row, n-step returns are discounted returns. Each row decides by its
// own length: its bits would depend on the batch otherwise.
void n_step_returns(const Trajectories& x, const Piece& p, int64_t n, double* scratch) {
  if (n >= p.length) {
    double end[kWindowRows];
    Affine found[kWindowRows];
    for (int l = 0; l < p.count; ++l) end[l] = before<DiscountedReturns>(x, p, l);
    write<DiscountedReturns>(x, p, end, found);
    return;
  }
  in_lanes(p, scratch, kWindowScratch,
           [&](const Piece& part, double* own) { n_step_returns_part(x, part, n, own); });
}

inline void n_step_returns_bwd_part(const Trajectories& x, const Piece& p, int64_t n,
                                    double* scratch) {
  const Trajectories row = from_row(x, p.row, p.origin);
  double *g[kWindowRows], *discount[kWindowRows], *cut[kWindowRows];
  Actions actions[kWindowRows];
  for (int l = 0; l < p.count; ++l) {
    actions[l] = actions_of(p, l, scratch);
    double* more = scratch + (p.count * kWindowScratch + l * kWindowScratch) * p.length;
    g[l] = more;
    discount[l] = more + p.length;
    cut[l] = more + 2 * p.length;
  }
  for_each_step<NStepBackward>(row, p, [&](const Step<Lanes>& s, VecL exists, const Present& in) {
    const VecD c = s.discount(), a = s.unbroken();
    for (int i = in.first; i < in.first + in.count; ++i) {
      if (!exists[i]) continue;
      const int l = row.time_major ? i : 0;
      const int64_t at = p.length - 1 - actions[l].count++;  // backwards in time
      actions[l].a[at] = a[i];
      actions[l].e[at] = apply_one(a[i], 0.0, s.grad_first[i]);
      g[l][at] = s.grad_first[i];
      discount[l][at] = c[i];
      cut[l][at] = s.truncated[i] ? 1.0 : 0.0;
    }
  });
  for (int l = 0; l < p.count; ++l) {
    Actions found = actions[l];
    const int64_t skipped = p.length - found.count;
    found.a += skipped;
    found.b += skipped;
    found.e += skipped;
    double *s = cut[l] + p.length, *next = s + p.length;
    n_step_grads(found, g[l] + skipped, discount[l] + skipped, cut[l] + skipped, n, s, next);
    std::reverse(s, s + found.count);
    std::reverse(next, next + found.count);
    store_actions(row, row.results[0], p.length, l, s);
    store_actions(row, row.results[1], p.length, l, next);
  }
}

void n_step_returns_bwd(const Trajectories& x, const Piece& p, int64_t n, double* scratch) {
  const int64_t steps = std::max<int64_t>(1, std::min(n, p.length));
  in_lanes(p, scratch, 2 * kWindowScratch,
           [&](const Piece& part, double* own) { n_step_returns_bwd_part(x, part, steps, own); });
}

constexpr ReturnsKernels kReturns = {
    kScan<Gae>,
    kScan<LambdaReturns>,
    kScan<DiscountedReturns>,
    kScan<Vtrace>,
    kScan<RetraceReturns>,
    kScan<TdBackward>,
    kScan<VtraceBackward>,
    kScan<RetraceBackward>,
    kValueGrads,
    &n_step_returns,
    &n_step_returns_bwd,
};

}  // namespace fastrl::FASTRL_SIMD

// What flows to the values, from what flows to the rewards: u_t = c_t grad_rewards_t is owed to
// v_{t+1}, which is the value of the next action, next_values at t, or bootstrap_value. Included by
// kernels_*.cpp after returns_pieces.h.

namespace fastrl::FASTRL_SIMD {

// As the scan's loads see it. grad_first: grad_rewards; grad_second: grad_returns; carried:
// grad_next, where u_t is not c_t grad_rewards_t.
struct ValueGrads {
  static constexpr unsigned kReads = kGrads | kErrors;
  static constexpr bool kForwardInTime = true;
};

FASTRL_INLINE VecD owed(const Trajectories& row, const Step<Lanes>& s) {
  return row.carried.data ? s.carried : through<Lanes>(s.discount(), s.grad_first);
}

template <bool kAll, class At>
FASTRL_INLINE void store_value_grads(const Trajectories& row, const At& at, const Present& in,
                                     const Step<Lanes>& s, VecL exists, VecD u, VecD u_before) {
  const Results &to_values = row.results[0], &to_next = row.results[1];
  if (to_values.data) {
    VecD grad = row.has_next_values ? VecD{} : u_before;
    if (row.own) grad += s.grad_second - s.grad_first;
    store<kAll>(to_values, at.in(to_values), exists ? grad : VecD{}, in);
  }
  if (to_next.data) {
    const VecD grad = row.only_at_cuts ? (s.truncated ? u : VecD{}) : u;
    store<kAll>(to_next, at.in(to_next), exists ? grad : VecD{}, in);
  }
}

template <bool kAll>
FASTRL_INLINE void value_grads_lanes(const Trajectories& row, int64_t t, const Present& in,
                                     VecD& before) {
  const Place<false> at{t, 0};
  const Step<Lanes> s = load_step<ValueGrads, kAll>(row, at, in);
  const VecL exists = load_actions<kAll>(row, at, in);
  VecD u = owed(row, s);
  if (!kAll || row.mask.data) u = fill<ValueGrads>(u, exists, before);
  store_value_grads<kAll>(row, at, in, s, exists, u, neighbour<-1>(u, before));
  before = u;
}

template <bool kAll>
FASTRL_INLINE void value_grads_vectors(const Trajectories& rows, int64_t t, int64_t lane,
                                       const Present& in, VecD& before) {
  const Place<true> at{t, lane};
  const Step<Lanes> s = load_step<ValueGrads, kAll>(rows, at, in);
  const VecL exists = load_actions<kAll>(rows, at, in);
  const VecD u = owed(rows, s);
  store_value_grads<kAll>(rows, at, in, s, exists, u, before);
  before = exists ? u : before;
}

// u of the last action before step t; 0 where there is none.
inline double owed_before(const Trajectories& row, int64_t t, int64_t lane) {
  const int64_t last = last_action(row, t, lane);
  if (last < 0) return 0.0;
  const Present one{0, 1};
  return row.time_major
             ? owed(row, load_step<ValueGrads, false>(row, Place<true>{last, lane}, one))[0]
             : owed(row, load_step<ValueGrads, false>(row, Place<false>{last, 0}, one))[0];
}

inline void store_at(const Results& r, int64_t at, double x) {
  store<false>(r, at, splat_double(x), Present{0, 1});
}

// What the end of the row is owed: bootstrap_value, by the row's last piece, or next_values at the
// last action, by the piece that holds it: no other may write there, another thread may have it.
inline void store_end(const Trajectories& row, const Piece& p, int lane) {
  if (row.to_bootstrap_value.data && p.end == p.length) {
    store_at(row.to_bootstrap_value, p.number + lane, owed_before(row, p.length, lane));
  }
  const Results& to_next = row.results[1];
  if (!row.only_at_cuts || !to_next.data) return;
  const int64_t last = last_action(row, p.end, lane, p.begin);
  if (last < p.begin || next_action(row, p.end, p.length, lane) < p.length) return;
  store_at(to_next, place(row, to_next.stride, last, lane), owed_before(row, p.end, lane));
}

void write_value_grads(const Trajectories& x, const Piece& p, const double*, Affine*) {
  const Trajectories row = from_row(x, p.row, p.origin);
  for (int lane = 0; lane < p.count; lane += kDoubles) {
    const int lanes = std::min(kDoubles, p.count - lane);
    VecD before = splat_double(owed_before(row, p.begin, lane));
    for (int l = 1; l < lanes; ++l) before[l] = owed_before(row, p.begin, lane + l);
    if (!row.time_major) {
      for_each_vector<ValueGrads>(p.begin, p.end, [&](int64_t t, const Present& in) {
        if (in.count == kDoubles) {
          value_grads_lanes<true>(row, t, in, before);
        } else {
          value_grads_lanes<false>(row, t, in, before);
        }
      });
      continue;
    }
    for (int64_t t = p.begin; t < p.end; ++t) {
      if (lanes == kDoubles) {
        value_grads_vectors<true>(row, t, lane, {0, lanes}, before);
      } else {
        value_grads_vectors<false>(row, t, lane, {0, lanes}, before);
      }
    }
  }
  for (int lane = 0; lane < p.count; ++lane) store_end(row, p, lane);
}

// Each step for itself: nothing is composed, and nothing comes before a row.
void compose_nothing(const Trajectories&, const Piece&, Affine*) {}
double nothing_before(const Trajectories&, const Piece&, int) { return 0.0; }

constexpr Scan kValueGrads = {&compose_nothing, &write_value_grads, &after, &nothing_before, true};

}  // namespace fastrl::FASTRL_SIMD

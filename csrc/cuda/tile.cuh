// A warp's part of the scan: a tile of 256 steps, eight to a thread.
#pragma once

#include "affine.cuh"

namespace fastrl::cuda {

constexpr int kTile = kSteps * kLanes;

// Of all that the estimators read and write. Arrays that are not given have no data.
template <class T>
struct Trajectories {
  using R = Result<T>;

  Rows rows;
  Array<const T> reward, value, next_value, q_value, log_ratio, gamma, lambda;
  Array<const T> bootstrap;  // one entry a row
  Array<const R> grad_first, grad_second, td_error, carried;
  Flags terminated, truncated, mask;
  Array<R> out[4];
  Wide<R> constant_gamma, constant_lambda;
  Clips clips;
  // All arrays hold the steps one row behind the other, and begin at a multiple of 16 bytes.
  bool side_by_side;
};

// Where a thread's steps stand. Steps are counted in the order of the scan: from the row's end for
// estimators, whose x_t depends on x_{t+1}.
struct Place {
  int64_t row, index, length;  // index: of the row, in arrays
  int64_t first;               // of the thread's steps
  int before;                  // lanes below this one with earlier steps of the row
};

// The inputs stay as they lie in memory until they are written from, and (a, b) are formed twice:
// in registers a step of gae takes 3 words, (a, b) and the value 5.
template <class E, class T>
class Tile {
 public:
  using R = Result<T>;
  using N = Numbers<R>;
  using Formed = typename E::template Formed<N>;
  // Of values the estimators of action values need what follows alone.
  static constexpr bool kReadsValue = (E::kReads & kValue) && !(E::kReads & kQValue);

  FASTRL_DEVICE static bool looks_ahead(const Trajectories<T>& x) {
    return E::kEndsOnValue || ((E::kReads & kNextValue) && !x.next_value);
  }

  // Reads the steps: all loads are under way before the first is waited for.
  FASTRL_DEVICE Tile(const Trajectories<T>& x, const Place& place)
      : row_(place.index), before_lanes_(place.before) {
    const int n = static_cast<int>(larger(0, smaller(kSteps, place.length - place.first)));
    low_ = E::kForwardInTime ? place.first : place.length - kSteps - place.first;
    exists_ = E::kForwardInTime ? (1u << n) - 1 : 0xffu << (kSteps - n) & 0xff;
    const bool aligned = x.side_by_side && n == kSteps && flat(x) % kSteps == 0;
    side_by_side_ = __all_sync(kAllLanes, aligned);
    bootstrap_ = x.bootstrap && n > 0 ? *x.bootstrap.at(place.row, 0) : T{};
    mask_ = read(x, x.mask);
    if constexpr (E::kReads & kReward) reward_ = read(x, x.reward);
    if constexpr (kReadsValue) value_ = read(x, x.value);
    if constexpr (E::kReads & kNextValue) {
      next_value_ = read(x, kReadsValue || x.next_value ? x.next_value : x.value);
    }
    if constexpr (E::kReads & kValueAtCut) next_value_ = {};
    if constexpr (E::kReads & kQValue) q_value_ = read(x, x.q_value);
    if constexpr (E::kReads & kLogRatio) log_ratio_ = read(x, x.log_ratio);
    if constexpr (E::kReads & kGrads) {
      grad_first_ = read(x, x.grad_first);
      grad_second_ = read(x, x.grad_second);
    }
    if constexpr (E::kReads & kErrors) {
      td_error_ = read(x, x.td_error);
      carried_ = read(x, x.carried);
    }
    terminated_ = read(x, x.terminated);
    truncated_ = read(x, x.truncated);
  }

  // Gives what the steps of the row up to the thread's last one make of x in front of the tile.
  // ahead: the action of the warp's row that follows on the tile in time, or -1.
  FASTRL_DEVICE Affine compose_steps(const Trajectories<T>& x, int64_t ahead) {
    acts_ = x.mask ? exists_ & bits_of(mask_) : exists_;
    terminates_ = bits_of(terminated_);
    truncates_ = bits_of(truncated_);
    ends_ = 0;
    is_plain_ = __all_sync(kAllLanes, acts_ == 0xff) && !x.gamma && !x.lambda;
    if (looks_ahead(x)) look_ahead(x, ahead);
    Affine all{1.0, 0.0};
    bool cuts = false;
    each_step(x, [&](int, const Formed&, const Affine& f) {
      cuts |= f.a == 0.0;
      all = {f.a * all.a, f(all.b)};
    });
    all.a = cuts ? 0.0 : all.a == 0.0 ? kSmallest : all.a;
    all = compose_lanes(all, before_lanes_);
    before_ = shuffle_up(all, 1);
    if (before_lanes_ == 0) before_ = Affine::identity();
    return all;
  }

  // x_before: in front of the tile.
  FASTRL_DEVICE void write(const Trajectories<T>& x, double x_before) {
    forget_results();
    Entries<R> out[E::kOutputs];
    double at = before_(x_before);
    each_step(x, [&](int i, const Formed& formed, const Affine& f) {
      const double previous = at;
      at = f(previous);
      R results[E::kOutputs];
      E::template write<N>(formed, at, previous, results);
#pragma unroll
      for (int k = 0; k < E::kOutputs; ++k) out[k].set(i, results[k]);
    });
#pragma unroll
    for (int k = 0; k < E::kOutputs; ++k) {
      if (!x.out[k]) continue;
      if (!is_plain_) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          if (!(acts_ & 1u << i)) out[k].set(i, R{});
        }
      }
      if (side_by_side_) {
        store_sectors(x.out[k].data, flat(x), out[k]);
      } else {
        store(x.out[k], span(), out[k]);
      }
    }
  }

 private:
  FASTRL_DEVICE static constexpr int entry(int j) { return E::kForwardInTime ? j : kSteps - 1 - j; }
  FASTRL_DEVICE Span span() const {
    return {row_, low_, __ffs(exists_) - 1, kLanes - __clz(exists_)};
  }
  // Of the first step in time, among those of all rows.
  FASTRL_DEVICE int64_t flat(const Trajectories<T>& x) const {
    return (x.rows.cu_seqlens ? row_ : row_ * x.rows.length) + low_;
  }
  template <class A>
  FASTRL_DEVICE Entries<A> read(const Trajectories<T>& x, const Array<const A>& array) const {
    if (!array) return {};
    if (side_by_side_) return *reinterpret_cast<const Entries<A>*>(array.data + flat(x));
    return load(array, span());
  }

  // f(i, formed, (a, b)) in the order of the scan.
  template <class F>
  FASTRL_DEVICE void each_step(const Trajectories<T>& x, F f) const {
    if (is_plain_) {
      each_step<true>(x, {}, {}, f);
    } else {
      // Discounts are rarely given, and then read twice, the second time from a cache: they have no
      // registers.
      each_step<false>(x, read(x, x.gamma), read(x, x.lambda), f);
    }
  }

  // kPlain: all steps are actions, with the same discounts.
  template <bool kPlain, class F>
  FASTRL_DEVICE void each_step(const Trajectories<T>& x, const Entries<T>& gamma,
                               const Entries<T>& lambda, F f) const {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int i = entry(j);
      Step<N> step{};
      if constexpr (E::kReads & kReward) step.reward = number_of(reward_[i]);
      if constexpr (kReadsValue) step.value = number_of(value_[i]);
      if constexpr (E::kReads & (kNextValue | kValueAtCut)) {
        step.next_value = number_of(next_value_[i]);
      }
      if constexpr (E::kReads & kQValue) step.q_value = number_of(q_value_[i]);
      if constexpr (E::kReads & kLogRatio) step.ratio = N::exp(number_of(log_ratio_[i]));
      if constexpr (E::kReads & kGrads) {
        step.grad_first = grad_first_[i];
        step.grad_second = grad_second_[i];
      }
      if constexpr (E::kReads & kErrors) {
        step.td_error = td_error_[i];
        step.carried = carried_[i];
      }
      step.gamma = x.constant_gamma;
      step.lambda = x.constant_lambda;
      if (!kPlain && x.gamma) step.gamma = N::wide(number_of(gamma[i]));
      if (!kPlain && x.lambda) step.lambda = N::wide(number_of(lambda[i]));
      step.terminated = terminates_ & 1u << i;
      step.truncated = truncates_ & 1u << i;
      const Formed formed = E::template form<N>(step, x.clips);
      Affine affine{formed.a, formed.b};
      if (E::kEndsOnValue && ends_ & 1u << i) affine = {0.0, affine(step.next_value)};
      if (!kPlain && !(acts_ & 1u << i)) affine = Affine::identity();
      f(i, formed, affine);
    }
  }

  // next_value_ from what follows each action in time: the value of the next action, or behind the
  // row's last one bootstrap_value.
  FASTRL_DEVICE void look_ahead(const Trajectories<T>& x, int64_t behind_tile) {
    const Entries<T> values = kReadsValue ? value_ : next_value_;
    T value{};  // of the thread's first action in time
#pragma unroll
    for (int i = kSteps - 1; i >= 0; --i) {
      if (acts_ & 1u << i) value = values[i];
    }
    const int lane = lane_of_thread();
    unsigned lanes = __ballot_sync(kAllLanes, acts_ != 0);
    lanes &= lanes_below(lane) & ~lanes_below(lane - before_lanes_);
    value = __shfl_sync(kAllLanes, value, lanes ? kLanes - 1 - __clz(lanes) : lane);
    bool exists = lanes != 0;
    if (!exists) {
      value = bootstrap_;
      exists = behind_tile >= 0;
      if constexpr (E::kReads & kValue) {
        if (exists) value = *x.value.at(row_, behind_tile);
      }
    }
#pragma unroll
    for (int i = kSteps - 1; i >= 0; --i) {
      if (!(acts_ & 1u << i)) continue;
      if constexpr (E::kEndsOnValue) {
        ends_ |= !exists << i;
        if (x.next_value && (truncates_ & 1u << i || !exists)) {
          value = *x.next_value.at(row_, low_ + i);
        }
      }
      next_value_.set(i, value);
      if constexpr (E::kReads & kValue) value = values[i];
      exists = true;
    }
  }

  FASTRL_DEVICE void forget_results() {
    if constexpr (E::kReads & kReward) reward_.forget_results();
    if constexpr (kReadsValue) value_.forget_results();
    if constexpr (E::kReads & (kNextValue | kValueAtCut)) next_value_.forget_results();
    if constexpr (E::kReads & kQValue) q_value_.forget_results();
    if constexpr (E::kReads & kLogRatio) log_ratio_.forget_results();
    if constexpr (E::kReads & kGrads) {
      grad_first_.forget_results();
      grad_second_.forget_results();
    }
    if constexpr (E::kReads & kErrors) {
      td_error_.forget_results();
      carried_.forget_results();
    }
    asm volatile("" : "+r"(acts_));
    asm volatile("" : "+r"(terminates_));
    asm volatile("" : "+r"(truncates_));
  }

  Entries<T> reward_, value_, next_value_, q_value_, log_ratio_;
  Entries<R> grad_first_, grad_second_, td_error_, carried_;
  Entries<uint8_t> terminated_, truncated_, mask_;  // until they are bits
  T bootstrap_;
  int64_t row_, low_;  // index of the row, and the first step in time
  int before_lanes_;
  unsigned exists_, acts_, terminates_, truncates_, ends_;  // bits in the order of time
  bool side_by_side_, is_plain_;                            // the same in all lanes
  Affine before_;
};

}  // namespace fastrl::cuda

// A warp's part of the scan: a tile of 128 steps, four to a thread.
#pragma once

#include "affine.cuh"

namespace fastrl::cuda {

constexpr int kSteps = 4;  // of a thread: 16 bytes of float, and whole sectors from lane to lane
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
  double constant_gamma, constant_lambda;
  Clips clips;
};

// Where a thread's four steps stand. Steps are counted in the order of the scan: from the row's end
// for estimators, whose x_t depends on x_{t+1}.
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
  FASTRL_DEVICE Tile(const Trajectories<T>& x, const Place& place) {
    const int n = static_cast<int>(larger(0, smaller(kSteps, place.length - place.first)));
    row_ = place.index;
    low_ = E::kForwardInTime ? place.first : place.length - kSteps - place.first;
    bits_ = E::kForwardInTime ? (1u << n) - 1 : 0xfu << (kSteps - n) & 0xfu;
    bits_ |= place.before << kBefore;
    bootstrap_ = x.bootstrap && n > 0 ? *x.bootstrap.at(place.row, 0) : T{};
    mask_ = read(x.mask);
    if constexpr (E::kReads & kReward) reward_ = read(x.reward);
    if constexpr (kReadsValue) value_ = read(x.value);
    if constexpr (E::kReads & kNextValue) {
      next_value_ = read(kReadsValue || x.next_value ? x.next_value : x.value);
    }
    if constexpr (E::kReads & kValueAtCut) next_value_ = {};
    if constexpr (E::kReads & kQValue) q_value_ = read(x.q_value);
    if constexpr (E::kReads & kLogRatio) log_ratio_ = read(x.log_ratio);
    if constexpr (E::kReads & kGrads) {
      grad_first_ = read(x.grad_first);
      grad_second_ = read(x.grad_second);
    }
    if constexpr (E::kReads & kErrors) {
      td_error_ = read(x.td_error);
      carried_ = read(x.carried);
    }
    terminated_ = read(x.terminated);
    truncated_ = read(x.truncated);
  }

  // Gives what the steps of the row up to the thread's last one make of x in front of the tile.
  // ahead: the action of the warp's row that follows on the tile in time, or -1.
  FASTRL_DEVICE Affine compose_steps(const Trajectories<T>& x, int64_t ahead) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      bits_ |= (bits_ >> i & (!x.mask || mask_[i])) << (kActs + i);
      bits_ |= (terminated_[i] != 0) << (kTerminated + i);
      bits_ |= (truncated_[i] != 0) << (kTruncated + i);
    }
    if (looks_ahead(x)) look_ahead(x, ahead);
    Affine all = Affine::identity();
    each_step(x, [&](int, const Formed&, const Affine& f) { all = compose(f, all); });
    const int before = bits_ >> kBefore;
    all = compose_lanes(all, before);
    before_ = shuffle_up(all, 1);
    if (before == 0) before_ = Affine::identity();
    return all;
  }

  // x_before: in front of the tile.
  FASTRL_DEVICE void write(const Trajectories<T>& x, double x_before) {
    forget_results();
    Four<R> out[E::kOutputs];
    double at = before_(x_before);
    each_step(x, [&](int i, const Formed& formed, const Affine& f) {
      const double previous = at;
      at = f(previous);
      R results[E::kOutputs];
      E::template write<N>(formed, at, previous, results);
#pragma unroll
      for (int k = 0; k < E::kOutputs; ++k) {
        out[k].set(i, has(kActs, i) ? results[k] : R{});
      }
    });
#pragma unroll
    for (int k = 0; k < E::kOutputs; ++k) {
      if (x.out[k]) store(x.out[k], span(), out[k]);
    }
  }

 private:
  FASTRL_DEVICE static constexpr int entry(int j) { return E::kForwardInTime ? j : kSteps - 1 - j; }
  FASTRL_DEVICE bool has(int what, int i) const { return bits_ >> (what + i) & 1; }
  FASTRL_DEVICE Span span() const {
    const int exists = bits_ & 0xf;
    return {row_, low_, __ffs(exists) - 1, kLanes - __clz(exists)};
  }
  template <class A>
  FASTRL_DEVICE Four<A> read(const Array<const A>& x) const {
    return x ? cuda::load(x, span()) : Four<A>{};
  }

  // f(i, formed, (a, b)) in the order of the scan.
  template <class F>
  FASTRL_DEVICE void each_step(const Trajectories<T>& x, F f) const {
    // Rarely given, and then read twice, the second time from a cache: they have no registers.
    const Four<T> gamma = read(x.gamma), lambda = read(x.lambda);
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
      step.gamma = x.gamma ? number_of(gamma[i]) : x.constant_gamma;
      step.lambda = x.lambda ? number_of(lambda[i]) : x.constant_lambda;
      step.terminated = has(kTerminated, i);
      step.truncated = has(kTruncated, i);
      const Formed formed = E::template form<N>(step, x.clips);
      Affine affine{formed.a, formed.b};
      if (E::kEndsOnValue && has(kEnds, i)) affine = {0.0, affine(step.next_value)};
      if (!has(kActs, i)) affine = Affine::identity();
      f(i, formed, affine);
    }
  }

  // next_value_ from what follows each action in time: the value of the next action, or behind the
  // row's last one bootstrap_value.
  FASTRL_DEVICE void look_ahead(const Trajectories<T>& x, int64_t behind_tile) {
    const Four<T> values = kReadsValue ? value_ : next_value_;
    T value{};  // of the thread's first action in time
#pragma unroll
    for (int i = kSteps - 1; i >= 0; --i) {
      if (has(kActs, i)) value = values[i];
    }
    const int lane = lane_of_thread();
    unsigned lanes = __ballot_sync(kAllLanes, bits_ >> kActs & 0xf);
    lanes &= lanes_below(lane) & ~lanes_below(lane - (bits_ >> kBefore));
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
      if (!has(kActs, i)) continue;
      if constexpr (E::kEndsOnValue) {
        bits_ |= !exists << (kEnds + i);
        if (x.next_value && (has(kTruncated, i) || !exists)) {
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
    asm volatile("" : "+r"(bits_));
  }

  Four<T> reward_, value_, next_value_, q_value_, log_ratio_;
  Four<R> grad_first_, grad_second_, td_error_, carried_;
  Four<uint8_t> terminated_, truncated_, mask_;  // until they are in bits_
  T bootstrap_;
  int64_t row_, low_;  // index of the row, and the first step in time
  // Four bits each, in the order of time: which steps exist, are actions, ...; and above them how
  // many lanes below this one have earlier steps of the row.
  enum { kExists = 0, kActs = 4, kTerminated = 8, kTruncated = 12, kEnds = 16, kBefore = 20 };
  unsigned bits_;
  Affine before_;
};

}  // namespace fastrl::cuda

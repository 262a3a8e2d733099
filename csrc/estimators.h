// The estimators of returns. Each is the few lines that form (a_t, b_t) of the recursion
//
//   x_t = b_t + a_t x_{t+1}
//
// and what is written once x is known; the backward passes run through time the other way. The scan
// around them, one for each device, does the rest.
//
// N says what a number is. On a CPU N::V and N::D are vectors of doubles: neighbouring steps of a
// row, or one step of neighbouring rows. On a GPU N::V is the dtype that the results have, and N::D
// is double: (gamma lambda)^T over a long row would magnify the rounding of gamma itself to float.
//
// No include guard and no includes: each device, and on a CPU each instruction set, has its own
// FASTRL_DEVICE_NAMESPACE. FASTRL_DEVICE stands before each function.

namespace FASTRL_DEVICE_NAMESPACE {

// An estimator has kOutputs results, of which the first kAlways are always wanted. What it reads of
// each step: kNextValue is v_{t+1}: given, or the value of the next
// action; kValueAtCut is wanted where the row is truncated alone. What backward passes read may be
// missing, and is 0 then.
enum Reads : unsigned {
  kReward = 1,
  kValue = 2,
  kNextValue = 4,
  kValueAtCut = 8,
  kQValue = 16,
  kLogRatio = 32,  // as `ratio`, its exp
  kGrads = 64,     // of the first two outputs
  kErrors = 128,   // what the forward pass saved: td_error, carried
};

template <class N>
struct Step {
  using V = typename N::V;
  using D = typename N::D;
  using M = typename N::M;

  V reward, value, next_value, q_value, ratio;
  V grad_first, grad_second, td_error, carried;
  D gamma, lambda;
  M terminated, truncated;

  // c_t = gamma_t (1 - terminated_t), c_t k_t with k_t = 1 - truncated_t, and c_t k_t lambda_t.
  FASTRL_DEVICE D discount() const { return terminated ? D{} : gamma; }
  FASTRL_DEVICE D unbroken() const { return truncated ? D{} : discount(); }
  // The product as one for all steps, where gamma and lambda are.
  FASTRL_DEVICE D trace() const { return truncated ? D{} : terminated ? D{} : gamma * lambda; }
  // What is handed on over the step: nothing over an end, be it nan.
  FASTRL_DEVICE V handed_on(V x) const { return truncated ? V{} : terminated ? V{} : x; }
};

// factor * x; but behind an end nothing is looked at: 0 * inf would be nan.
template <class N>
FASTRL_DEVICE typename N::V through(typename N::D factor, typename N::V x) {
  return factor == typename N::D{} ? typename N::V{} : N::narrow(factor) * x;
}

struct Clips {
  double rho, c;
};

// min(clip, ratio), and what of it has a gradient; NaN stays.
template <class N>
FASTRL_DEVICE typename N::V clipped(typename N::V ratio, double clip) {
  const typename N::V bound = N::number(clip);
  return ratio >= bound ? bound : ratio;
}
template <class N>
FASTRL_DEVICE typename N::V unclipped(typename N::V ratio, double clip) {
  return ratio >= N::number(clip) ? typename N::V{} : ratio;
}

struct Gae {
  static constexpr unsigned kReads = kReward | kValue | kNextValue;
  static constexpr bool kForwardInTime = false, kEndsOnValue = false;
  static constexpr int kOutputs = 2, kAlways = 2;  // advantages, returns

  template <class N>
  struct Formed {
    typename N::D a, b;
    typename N::V value;
  };
  template <class N>
  FASTRL_DEVICE static Formed<N> form(const Step<N>& s, const Clips&) {
    const auto delta = s.reward + through<N>(s.discount(), s.next_value) - s.value;
    return {s.trace(), N::wide(delta), s.value};
  }
  template <class N>
  FASTRL_DEVICE static void write(const Formed<N>& f, typename N::D x, typename N::D,
                                  typename N::V* out) {
    out[0] = N::narrow(x);
    out[1] = N::narrow(x) + f.value;
  }
};

struct LambdaReturns : Gae {
  static constexpr int kOutputs = 1, kAlways = 1;

  template <class N>
  FASTRL_DEVICE static void write(const Formed<N>& f, typename N::D x, typename N::D,
                                  typename N::V* out) {
    out[0] = N::narrow(x) + f.value;
  }
};

struct DiscountedReturns {
  static constexpr unsigned kReads = kReward | kValueAtCut;
  static constexpr bool kForwardInTime = false, kEndsOnValue = true;
  static constexpr int kOutputs = 1, kAlways = 1;

  template <class N>
  struct Formed {
    typename N::D a, b;
  };
  template <class N>
  FASTRL_DEVICE static Formed<N> form(const Step<N>& s, const Clips&) {
    const auto cut = through<N>(s.discount(), s.next_value);
    return {s.unbroken(), N::wide(s.reward + (s.truncated ? cut : typename N::V{}))};
  }
  template <class N>
  FASTRL_DEVICE static void write(const Formed<N>&, typename N::D x, typename N::D,
                                  typename N::V* out) {
    out[0] = N::narrow(x);
  }
};

// x = vs - v.
struct Vtrace {
  static constexpr unsigned kReads = kReward | kValue | kNextValue | kLogRatio;
  static constexpr bool kForwardInTime = false, kEndsOnValue = false;
  static constexpr int kOutputs = 4,
                       kAlways = 2;  // advantages, value targets; for log_ratio: td_error, carried

  template <class N>
  struct Formed {
    typename N::D a, b, trace;
    typename N::V rho, delta, value;
  };
  template <class N>
  FASTRL_DEVICE static Formed<N> form(const Step<N>& s, const Clips& clips) {
    const auto rho = clipped<N>(s.ratio, clips.rho);
    const auto delta = s.reward + through<N>(s.discount(), s.next_value) - s.value;
    const auto a = s.trace() * N::wide(clipped<N>(s.ratio, clips.c));
    return {a, N::wide(rho * delta), s.trace(), rho, delta, s.value};
  }
  template <class N>
  FASTRL_DEVICE static void write(const Formed<N>& f, typename N::D x, typename N::D x_next,
                                  typename N::V* out) {
    const auto carried = through<N>(f.trace, N::narrow(x_next));
    out[0] = f.rho * (f.delta + carried);
    out[1] = f.value + N::narrow(x);
    out[2] = f.delta;
    out[3] = carried;
  }
};

// x = w (G - q).
struct RetraceReturns {
  static constexpr unsigned kReads = kReward | kValue | kNextValue | kQValue | kLogRatio;
  static constexpr bool kForwardInTime = false, kEndsOnValue = false;
  static constexpr int kOutputs = 2, kAlways = 1;  // returns; for log_ratio: td_error = G - q

  template <class N>
  struct Formed {
    typename N::D a, b, unbroken;
    typename N::V one_step, error;
  };
  template <class N>
  FASTRL_DEVICE static Formed<N> form(const Step<N>& s, const Clips& clips) {
    const auto weight = N::narrow(s.lambda) * clipped<N>(s.ratio, clips.c);
    const auto one_step = s.reward + through<N>(s.discount(), s.next_value);
    const auto error = one_step - s.q_value;
    return {s.unbroken() * N::wide(weight), N::wide(weight * error), s.unbroken(), one_step, error};
  }
  template <class N>
  FASTRL_DEVICE static void write(const Formed<N>& f, typename N::D, typename N::D x_next,
                                  typename N::V* out) {
    const auto carried = through<N>(f.unbroken, N::narrow(x_next));
    out[0] = f.one_step + carried;
    out[1] = f.error + carried;
  }
};

// The transposed recursions. s_t = dL/dx_t = direct_t + z_{t-1} collects what later outputs owe to
// x_t, and z_t = b_t + a_t z_{t-1} is what step t hands on; in `write`, z_previous is z_{t-1}.

// Of gae, lambda_returns and (lambda = 1) discounted_returns: what b_t gets is s_t.
struct TdBackward {
  static constexpr unsigned kReads = kGrads;
  static constexpr bool kForwardInTime = true, kEndsOnValue = false;
  static constexpr int kOutputs = 1, kAlways = 1;  // grad_rewards

  template <class N>
  struct Formed {
    typename N::D a, b;
    typename N::V direct;
  };
  template <class N>
  FASTRL_DEVICE static Formed<N> form(const Step<N>& s, const Clips&) {
    const auto direct = s.grad_first + s.grad_second;
    return {s.trace(), s.trace() * N::wide(s.handed_on(direct)), direct};
  }
  template <class N>
  FASTRL_DEVICE static void write(const Formed<N>& f, typename N::D, typename N::D z_previous,
                                  typename N::V* out) {
    out[0] = N::narrow(N::wide(f.direct) + z_previous);
  }
};

struct VtraceBackward {
  static constexpr unsigned kReads = kGrads | kLogRatio | kErrors;
  static constexpr bool kForwardInTime = true, kEndsOnValue = false;
  static constexpr int kOutputs = 2, kAlways = 1;  // grad_rewards, grad_log_ratio

  template <class N>
  struct Formed {
    typename N::D a, b;
    typename N::V rho, grad_advantage, direct, of_x, of_advantage;
  };
  template <class N>
  FASTRL_DEVICE static Formed<N> form(const Step<N>& s, const Clips& clips) {
    const auto rho = clipped<N>(s.ratio, clips.rho);
    const auto a = s.trace() * N::wide(clipped<N>(s.ratio, clips.c));
    const auto b = a * N::wide(s.handed_on(s.grad_second)) +
                   s.trace() * N::wide(s.handed_on(rho * s.grad_first));
    const auto live_rho = unclipped<N>(s.ratio, clips.rho), live_c = unclipped<N>(s.ratio, clips.c);
    const auto of_x = live_rho * s.td_error + live_c * s.carried;
    const auto of_advantage = live_rho * (s.td_error + s.carried);
    return {a, b, rho, s.grad_first, s.grad_second, of_x, of_advantage};
  }
  template <class N>
  FASTRL_DEVICE static void write(const Formed<N>& f, typename N::D, typename N::D z_previous,
                                  typename N::V* out) {
    const auto grad_x = f.direct + N::narrow(z_previous);
    out[0] = f.rho * (grad_x + f.grad_advantage);
    out[1] = grad_x * f.of_x + f.grad_advantage * f.of_advantage;
  }
};

struct RetraceBackward {
  static constexpr unsigned kReads = kGrads | kLogRatio | kErrors;
  static constexpr bool kForwardInTime = true, kEndsOnValue = false;
  static constexpr int kOutputs = 3, kAlways = 1;  // grad_rewards, grad_log_ratio, grad_q_values

  template <class N>
  struct Formed {
    typename N::D a, b;
    typename N::V weight, direct, of_x;
  };
  template <class N>
  FASTRL_DEVICE static Formed<N> form(const Step<N>& s, const Clips& clips) {
    const auto lambda = N::narrow(s.lambda);
    const auto weight = lambda * clipped<N>(s.ratio, clips.c);
    const auto of_x = lambda * unclipped<N>(s.ratio, clips.c) * s.td_error;
    const auto b = s.unbroken() * N::wide(s.handed_on(s.grad_first));
    return {s.unbroken() * N::wide(weight), b, weight, s.grad_first, of_x};
  }
  template <class N>
  FASTRL_DEVICE static void write(const Formed<N>& f, typename N::D, typename N::D z_previous,
                                  typename N::V* out) {
    const auto grad_x = N::narrow(z_previous);
    out[0] = f.direct + f.weight * grad_x;
    out[1] = grad_x * f.of_x;
    out[2] = -(f.weight * grad_x);
  }
};

}  // namespace FASTRL_DEVICE_NAMESPACE

// The estimators of returns as ops on CUDA tensors.
#include "returns.h"

namespace fastrl::cuda {
namespace {

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values,
                               FASTRL_CUDA_STEPS_ARGUMENTS) {
  const Call call(rewards, cu_seqlens);
  return with_dtype(rewards.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = typename decltype(type)::type;
    using R = Result<T>;
    auto x = call.trajectories<T>(FASTRL_CUDA_PATH, {bootstrap_value, next_values});
    x.reward = call.read<T>(rewards, "rewards");
    x.value = call.read<T>(values, "values");
    const Tensor advantages = call.empty(kDtype<R>), returns = call.empty(kDtype<R>);
    x.out[0] = call.write<R>(advantages);
    x.out[1] = call.write<R>(returns);
    scan<Gae>(call, x);
    return {advantages, returns};
  });
}

Tensor lambda_returns(const Tensor& rewards, const Tensor& values, FASTRL_CUDA_STEPS_ARGUMENTS) {
  const Call call(rewards, cu_seqlens);
  return with_dtype(rewards.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Result<T>;
    auto x = call.trajectories<T>(FASTRL_CUDA_PATH, {bootstrap_value, next_values});
    x.reward = call.read<T>(rewards, "rewards");
    x.value = call.read<T>(values, "values");
    const Tensor returns = call.empty(kDtype<R>);
    x.out[1] = call.write<R>(returns);
    scan<Gae>(call, x);
    return returns;
  });
}

Tensor discounted_returns(const Tensor& rewards, FASTRL_CUDA_STEPS_ARGUMENTS) {
  const Call call(rewards, cu_seqlens);
  return with_dtype(rewards.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Result<T>;
    auto x = call.trajectories<T>(FASTRL_CUDA_PATH, {bootstrap_value, next_values});
    x.reward = call.read<T>(rewards, "rewards");
    const Tensor returns = call.empty(kDtype<R>);
    x.out[0] = call.write<R>(returns);
    scan<DiscountedReturns>(call, x);
    return returns;
  });
}

Tensor n_step_returns(const Tensor& rewards, const Tensor& values, FASTRL_CUDA_STEPS_ARGUMENTS,
                      int64_t n) {
  STD_TORCH_CHECK(n >= 1, "n_step_returns: n must be at least 1");
  const Call call(rewards, cu_seqlens);
  return with_dtype(rewards.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Result<T>;
    auto x = call.trajectories<T>(FASTRL_CUDA_PATH, {bootstrap_value, next_values});
    x.reward = call.read<T>(rewards, "rewards");
    x.value = call.read<T>(values, "values");
    const Tensor returns = call.empty(kDtype<R>);
    x.out[0] = call.write<R>(returns);
    check(launch_n_step_returns(x, n, call.stream()));
    return returns;
  });
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four vtrace(const Tensor& rewards, const Tensor& values, const Tensor& log_ratio,
            FASTRL_CUDA_STEPS_ARGUMENTS, double rho_clip, double c_clip, bool keep) {
  const Call call(rewards, cu_seqlens);
  return with_dtype(rewards.scalar_type(), [&](auto type) -> Four {
    using T = typename decltype(type)::type;
    using R = Result<T>;
    auto x = call.trajectories<T>(FASTRL_CUDA_PATH, {bootstrap_value, next_values});
    x.reward = call.read<T>(rewards, "rewards");
    x.value = call.read<T>(values, "values");
    x.log_ratio = call.read<T>(log_ratio, "log_ratio");
    x.clips = {rho_clip, c_clip};
    const Tensor advantages = call.empty(kDtype<R>), targets = call.empty(kDtype<R>);
    const Tensor td_error = call.empty(kDtype<R>, keep), carried = call.empty(kDtype<R>, keep);
    x.out[0] = call.write<R>(advantages);
    x.out[1] = call.write<R>(targets);
    x.out[2] = call.write<R>(td_error);
    x.out[3] = call.write<R>(carried);
    scan<Vtrace>(call, x);
    return {advantages, targets, td_error, carried};
  });
}

std::tuple<Tensor, Tensor> retrace_returns(const Tensor& rewards, const Tensor& values,
                                           const Tensor& q_values, const Tensor& log_ratio,
                                           FASTRL_CUDA_STEPS_ARGUMENTS, double c_clip, bool keep) {
  const Call call(rewards, cu_seqlens);
  return with_dtype(rewards.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = typename decltype(type)::type;
    using R = Result<T>;
    auto x = call.trajectories<T>(FASTRL_CUDA_PATH, {bootstrap_value, next_values});
    x.reward = call.read<T>(rewards, "rewards");
    x.value = call.read<T>(values, "values");
    x.q_value = call.read<T>(q_values, "q_values");
    x.log_ratio = call.read<T>(log_ratio, "log_ratio");
    x.clips = {0.0, c_clip};
    const Tensor returns = call.empty(kDtype<R>), td_error = call.empty(kDtype<R>, keep);
    x.out[0] = call.write<R>(returns);
    x.out[1] = call.write<R>(td_error);
    scan<RetraceReturns>(call, x);
    return {returns, td_error};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CUDA, m) {
  m.impl("gae", TORCH_BOX(&gae));
  m.impl("lambda_returns", TORCH_BOX(&lambda_returns));
  m.impl("discounted_returns", TORCH_BOX(&discounted_returns));
  m.impl("n_step_returns", TORCH_BOX(&n_step_returns));
  m.impl("vtrace", TORCH_BOX(&vtrace));
  m.impl("retrace_returns", TORCH_BOX(&retrace_returns));
}

}  // namespace fastrl::cuda

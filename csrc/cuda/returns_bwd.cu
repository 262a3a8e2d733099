// The backward passes of the estimators of returns, as ops on CUDA tensors.
#include "returns.h"

namespace fastrl::cuda {
namespace {

Tensor td_bwd(const std::optional<Tensor>& grad_first, const std::optional<Tensor>& grad_second,
              FASTRL_CUDA_PATH_ARGUMENTS) {
  STD_TORCH_CHECK(grad_first || grad_second, "td_bwd: both gradients are missing");
  const Tensor& grad = grad_first ? *grad_first : *grad_second;
  const Call call(grad, cu_seqlens);
  const Path path = FASTRL_CUDA_PATH;
  return with_dtype(path_dtype(path, grad), [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Result<T>;
    auto x = call.trajectories<T>(path);
    x.grad_first = call.read<R>(grad_first, "grad_first");
    x.grad_second = call.read<R>(grad_second, "grad_second");
    const Tensor grad_rewards = call.empty(kDtype<R>);
    x.out[0] = call.write<R>(grad_rewards);
    scan<TdBackward>(call, x);
    return grad_rewards;
  });
}

std::tuple<Tensor, Tensor> vtrace_bwd(const std::optional<Tensor>& grad_advantages,
                                      const std::optional<Tensor>& grad_targets,
                                      const Tensor& log_ratio,
                                      const std::optional<Tensor>& td_error,
                                      const std::optional<Tensor>& carried,
                                      FASTRL_CUDA_PATH_ARGUMENTS, double rho_clip, double c_clip) {
  STD_TORCH_CHECK(grad_advantages || grad_targets, "vtrace_bwd: both gradients are missing");
  const Call call(grad_advantages ? *grad_advantages : *grad_targets, cu_seqlens);
  return with_dtype(log_ratio.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = typename decltype(type)::type;
    using R = Result<T>;
    auto x = call.trajectories<T>(FASTRL_CUDA_PATH);
    x.grad_first = call.read<R>(grad_advantages, "grad_advantages");
    x.grad_second = call.read<R>(grad_targets, "grad_targets");
    x.log_ratio = call.read<T>(log_ratio, "log_ratio");
    x.td_error = call.read<R>(td_error, "td_error");
    x.carried = call.read<R>(carried, "carried");
    x.clips = {rho_clip, c_clip};
    const Tensor grad_rewards = call.empty(kDtype<R>);
    const Tensor grad_log_ratio = call.empty(kDtype<R>, td_error.has_value());
    x.out[0] = call.write<R>(grad_rewards);
    x.out[1] = call.write<R>(grad_log_ratio);
    scan<VtraceBackward>(call, x);
    return {grad_rewards, grad_log_ratio};
  });
}

std::tuple<Tensor, Tensor, Tensor> retrace_returns_bwd(const Tensor& grad, const Tensor& log_ratio,
                                                       const std::optional<Tensor>& td_error,
                                                       FASTRL_CUDA_PATH_ARGUMENTS, double c_clip,
                                                       bool needs_q_values) {
  const Call call(grad, cu_seqlens);
  return with_dtype(log_ratio.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = typename decltype(type)::type;
    using R = Result<T>;
    auto x = call.trajectories<T>(FASTRL_CUDA_PATH);
    x.grad_first = call.read<R>(grad, "grad");
    x.log_ratio = call.read<T>(log_ratio, "log_ratio");
    x.td_error = call.read<R>(td_error, "td_error");
    x.clips = {0.0, c_clip};
    const Tensor grad_rewards = call.empty(kDtype<R>);
    const Tensor grad_log_ratio = call.empty(kDtype<R>, td_error.has_value());
    const Tensor grad_q_values = call.empty(kDtype<R>, needs_q_values);
    x.out[0] = call.write<R>(grad_rewards);
    x.out[1] = call.write<R>(grad_log_ratio);
    x.out[2] = call.write<R>(grad_q_values);
    scan<RetraceBackward>(call, x);
    return {grad_rewards, grad_log_ratio, grad_q_values};
  });
}

std::tuple<Tensor, Tensor> n_step_returns_bwd(const Tensor& grad, FASTRL_CUDA_PATH_ARGUMENTS,
                                              int64_t n) {
  STD_TORCH_CHECK(n >= 1, "n_step_returns: n must be at least 1");
  const Call call(grad, cu_seqlens);
  const Path path = FASTRL_CUDA_PATH;
  return with_dtype(path_dtype(path, grad), [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = typename decltype(type)::type;
    using R = Result<T>;
    auto x = call.trajectories<T>(path);
    x.grad_first = call.read<R>(grad, "grad");
    const Tensor grad_rewards = call.empty(kDtype<R>), grad_next = call.empty(kDtype<R>);
    x.out[0] = call.write<R>(grad_rewards);
    x.out[1] = call.write<R>(grad_next);
    check(launch_n_step_returns_bwd(x, n, call.stream()));
    return {grad_rewards, grad_next};
  });
}

using Three = std::tuple<Tensor, Tensor, Tensor>;

Three value_grads(const Tensor& grad_rewards, const std::optional<Tensor>& grad_returns,
                  const std::optional<Tensor>& grad_next, bool own, bool only_at_cuts,
                  bool needs_values, bool has_next_values, FASTRL_CUDA_PATH_ARGUMENTS) {
  const Call call(grad_rewards, cu_seqlens);
  const Path path = FASTRL_CUDA_PATH;
  return with_dtype(path_dtype(path, grad_rewards), [&](auto type) -> Three {
    using T = typename decltype(type)::type;
    using R = Result<T>;
    auto x = call.trajectories<T>(path);
    x.grad_first = call.read<R>(grad_rewards, "grad_rewards");
    x.grad_second = call.read<R>(grad_returns, "grad_returns");
    x.carried = call.read<R>(grad_next, "grad_next");
    const Tensor to_values = call.empty(kDtype<R>, needs_values);
    const Tensor to_next = call.empty(kDtype<R>, has_next_values);
    const Tensor to_bootstrap = call.empty_per_row(kDtype<R>, !has_next_values);
    x.out[0] = call.write<R>(to_values);
    x.out[1] = call.write<R>(to_next);
    if (to_bootstrap.numel() > 0) {  // rows without an action have no thread that writes
      void* at = to_bootstrap.mutable_data_ptr();
      check(cudaMemsetAsync(at, 0, to_bootstrap.numel() * sizeof(R), call.stream()));
      x.out[2] = {static_cast<R*>(at), 1, 0};
    }
    check(launch_value_grads(x, {own, only_at_cuts, has_next_values}, call.stream()));
    return {to_values, to_next, to_bootstrap};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CUDA, m) {
  m.impl("td_bwd", TORCH_BOX(&td_bwd));
  m.impl("vtrace_bwd", TORCH_BOX(&vtrace_bwd));
  m.impl("retrace_returns_bwd", TORCH_BOX(&retrace_returns_bwd));
  m.impl("n_step_returns_bwd", TORCH_BOX(&n_step_returns_bwd));
  m.impl("value_grads", TORCH_BOX(&value_grads));
}

}  // namespace fastrl::cuda

#include <tuple>

#include "returns.h"

namespace fastrl {
namespace {

std::tuple<Tensor, Tensor> retrace_returns_cpu(const Tensor& rewards, const Tensor& values,
                                               const Tensor& q_values, const Tensor& log_ratio,
                                               FASTRL_STEPS_ARGUMENTS, double c_clip, bool keep) {
  const Path path = FASTRL_PATH;
  const Bootstrap end{bootstrap_value, next_values};
  const Rows rows(rewards, cu_seqlens);
  Trajectories x = trajectories(rows, path, end);
  x.rewards = rows.floats(rewards, "rewards");
  x.values = rows.floats(values, "values");
  x.q_values = rows.floats(q_values, "q_values");
  x.log_ratio = rows.floats(log_ratio, "log_ratio");
  x.c_clip = c_clip;
  const ScalarType dtype = result_type({&rewards, &values, &q_values, &log_ratio}, path, end);
  const Tensor returns = rows.empty(dtype), td_error = empty_if(keep, rows, dtype);
  x.results[0] = rows.results(returns);
  x.results[1] = rows.results(td_error);
  run(kernels().returns.retrace_returns, x, rows);
  return {returns, td_error};
}

std::tuple<Tensor, Tensor, Tensor> retrace_returns_bwd_cpu(const Tensor& grad,
                                                           const Tensor& log_ratio,
                                                           const std::optional<Tensor>& td_error,
                                                           FASTRL_PATH_ARGUMENTS, double c_clip,
                                                           bool needs_q_values) {
  const Path path = FASTRL_PATH;
  const Rows rows(grad, cu_seqlens);
  Trajectories x = trajectories(rows, path);
  x.grad_first = rows.floats(grad, "grad");
  x.log_ratio = rows.floats(log_ratio, "log_ratio");
  x.td_error = rows.floats(td_error, "td_error");
  x.c_clip = c_clip;
  const Tensor grad_rewards = rows.empty(grad_type(grad));
  const Tensor grad_log_ratio = empty_if(td_error.has_value(), rows, grad_type(grad));
  const Tensor grad_q_values = empty_if(needs_q_values, rows, grad_type(grad));
  x.results[0] = rows.results(grad_rewards);
  x.results[1] = rows.results(grad_log_ratio);
  x.results[2] = rows.results(grad_q_values);
  run(kernels().returns.retrace_returns_bwd, x, rows);
  return {grad_rewards, grad_log_ratio, grad_q_values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) {
  m.impl("retrace_returns", TORCH_BOX(&retrace_returns_cpu));
  m.impl("retrace_returns_bwd", TORCH_BOX(&retrace_returns_bwd_cpu));
}

}  // namespace fastrl

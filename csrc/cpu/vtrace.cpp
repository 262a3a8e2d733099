#include <tuple>

#include "returns.h"

namespace fastrl {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> vtrace_cpu(const Tensor& rewards, const Tensor& values,
                                                      const Tensor& log_ratio,
                                                      FASTRL_STEPS_ARGUMENTS, double rho_clip,
                                                      double c_clip, bool keep) {
  const Path path = FASTRL_PATH;
  const Bootstrap end{bootstrap_value, next_values};
  const Rows rows(rewards, cu_seqlens);
  Trajectories x = trajectories(rows, path, end);
  x.rewards = rows.floats(rewards, "rewards");
  x.values = rows.floats(values, "values");
  x.log_ratio = rows.floats(log_ratio, "log_ratio");
  x.rho_clip = rho_clip;
  x.c_clip = c_clip;
  const ScalarType dtype = result_type({&rewards, &values, &log_ratio}, path, end);
  const Tensor advantages = rows.empty(dtype), targets = rows.empty(dtype);
  const Tensor td_error = empty_if(keep, rows, dtype), carried = empty_if(keep, rows, dtype);
  x.results[0] = rows.results(advantages);
  x.results[1] = rows.results(targets);
  x.results[2] = rows.results(td_error);
  x.results[3] = rows.results(carried);
  run(kernels().returns.vtrace, x, rows);
  return {advantages, targets, td_error, carried};
}

std::tuple<Tensor, Tensor> vtrace_bwd_cpu(const std::optional<Tensor>& grad_advantages,
                                          const std::optional<Tensor>& grad_targets,
                                          const Tensor& log_ratio,
                                          const std::optional<Tensor>& td_error,
                                          const std::optional<Tensor>& carried,
                                          FASTRL_PATH_ARGUMENTS, double rho_clip, double c_clip) {
  STD_TORCH_CHECK(grad_advantages || grad_targets, "vtrace_bwd: both gradients are missing");
  const Tensor& grad = grad_advantages ? *grad_advantages : *grad_targets;
  const Path path = FASTRL_PATH;
  const Rows rows(grad, cu_seqlens);
  Trajectories x = trajectories(rows, path);
  x.grad_first = rows.floats(grad_advantages, "grad_advantages");
  x.grad_second = rows.floats(grad_targets, "grad_targets");
  x.log_ratio = rows.floats(log_ratio, "log_ratio");
  x.td_error = rows.floats(td_error, "td_error");
  x.carried = rows.floats(carried, "carried");
  x.rho_clip = rho_clip;
  x.c_clip = c_clip;
  const Tensor grad_rewards = rows.empty(grad_type(grad));
  const Tensor grad_log_ratio = empty_if(td_error.has_value(), rows, grad_type(grad));
  x.results[0] = rows.results(grad_rewards);
  x.results[1] = rows.results(grad_log_ratio);
  run(kernels().returns.vtrace_bwd, x, rows);
  return {grad_rewards, grad_log_ratio};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) {
  m.impl("vtrace", TORCH_BOX(&vtrace_cpu));
  m.impl("vtrace_bwd", TORCH_BOX(&vtrace_bwd_cpu));
}

}  // namespace fastrl

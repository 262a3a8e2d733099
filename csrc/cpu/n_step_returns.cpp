#include <tuple>

#include "returns.h"

namespace fastrl {
namespace {

Tensor n_step_returns_cpu(const Tensor& rewards, const Tensor& values, FASTRL_STEPS_ARGUMENTS,
                          int64_t n) {
  STD_TORCH_CHECK(n >= 1, "n_step_returns: n must be at least 1");
  const Path path = FASTRL_PATH;
  const Bootstrap end{bootstrap_value, next_values};
  const Rows rows(rewards, cu_seqlens);
  Trajectories x = trajectories(rows, path, end);
  x.rewards = rows.floats(rewards, "rewards");
  x.values = rows.floats(values, "values");
  const Tensor returns = rows.empty(result_type({&rewards, &values}, path, end));
  x.results[0] = rows.results(returns);
  if (n >= rows.longest()) {  // as each row would be by itself, and long ones by chunks
    run(kernels().returns.discounted_returns, x, rows);
  } else {
    run_windows(kernels().returns.n_step_returns, kWindowScratch, x, rows, n);
  }
  return returns;
}

std::tuple<Tensor, Tensor> n_step_returns_bwd_cpu(const Tensor& grad, FASTRL_PATH_ARGUMENTS,
                                                  int64_t n) {
  STD_TORCH_CHECK(n >= 1, "n_step_returns: n must be at least 1");
  const Path path = FASTRL_PATH;
  const Rows rows(grad, cu_seqlens);
  Trajectories x = trajectories(rows, path);
  x.grad_first = rows.floats(grad, "grad");
  const Tensor grad_rewards = rows.empty(grad_type(grad)), grad_next = rows.empty(grad_type(grad));
  x.results[0] = rows.results(grad_rewards);
  x.results[1] = rows.results(grad_next);
  run_windows(kernels().returns.n_step_returns_bwd, 2 * kWindowScratch, x, rows, n);
  return {grad_rewards, grad_next};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) {
  m.impl("n_step_returns", TORCH_BOX(&n_step_returns_cpu));
  m.impl("n_step_returns_bwd", TORCH_BOX(&n_step_returns_bwd_cpu));
}

}  // namespace fastrl

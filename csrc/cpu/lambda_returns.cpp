#include "returns.h"

namespace fastrl {
namespace {

Tensor lambda_returns_cpu(const Tensor& rewards, const Tensor& values, FASTRL_STEPS_ARGUMENTS) {
  const Path path = FASTRL_PATH;
  const Bootstrap end{bootstrap_value, next_values};
  const Rows rows(rewards, cu_seqlens);
  Trajectories x = trajectories(rows, path, end);
  x.rewards = rows.floats(rewards, "rewards");
  x.values = rows.floats(values, "values");
  const Tensor returns = rows.empty(result_type({&rewards, &values}, path, end));
  x.results[0] = rows.results(returns);
  run(kernels().returns.lambda_returns, x, rows);
  return returns;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) {
  m.impl("lambda_returns", TORCH_BOX(&lambda_returns_cpu));
}

}  // namespace fastrl

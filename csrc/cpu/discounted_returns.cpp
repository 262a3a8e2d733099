#include "returns.h"

namespace fastrl {
namespace {

Tensor discounted_returns_cpu(const Tensor& rewards, FASTRL_STEPS_ARGUMENTS) {
  const Path path = FASTRL_PATH;
  const Bootstrap end{bootstrap_value, next_values};
  const Rows rows(rewards, cu_seqlens);
  Trajectories x = trajectories(rows, path, end);
  x.rewards = rows.floats(rewards, "rewards");
  const Tensor returns = rows.empty(result_type({&rewards}, path, end));
  x.results[0] = rows.results(returns);
  run(kernels().returns.discounted_returns, x, rows);
  return returns;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) {
  m.impl("discounted_returns", TORCH_BOX(&discounted_returns_cpu));
}

}  // namespace fastrl

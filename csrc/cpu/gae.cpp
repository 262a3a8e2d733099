#include <tuple>

#include "returns.h"

namespace fastrl {
namespace {

std::tuple<Tensor, Tensor> gae_cpu(const Tensor& rewards, const Tensor& values,
                                   FASTRL_STEPS_ARGUMENTS) {
  const Path path = FASTRL_PATH;
  const Bootstrap end{bootstrap_value, next_values};
  const Rows rows(rewards, cu_seqlens);
  Trajectories x = trajectories(rows, path, end);
  x.rewards = rows.floats(rewards, "rewards");
  x.values = rows.floats(values, "values");
  const ScalarType dtype = result_type({&rewards, &values}, path, end);
  const Tensor advantages = rows.empty(dtype), returns = rows.empty(dtype);
  x.results[0] = rows.results(advantages);
  x.results[1] = rows.results(returns);
  run(kernels().returns.gae, x, rows);
  return {advantages, returns};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) { m.impl("gae", TORCH_BOX(&gae_cpu)); }

}  // namespace fastrl

// What flows to the rewards of gae, lambda_returns and discounted_returns, and from the rewards of
// every estimator to its values.
#include <tuple>

#include "returns.h"

namespace fastrl {
namespace {

Tensor td_bwd_cpu(const std::optional<Tensor>& grad_first, const std::optional<Tensor>& grad_second,
                  FASTRL_PATH_ARGUMENTS) {
  STD_TORCH_CHECK(grad_first || grad_second, "td_bwd: both gradients are missing");
  const Tensor& grad = grad_first ? *grad_first : *grad_second;
  const Path path = FASTRL_PATH;
  const Rows rows(grad, cu_seqlens);
  Trajectories x = trajectories(rows, path);
  x.grad_first = rows.floats(grad_first, "grad_first");
  x.grad_second = rows.floats(grad_second, "grad_second");
  const Tensor grad_rewards = rows.empty(grad_type(grad));
  x.results[0] = rows.results(grad_rewards);
  run(kernels().returns.td_bwd, x, rows);
  return grad_rewards;
}

std::tuple<Tensor, Tensor, Tensor> value_grads_cpu(const Tensor& grad_rewards,
                                                   const std::optional<Tensor>& grad_returns,
                                                   const std::optional<Tensor>& grad_next, bool own,
                                                   bool only_at_cuts, bool needs_values,
                                                   bool has_next_values, FASTRL_PATH_ARGUMENTS) {
  const Path path = FASTRL_PATH;
  const Rows rows(grad_rewards, cu_seqlens);
  Trajectories x = trajectories(rows, path);
  x.grad_first = rows.floats(grad_rewards, "grad_rewards");
  x.grad_second = rows.floats(grad_returns, "grad_returns");
  x.carried = rows.floats(grad_next, "grad_next");
  x.own = own;
  x.only_at_cuts = only_at_cuts;
  x.has_next_values = has_next_values;
  const ScalarType dtype = grad_type(grad_rewards);
  const Tensor to_values = empty_if(needs_values, rows, dtype);
  const Tensor to_next = empty_if(has_next_values, rows, dtype);
  const Tensor to_bootstrap = has_next_values ? nothing(dtype) : rows.empty_per_row(dtype);
  x.results[0] = rows.results(to_values);
  x.results[1] = rows.results(to_next);
  if (!has_next_values && to_bootstrap.numel() > 0) {
    x.to_bootstrap_value = {to_bootstrap.mutable_data_ptr(),
                            dtype == ScalarType::Double ? Float::f64 : Float::f32, 1};
    std::memset(x.to_bootstrap_value.data, 0,
                to_bootstrap.numel() * (dtype == ScalarType::Double ? 8 : 4));
  }
  run(kernels().returns.value_grads, x, rows);
  return {to_values, to_next, to_bootstrap};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) {
  m.impl("td_bwd", TORCH_BOX(&td_bwd_cpu));
  m.impl("value_grads", TORCH_BOX(&value_grads_cpu));
}

}  // namespace fastrl

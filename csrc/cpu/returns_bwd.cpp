// The backward pass of every estimator of returns: the transposed recursion, forward in time.
#include <tuple>

#include "returns.h"

namespace fastrl {
namespace {

std::tuple<Tensor, Tensor, Tensor> returns_bwd_cpu(
    const Tensor& grad, bool bootstraps_every_step, bool has_next_values,
    const std::optional<Tensor>& terminated, const std::optional<Tensor>& truncated,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens,
    const std::optional<Tensor>& gamma_per_step, const std::optional<Tensor>& lambda_per_step,
    double gamma, double gae_lambda) {
  const std::optional<Tensor> none;
  // Only whether next_values were given matters here: grad stands in for them.
  const std::optional<Tensor> next_values = has_next_values ? std::optional(grad) : none;
  const ReturnsArgs args{grad, none,       none,           next_values,     terminated, truncated,
                         mask, cu_seqlens, gamma_per_step, lambda_per_step, gamma,      gae_lambda};
  const auto shape = shape_of(grad);
  std::vector<int64_t> per_row(shape.begin(), shape.end() - 1);
  if (cu_seqlens) per_row = {cu_seqlens->numel() - 1};
  Tensor grad_rewards = empty_cpu(shape, grad.scalar_type());
  Tensor grad_next = empty_cpu(shape, grad.scalar_type());
  Tensor grad_bootstrap = empty_cpu(per_row, grad.scalar_type());
  const Output r(grad_rewards), n(grad_next), b(grad_bootstrap);
  for_each_trajectory(args, [&](const auto& k, const auto& row, int64_t index, int64_t begin) {
    using T = std::decay_t<decltype(*row.rewards)>;
    k.returns_bwd(row, bootstraps_every_step, row.rewards, r.at<T>(begin), n.at<T>(begin),
                  b.at<T>(index));
  });
  return {grad_rewards, grad_next, grad_bootstrap};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) { m.impl("returns_bwd", TORCH_BOX(&returns_bwd_cpu)); }

}  // namespace fastrl

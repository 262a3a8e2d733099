#include "returns.h"

namespace fastrl {
namespace {

Tensor discounted_returns_cpu(const Tensor& rewards, const std::optional<Tensor>& bootstrap_value,
                              const std::optional<Tensor>& next_values,
                              const std::optional<Tensor>& terminated,
                              const std::optional<Tensor>& truncated,
                              const std::optional<Tensor>& mask,
                              const std::optional<Tensor>& cu_seqlens,
                              const std::optional<Tensor>& gamma_per_step, double gamma) {
  const std::optional<Tensor> none;
  const ReturnsArgs args{rewards, none,       bootstrap_value, next_values, terminated, truncated,
                         mask,    cu_seqlens, gamma_per_step,  none,        gamma,      1.0};
  Tensor returns = empty_cpu(shape_of(rewards), rewards.scalar_type());
  const Output out(returns);
  for_each_trajectory(args, [&](const auto& k, const auto& row, int64_t, int64_t begin) {
    using T = std::decay_t<decltype(*row.rewards)>;
    k.discounted_returns(row, out.at<T>(begin));
  });
  return returns;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) {
  m.impl("discounted_returns", TORCH_BOX(&discounted_returns_cpu));
}

}  // namespace fastrl

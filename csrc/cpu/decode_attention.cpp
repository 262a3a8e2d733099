// decode_attention on the CPU.
#include <tuple>

#include "decode_engine.h"

namespace fastrl {
namespace {

std::tuple<Tensor, Tensor> decode_attention_cpu(
    const Tensor& query, const Tensor& key, const Tensor& value,
    const std::optional<Tensor>& key_start, const std::optional<Tensor>& key_end,
    const std::optional<Tensor>& prefix_key, const std::optional<Tensor>& prefix_value,
    const std::optional<Tensor>& prefix_end, const std::optional<Tensor>& prefix_cu_rows,
    double scale, std::optional<int64_t> window, std::optional<double> softcap) {
  const Arguments a{query,        key,        value,          key_start, key_end, prefix_key,
                    prefix_value, prefix_end, prefix_cu_rows, scale,     window,  softcap};
  const Call call = plan(a);
  switch (query.scalar_type()) {
    case ScalarType::Float:
      return decode<float>(a, call, kernels().decode_f32);
    case ScalarType::Double:
      return decode<double>(a, call, kernels().decode_f64);
    case ScalarType::BFloat16:
      return decode<BFloat16>(a, call, kernels().decode_bf16);
    case ScalarType::Half:
      return decode<Half>(a, call, kernels().decode_f16);
    default:
      STD_TORCH_CHECK(false, "decode_attention: expected a floating-point query");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention_cpu));
}

}  // namespace fastrl

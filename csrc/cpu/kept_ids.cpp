// kept_ids on the CPU: the ids that a row was drawn from, written out. Counted first, then listed.
#include <limits>
#include <tuple>

#include "sampling.h"

namespace fastrl {
namespace {

std::tuple<Tensor, Tensor> kept_ids_cpu(const Tensor& logits, const Tensor& lowest,
                                        const Tensor& last_id) {
  const LogitRows rows(logits);
  STD_TORCH_CHECK(lowest.scalar_type() == ScalarType::Float && lowest.is_contiguous() &&
                      last_id.scalar_type() == ScalarType::Long && last_id.is_contiguous() &&
                      lowest.numel() == rows.count && last_id.numel() == rows.count,
                  "kept_ids: lowest and last_id must be contiguous, float32 and int64, one of each "
                  "per row of logits");
  const auto* low = ptr<float>(lowest);
  const auto* last = ptr<int64_t>(last_id);
  const auto kept = [&](int64_t r) {  // of any id below 0 columns could not be taken
    return Kept{low[r], std::max<int64_t>(last[r], -1)};
  };
  Tensor cu_seqlens = empty_cpu({rows.count + 1}, ScalarType::Int);
  auto* bounds = mutable_ptr<int32_t>(cu_seqlens);
  std::vector<int64_t> starts(rows.count + 1, 0);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, rows.vocab));
  Tensor ids;
  dispatch(logits, [&](auto dtype, const auto&) {
    using T = decltype(dtype);
    const T* x = ptr<T>(logits);
    const SampleKernels<T>& k = sample_kernels<T>();
    torch::stable::parallel_for(0, rows.count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        starts[r + 1] = k.count_kept(x + rows.offset(r), rows.vocab, kept(r));
      }
    });
    for (int64_t r = 0; r < rows.count; ++r) starts[r + 1] += starts[r];
    STD_TORCH_CHECK(starts[rows.count] <= std::numeric_limits<int32_t>::max(),
                    "kept_ids: expected fewer than 2^31 kept ids, got ", starts[rows.count]);
    std::copy(starts.begin(), starts.end(), bounds);
    ids = empty_cpu({starts[rows.count]}, ScalarType::Long);
    auto* out = mutable_ptr<int64_t>(ids);
    torch::stable::parallel_for(0, rows.count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        k.list_kept(x + rows.offset(r), rows.vocab, kept(r), 0, out + starts[r]);
      }
    });
  });
  return {ids, cu_seqlens};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) { m.impl("kept_ids", TORCH_BOX(&kept_ids_cpu)); }

}  // namespace fastrl

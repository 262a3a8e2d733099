// token_logprobs over the kept ids of each row, on the CPU: their logits are gathered, and go
// through the loops of token_logprobs.
#include <tuple>

#include "logit_rows.h"

namespace fastrl {
namespace {

// Row r keeps ids[bounds[r] .. bounds[r + 1]), all in [0, vocab).
struct KeptRows {
  const int64_t* ids;
  const int32_t* bounds;

  KeptRows(const Tensor& kept_ids, const Tensor& cu_seqlens, const LogitRows& rows)
      : ids(ptr<int64_t>(kept_ids)), bounds(ptr<int32_t>(cu_seqlens)) {
    STD_TORCH_CHECK(kept_ids.scalar_type() == ScalarType::Long && kept_ids.is_contiguous() &&
                        cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.is_contiguous() &&
                        cu_seqlens.numel() == rows.count + 1,
                    "kept_logprobs: kept_ids must be contiguous int64, and cu_seqlens int32, one "
                    "more than rows of logits");
    bool rise = bounds[0] == 0 && bounds[rows.count] == kept_ids.numel();
    for (int64_t r = 0; r < rows.count; ++r) rise = rise && bounds[r] <= bounds[r + 1];
    STD_TORCH_CHECK(rise, "kept_logprobs: cu_seqlens must rise from 0 to the number of kept ids");
    bool in_range = true;
    for (int64_t i = 0; i < kept_ids.numel(); ++i) {
      in_range &= static_cast<uint64_t>(ids[i]) < static_cast<uint64_t>(rows.vocab);
    }
    STD_TORCH_CHECK(in_range, "kept_logprobs: kept ids must be in [0, ", rows.vocab, ")");
  }

  int64_t grain(const LogitRows& rows) const {
    const int64_t mean = bounds[rows.count] / std::max<int64_t>(1, rows.count);
    return std::max<int64_t>(1, 8192 / std::max<int64_t>(64, mean));
  }
};

template <class T>
constexpr T kMinusInf = T{};
template <>
constexpr float kMinusInf<float> = -INFINITY;
template <>
constexpr BFloat16 kMinusInf<BFloat16> = {0xff80};
template <>
constexpr Half kMinusInf<Half> = {0xfc00};

// A row's kept logits and one more, of -inf: that stands for a token which is not kept.
template <class T>
struct Gathered {
  std::vector<T> x;
  int64_t count = 0;
  int64_t target = 0;  // where the token stands among them; -1: its id is none

  void gather(const T* row, int64_t vocab, const int64_t* ids, int64_t n, int64_t token_id) {
    x.resize(n + 1);
    count = n;
    target = token_id >= 0 && token_id < vocab ? n : -1;
    for (int64_t i = 0; i < n; ++i) {
      x[i] = row[ids[i]];
      if (ids[i] == token_id) target = i;
    }
    x[n] = kMinusInf<T>;
  }
};

template <class T>
void forward(const T* logits, const LogitRows& rows, const KeptRows& kept,
             const LogprobKernels<T>& k, const Forward& f) {
  torch::stable::parallel_for(0, rows.count, kept.grain(rows), [&](int64_t begin, int64_t end) {
    Gathered<T> g;
    for (int64_t r = begin; r < end; ++r) {
      if (f.token_ids[r] == f.ignore_index) {
        f.ignore(r);
        continue;
      }
      g.gather(logits + rows.offset(r), rows.vocab, kept.ids + kept.bounds[r],
               kept.bounds[r + 1] - kept.bounds[r], f.token_ids[r]);
      RowState state;
      for (int64_t start = 0; start < g.count; start += kVocabChunk) {
        const int64_t n = std::min(kVocabChunk, g.count - start);
        const RowState chunk =
            k.chunk_state(g.x.data() + start, n, f.temperature, f.return_entropy);
        if (start == 0) {
          state = chunk;
        } else {
          merge(state, chunk, 1.0 / f.temperature);
        }
      }
      const Forward one{&g.target,      f.temperature, f.ignore_index, f.return_entropy,
                        f.logprobs + r, f.entropy + r, f.row_max + r,  f.log_total + r};
      one.finish(g.x.data(), g.count + 1, 0, state);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kept_logprobs_fwd_cpu(
    const Tensor& logits, const Tensor& token_ids, const Tensor& kept_ids, const Tensor& cu_seqlens,
    double temperature, int64_t ignore_index, bool return_entropy) {
  const LogitRows rows(logits);
  STD_TORCH_CHECK(token_ids.scalar_type() == ScalarType::Long && token_ids.is_contiguous() &&
                      token_ids.numel() == rows.count,
                  "kept_logprobs: token_ids must be contiguous int64, one per row of logits");
  const KeptRows kept(kept_ids, cu_seqlens, rows);
  const LogprobOutputs outputs(token_ids, return_entropy);
  const Forward f = outputs.forward(token_ids, temperature, ignore_index, return_entropy);
  dispatch(logits, [&](auto dtype, const auto& k) {
    forward(ptr<decltype(dtype)>(logits), rows, kept, k, f);
  });
  return outputs.all();
}

// Per row: what the forward pass gave, and what flows back.
struct Backward {
  const int64_t* token_ids;
  const float *grad_logprobs, *grad_entropy, *logprobs, *entropy, *row_max, *log_total;
  double temperature;
  int64_t ignore_index;

  template <class T>
  void run(const T* logits, const LogitRows& in, const KeptRows& kept, const LogprobKernels<T>& k,
           T* grad) const {
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, in.vocab));
    torch::stable::parallel_for(0, in.count, grain, [&](int64_t begin, int64_t end) {
      Gathered<T> g;
      std::vector<T> d;
      for (int64_t r = begin; r < end; ++r) {
        T* const row = grad + r * in.vocab;
        std::memset(static_cast<void*>(row), 0, in.vocab * sizeof(T));
        if (token_ids[r] == ignore_index) continue;
        const int64_t* ids = kept.ids + kept.bounds[r];
        g.gather(logits + in.offset(r), in.vocab, ids, kept.bounds[r + 1] - kept.bounds[r],
                 token_ids[r]);
        d.resize(g.count + 1);
        k.row_grad(g.x.data(), g.count + 1, of_row(r, g.target, g.count), d.data());
        for (int64_t i = 0; i < g.count; ++i) row[ids[i]] = d[i];
      }
    });
  }

  TokenLogprobsGrad of_row(int64_t r, int64_t target, int64_t count) const {
    const double g = target < 0 ? kNan : grad_logprobs ? grad_logprobs[r] : 0.0;
    const double h = grad_entropy ? grad_entropy[r] : 0.0;
    return {g,
            h,
            logprobs[r],
            row_max[r],
            log_total[r],
            grad_entropy ? entropy[r] : 0.0,
            temperature,
            target < 0 ? count : target,
            false};
  }
};

Tensor kept_logprobs_bwd_cpu(const std::optional<Tensor>& grad_logprobs,
                             const std::optional<Tensor>& grad_entropy, const Tensor& logits,
                             const Tensor& token_ids, const Tensor& kept_ids,
                             const Tensor& cu_seqlens, const Tensor& logprobs,
                             const std::optional<Tensor>& entropy, const Tensor& row_max,
                             const Tensor& log_total, double temperature, int64_t ignore_index) {
  const LogitRows rows(logits);
  const KeptRows kept(kept_ids, cu_seqlens, rows);
  const auto check = [&](const Tensor& t, ScalarType dtype) {
    STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous() && t.numel() == rows.count,
                    "kept_logprobs: the backward pass takes contiguous tensors, a number per row");
  };
  check(token_ids, ScalarType::Long);
  for (const Tensor* t : {&logprobs, &row_max, &log_total}) check(*t, ScalarType::Float);
  for (const auto* t : {&grad_logprobs, &grad_entropy, &entropy}) {
    if (*t) check(**t, ScalarType::Float);
  }
  STD_TORCH_CHECK(!grad_entropy || entropy, "kept_logprobs: the entropy was not computed");
  const Backward b{ptr<int64_t>(token_ids),
                   ptr<float>(grad_logprobs),
                   ptr<float>(grad_entropy),
                   ptr<float>(logprobs),
                   ptr<float>(entropy),
                   ptr<float>(row_max),
                   ptr<float>(log_total),
                   temperature,
                   ignore_index};
  Tensor grad = empty_cpu(shape_of(logits), logits.scalar_type());
  dispatch(logits, [&](auto dtype, const auto& k) {
    using T = decltype(dtype);
    b.run(ptr<T>(logits), rows, kept, k, mutable_ptr<T>(grad));
  });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) {
  m.impl("kept_logprobs_fwd", TORCH_BOX(&kept_logprobs_fwd_cpu));
  m.impl("kept_logprobs_bwd", TORCH_BOX(&kept_logprobs_bwd_cpu));
}

}  // namespace fastrl

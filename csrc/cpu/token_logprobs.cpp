// token_logprobs on the CPU: rows, and stretches of a row when rows are few, over torch's threads.
#include <tuple>

#include "logit_rows.h"

namespace fastrl {
namespace {

constexpr int64_t kCachedBytes = 64
                                 << 20;  // a gradient larger than this is written past the caches

// The state itself, for those who merge slices of a vocabulary: (max, rest, count, weighted, the
// target's logit, how many slices hold the target).
struct State {
  const int64_t* token_ids;
  double temperature;
  int64_t ignore_index, vocab_start;
  bool return_entropy;
  double* state;

  static constexpr int64_t kSize = 6;

  template <class T>
  void finish(const T* logits, int64_t vocab, int64_t row, const RowState& s) const {
    const int64_t column = column_of(token_ids[row], vocab_start, vocab);
    const double found[kSize] = {s.max,
                                 s.rest,
                                 s.count,
                                 s.weighted,
                                 column < 0 ? 0.0 : Forward::value(logits[column]),
                                 column < 0 ? 0.0 : 1.0};
    std::memcpy(state + row * kSize, found, sizeof(found));
  }

  void ignore(int64_t row) const { std::memset(state + row * kSize, 0, kSize * sizeof(double)); }
};

template <class T, class Sink>
void forward(const T* logits, const LogitRows& rows, const LogprobKernels<T>& k, const Sink& f) {
  const int64_t chunks = (rows.vocab + kVocabChunk - 1) / kVocabChunk;
  const auto chunk_state = [&](const T* row, int64_t chunk) {
    const int64_t start = chunk * kVocabChunk;
    const int64_t n = std::min(kVocabChunk, rows.vocab - start);
    return k.chunk_state(row + start, n, f.temperature, f.return_entropy);
  };
  const auto finish_row = [&](const T* row, int64_t r, auto&& state_of) {
    RowState state = state_of(0);
    for (int64_t c = 1; c < chunks; ++c) merge(state, state_of(c), 1.0 / f.temperature);
    f.finish(row, rows.vocab, r, state);
  };
  const bool few = rows.count < 4 * int64_t{torch::stable::get_num_threads()} && chunks > 1;
  if (!few) {
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, rows.vocab));
    torch::stable::parallel_for(0, rows.count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if (f.token_ids[r] == f.ignore_index) {
          f.ignore(r);
          continue;
        }
        const T* row = logits + rows.offset(r);
        finish_row(row, r, [&](int64_t c) { return chunk_state(row, c); });
      }
    });
    return;
  }
  std::vector<RowState> states(rows.count * chunks);
  torch::stable::parallel_for(0, rows.count * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / chunks;
      if (f.token_ids[r] == f.ignore_index) continue;
      states[i] = chunk_state(logits + rows.offset(r), i % chunks);
    }
  });
  for (int64_t r = 0; r < rows.count; ++r) {
    if (f.token_ids[r] == f.ignore_index) {
      f.ignore(r);
    } else {
      finish_row(logits + rows.offset(r), r, [&](int64_t c) { return states[r * chunks + c]; });
    }
  }
}

void check_forward(const LogitRows& rows, const Tensor& token_ids) {
  STD_TORCH_CHECK(rows.vocab > 0, "token_logprobs: the vocabulary is empty");
  STD_TORCH_CHECK(token_ids.scalar_type() == ScalarType::Long && token_ids.is_contiguous() &&
                      token_ids.numel() == rows.count,
                  "token_logprobs: token_ids must be contiguous int64, one per row of logits");
}

Tensor token_logprobs_state_cpu(const Tensor& logits, const Tensor& token_ids, double temperature,
                                int64_t ignore_index, int64_t vocab_start, bool return_entropy) {
  const LogitRows rows(logits);
  check_forward(rows, token_ids);
  Tensor state = empty_cpu({rows.count, State::kSize}, ScalarType::Double);
  const State f{ptr<int64_t>(token_ids),   temperature, ignore_index, vocab_start, return_entropy,
                mutable_ptr<double>(state)};
  dispatch(logits,
           [&](auto dtype, const auto& k) { forward(ptr<decltype(dtype)>(logits), rows, k, f); });
  return state;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprobs_fwd_cpu(
    const Tensor& logits, const Tensor& token_ids, double temperature, int64_t ignore_index,
    bool return_entropy, bool /*inplace_backward: autograd's affair*/) {
  const LogitRows rows(logits);
  check_forward(rows, token_ids);
  const LogprobOutputs outputs(token_ids, return_entropy);
  const Forward f = outputs.forward(token_ids, temperature, ignore_index, return_entropy);
  dispatch(logits,
           [&](auto dtype, const auto& k) { forward(ptr<decltype(dtype)>(logits), rows, k, f); });
  return outputs.all();
}

struct Saved {
  const std::optional<Tensor>&grad_logprobs, &grad_entropy;
  const Tensor &token_ids, &logprobs;
  const std::optional<Tensor>& entropy;
  const Tensor &row_max, &log_total;
};

void check_saved(const Saved& s, const LogitRows& rows) {
  const auto check = [&](const Tensor& t, ScalarType dtype) {
    STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous() && t.numel() == rows.count,
                    "token_logprobs: the backward pass takes contiguous tensors, a number per row");
  };
  check(s.token_ids, ScalarType::Long);
  for (const Tensor* t : {&s.logprobs, &s.row_max, &s.log_total}) check(*t, ScalarType::Float);
  for (const auto* t : {&s.grad_logprobs, &s.grad_entropy, &s.entropy}) {
    if (*t) check(**t, ScalarType::Float);
  }
  STD_TORCH_CHECK(!s.grad_entropy || s.entropy, "token_logprobs: the entropy was not computed");
}

void backward(const Tensor& logits, const Saved& s, double temperature, int64_t ignore_index,
              int64_t vocab_start, const LogitRows& in, const Tensor& grad, const LogitRows& out) {
  check_saved(s, in);
  const auto* g = ptr<float>(s.grad_logprobs);
  const auto* h = ptr<float>(s.grad_entropy);
  const auto* entropy = ptr<float>(s.entropy);
  const auto* ids = ptr<int64_t>(s.token_ids);
  const auto* logprobs = ptr<float>(s.logprobs);
  const auto *row_max = ptr<float>(s.row_max), *log_total = ptr<float>(s.log_total);
  dispatch(logits, [&](auto dtype, const auto& k) {
    using T = decltype(dtype);
    const T* x = ptr<T>(logits);
    T* d = mutable_ptr<T>(grad);
    const bool stream = x != d && in.count * in.vocab * int64_t{sizeof(T)} > kCachedBytes;
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, in.vocab));
    torch::stable::parallel_for(0, in.count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* const row = d + out.offset(r);
        if (ids[r] == ignore_index) {
          std::memset(static_cast<void*>(row), 0, in.vocab * sizeof(T));
          continue;
        }
        const bool is_defined = logprobs[r] == logprobs[r];  // not for a wild id
        k.row_grad(x + in.offset(r), in.vocab,
                   {is_defined ? (g ? g[r] : 0.0) : kNan, h ? h[r] : 0.0, logprobs[r], row_max[r],
                    log_total[r], h ? entropy[r] : 0.0, temperature,
                    column_of(ids[r], vocab_start, in.vocab), stream},
                   row);
      }
    });
  });
}

Tensor token_logprobs_bwd_cpu(const std::optional<Tensor>& grad_logprobs,
                              const std::optional<Tensor>& grad_entropy, const Tensor& logits,
                              const Tensor& token_ids, const Tensor& logprobs,
                              const std::optional<Tensor>& entropy, const Tensor& row_max,
                              const Tensor& log_total, double temperature, int64_t ignore_index,
                              int64_t vocab_start) {
  const LogitRows rows(logits);
  Tensor grad = empty_cpu(shape_of(logits), logits.scalar_type());
  backward(logits, {grad_logprobs, grad_entropy, token_ids, logprobs, entropy, row_max, log_total},
           temperature, ignore_index, vocab_start, rows, grad, LogitRows(grad));
  return grad;
}

void token_logprobs_bwd_inplace_cpu(const std::optional<Tensor>& grad_logprobs,
                                    const std::optional<Tensor>& grad_entropy, Tensor logits,
                                    const Tensor& token_ids, const Tensor& logprobs,
                                    const std::optional<Tensor>& entropy, const Tensor& row_max,
                                    const Tensor& log_total, double temperature,
                                    int64_t ignore_index, int64_t vocab_start) {
  const LogitRows rows(logits);
  backward(logits, {grad_logprobs, grad_entropy, token_ids, logprobs, entropy, row_max, log_total},
           temperature, ignore_index, vocab_start, rows, logits, rows);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) {
  m.impl("token_logprobs_fwd", TORCH_BOX(&token_logprobs_fwd_cpu));
  m.impl("token_logprobs_state", TORCH_BOX(&token_logprobs_state_cpu));
  m.impl("token_logprobs_bwd", TORCH_BOX(&token_logprobs_bwd_cpu));
  m.impl("token_logprobs_bwd_", TORCH_BOX(&token_logprobs_bwd_inplace_cpu));
}

}  // namespace fastrl

// Rows of logits, and what their chunks' states add up to: shared by the ops that must give a row
// the same log-probability, bit for bit.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace fastrl {

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Rows of a [..., V] tensor whose last axis is dense; leading axes may have any strides, so that
// logits[:, :-1] needs no copy.
struct LogitRows {
  std::vector<int64_t> sizes, strides;
  int64_t count = 1, vocab;

  explicit LogitRows(const Tensor& logits) : sizes(shape_of(logits)) {
    const auto s = logits.strides();
    STD_TORCH_CHECK(!sizes.empty() && (sizes.back() <= 1 || s[sizes.size() - 1] == 1),
                    "fastrl: logits must be dense along the vocabulary");
    vocab = sizes.back();
    sizes.pop_back();
    strides.assign(s.begin(), s.begin() + sizes.size());
    for (const int64_t size : sizes) count *= size;
  }

  int64_t offset(int64_t row) const {
    int64_t at = 0;
    for (size_t axis = sizes.size(); axis-- > 0;) {
      at += row % sizes[axis] * strides[axis];
      row /= sizes[axis];
    }
    return at;
  }
};

inline void merge(RowState& s, const RowState& next, double scale) {
  const double m = std::fmax(s.max, next.max);
  RowState merged;
  merged.max = m;
  for (const RowState& part : {s, next}) {
    if (part.max == m || part.count == 0) {  // count 0: nothing finite, but perhaps a NaN in rest
      merged.rest += part.rest;
      merged.count += part.count;
      merged.weighted += part.weighted;
    } else {
      const double shrink = std::exp((part.max - m) * scale);
      merged.rest += shrink * (part.rest + part.count);
      merged.weighted += shrink * (part.weighted + (m - part.max) * (part.rest + part.count));
    }
  }
  s = merged;
}

// Where id stands among `vocab` columns that begin at vocab_start; -1: not among them.
inline int64_t column_of(int64_t id, int64_t vocab_start, int64_t vocab) {
  const uint64_t at = static_cast<uint64_t>(id) - static_cast<uint64_t>(vocab_start);
  return at < static_cast<uint64_t>(vocab) ? static_cast<int64_t>(at) : -1;
}

struct Forward {
  const int64_t* token_ids;
  double temperature;
  int64_t ignore_index;
  bool return_entropy;
  float *logprobs, *entropy, *row_max, *log_total;

  template <class T>
  void finish(const T* logits, int64_t vocab, int64_t row, const RowState& s) const {
    const double total_log = std::log1p(s.rest + (s.count - 1.0));
    const int64_t column = column_of(token_ids[row], 0, vocab);
    const double logit = column < 0 ? kNan : value(logits[column]);  // a wild id is not read
    // -inf everywhere is no distribution: NaN, as -inf - -inf gives it.
    logprobs[row] = static_cast<float>((logit - s.max) / temperature - total_log);
    if (return_entropy) {
      const double mean_gap = s.weighted / (s.rest + s.count) / temperature;
      entropy[row] = static_cast<float>(total_log + mean_gap);
    }
    row_max[row] = static_cast<float>(s.max);
    log_total[row] = static_cast<float>(total_log);
  }

  void ignore(int64_t row) const {
    logprobs[row] = row_max[row] = log_total[row] = 0.0f;
    if (return_entropy) entropy[row] = 0.0f;
  }

  static double value(float x) { return x; }
  static double value(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof(f));
    return f;
  }
  static double value(Half x) {
    const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    const double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                             : exponent == 0 ? std::ldexp(fraction, -24)
                                             : std::ldexp(1024 + fraction, exponent - 25);
    return x.bits & 0x8000 ? -magnitude : magnitude;
  }
};

// logprobs, entropy (empty unless asked for), row max and log total, shaped like token_ids.
struct LogprobOutputs {
  Tensor logprobs, entropy, row_max, log_total;

  LogprobOutputs(const Tensor& token_ids, bool return_entropy)
      : logprobs(empty_cpu(shape_of(token_ids), ScalarType::Float)),
        entropy(empty_cpu(return_entropy ? shape_of(token_ids) : std::vector<int64_t>{0},
                          ScalarType::Float)),
        row_max(empty_cpu(shape_of(token_ids), ScalarType::Float)),
        log_total(empty_cpu(shape_of(token_ids), ScalarType::Float)) {}

  Forward forward(const Tensor& token_ids, double temperature, int64_t ignore_index,
                  bool return_entropy) const {
    return {ptr<int64_t>(token_ids),
            temperature,
            ignore_index,
            return_entropy,
            mutable_ptr<float>(logprobs),
            mutable_ptr<float>(entropy),
            mutable_ptr<float>(row_max),
            mutable_ptr<float>(log_total)};
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor> all() const {
    return {logprobs, entropy, row_max, log_total};
  }
};

template <class Body>
void dispatch(const Tensor& logits, Body body) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return body(float{}, kernels().logprobs_f32);
    case ScalarType::BFloat16:
      return body(BFloat16{}, kernels().logprobs_bf16);
    case ScalarType::Half:
      return body(Half{}, kernels().logprobs_f16);
    default:
      STD_TORCH_CHECK(false, "token_logprobs: logits must be float32, bfloat16 or float16");
  }
}

}  // namespace fastrl

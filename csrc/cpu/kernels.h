// The CPU kernels behind the ops, as plain functions of raw pointers, one table per instruction
// set.
#pragma once

#include <cstdint>

namespace fastrl {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// What one stretch of a vocabulary row adds up to. The maximum stays out of the sum, so that a
// token with p -> 1 keeps its digits: `rest` sums exp((x - max) / temperature) over x < max only.
struct RowState {
  double max = -__builtin_inf();
  double rest = 0.0;
  double count = 0.0;     // entries equal to max
  double weighted = 0.0;  // sum of exp((x - max) / temperature) * (max - x), in logits
};

struct TokenLogprobsGrad {
  double grad_logprob, grad_entropy;
  double logprob, max, log_total, entropy;  // as the forward pass gave them
  double temperature;
  int64_t token_id;  // -1: not among these columns
  bool stream;       // the gradient is too large to stay in a cache
};

// One trajectory, or a row of a batch of them: `length` steps behind each pointer.
// A null pointer means that the argument was not given.
template <class T>
struct Trajectory {
  int64_t length;
  const T *rewards, *values, *next_values, *bootstrap_value;
  const uint8_t *terminated, *truncated, *mask;
  const T *gamma, *gae_lambda;  // per step; null: the two numbers below
  double constant_gamma, constant_lambda;
};

template <class T>
struct Kernels {
  void (*gae)(const Trajectory<T>&, T* advantages, T* returns);
  void (*lambda_returns)(const Trajectory<T>&, T* returns);
  void (*discounted_returns)(const Trajectory<T>&, T* returns);
  // grad_next: what flows to next_values, or to `values` one step later when those are null.
  void (*returns_bwd)(const Trajectory<T>&, bool td, const T* grad, T* grad_rewards, T* grad_next,
                      T* grad_bootstrap);
};

template <class T>
struct LogprobKernels {
  // The state of logits[0, n), n <= kVocabChunk.
  RowState (*chunk_state)(const T* logits, int64_t n, double temperature, bool entropy);
  // Writes d/dlogits of one row; grad may be logits itself.
  void (*row_grad)(const T* logits, int64_t n, const TokenLogprobsGrad& row, T* grad);
};

// The ids of a row that may be drawn: those whose logit is above `lowest`, and of those equal to it
// the ids up to last_id. A logit of -inf is never kept, nor is any if `lowest` is NaN.
struct Kept {
  float lowest = -__builtin_inff();
  int64_t last_id = -1;

  Kept from(int64_t first_id) const { return {lowest, last_id - first_id}; }
};

// Masses are exp((x - max) / temperature).
struct RowScale {
  float max;
  double temperature;
};

// What falls into one of kBins equal stretches of (max - x) / temperature, the last one endless.
// kSpareBins more, which nobody reads, take what is not counted.
struct Bin {
  double mass, count;
};
constexpr int kBins = 2048, kSpareBins = 16;

constexpr int64_t kSampleBlock = 256;  // columns; divides kVocabChunk

// Here ids count from the first of the n logits, and row max is finite.
template <class T>
struct SampleKernels {
  // The masses of the kept logits, 0 for the others, and their sum; n <= kSampleBlock, the size of
  // masses.
  double (*kept_block)(const T* logits, int64_t n, const Kept& kept, const RowScale& scale,
                       float* masses);
  double (*kept_mass)(const T* logits, int64_t n, const Kept& kept, const RowScale& scale);
  // The maximum of each kSampleBlock columns.
  void (*block_maxima)(const T* logits, int64_t n, float* maxima);
  // Those of at least `floor`.
  void (*add_to_bins)(const T* logits, int64_t n, float floor, const RowScale& scale, Bin* bins);
  // The ids of those in one bin, and how many; n <= kSampleBlock, the size of ids.
  int64_t (*list_bin)(const T* logits, int64_t n, const RowScale& scale, int bin, int64_t* ids);
  int64_t (*count_kept)(const T* logits, int64_t n, const Kept& kept);
  // The kept ids plus first_id, ascending, and how many.
  int64_t (*list_kept)(const T* logits, int64_t n, const Kept& kept, int64_t first_id,
                       int64_t* ids);
};

struct KernelTable {
  const char* name;
  LogprobKernels<float> logprobs_f32;
  LogprobKernels<BFloat16> logprobs_bf16;
  LogprobKernels<Half> logprobs_f16;
  SampleKernels<float> sample_f32;
  SampleKernels<BFloat16> sample_bf16;
  SampleKernels<Half> sample_f16;
  Kernels<float> returns_f32;
  Kernels<double> returns_f64;
};

// A row is summed in stretches of this many columns, whoever computes them: the result depends
// neither on the number of threads nor on the rest of the batch.
constexpr int64_t kVocabChunk = 32768;

const KernelTable* kernels_avx512();  // null where this build has none for the processor's family
const KernelTable* kernels_avx2();
const KernelTable* kernels_plain();

const KernelTable& kernels();           // the widest that this processor runs
bool select_kernels(const char* name);  // for tests; false if this processor cannot run it

}  // namespace fastrl

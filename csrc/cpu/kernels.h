// The CPU kernels behind the ops, as plain functions of raw pointers, one table per instruction
// set.
#pragma once

#include <cstdint>

#include "returns_kernels.h"

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

// What attention computes in: float, but double for double.
template <class T>
struct WideOf {
  typedef float Type;
};
template <>
struct WideOf<double> {
  typedef double Type;
};
template <class T>
using Wide = typename WideOf<T>::Type;

constexpr int kDecodeChunk = 512;   // keys; a query's sums over each are merged in their order
constexpr int kDecodeQueries = 64;  // that are taken through a chunk together
constexpr int64_t kDecodeTile = 64;

// A width rounded up to whole vectors of every instruction set.
constexpr int64_t padded_width(int64_t width) { return (width + 15) / 16 * 16; }
// sum exp(s_j - max) value_j [padded_width], and behind it max and sum exp(s_j - max).
constexpr int64_t decode_partial_size(int64_t width) { return padded_width(width) + 16; }
constexpr int64_t decode_scratch_size(int64_t width) {
  return padded_width(width) * 2 * (kDecodeQueries + kDecodeTile) + 4 * kDecodeTile;
}

// Queries that see some of the keys of a chunk, and where their sums go. Keys count from the
// chunk's first.
template <class T>
struct DecodeBlock {
  const T *keys, *values;
  int64_t key_stride, value_stride, width;
  int count;  // of keys that exist
  int num_queries;
  bool is_lone;  // one query, in whatever batch
  const T* query[kDecodeQueries];
  int from[kDecodeQueries], to[kDecodeQueries];  // the keys that each query sees
  Wide<T>* partial[kDecodeQueries];
  double scale, softcap;  // softcap 0: none
};

// Partial sums of one query, `stride` apart.
template <class T>
struct DecodePartials {
  const Wide<T>* first;
  int64_t stride, count;
};

template <class T>
struct DecodeKernels {
  // scratch: decode_scratch_size, and 64-byte aligned.
  void (*attend)(const DecodeBlock<T>&, Wide<T>* scratch);
  // A query's output and log-sum-exp from its two runs of partial sums, those of the prefix first;
  // weights: room for a number for each of them.
  void (*merge)(const DecodePartials<T> runs[2], int64_t width, Wide<T>* weights, T* output,
                Wide<T>* lse);
};

constexpr int64_t kAttentionRows = 128;  // queries that are taken through a tile together

struct AttentionSpan {
  int64_t first, last;
};

struct KeyRun;
// Of each query of a run the keys that it sees: [from, to), counted from the run's first.
void list_seen(const KeyRun& run, int32_t* from, int32_t* to);

// A run of keys. The last five are for the backward pass, in which all runs of a tree have the same
// room for from and to: they are listed for one at a time.
template <class T>
struct AttentionRun {
  const T *keys, *values;
  int64_t key_stride, value_stride, count;
  int32_t *from, *to;
  int64_t first_row = 0, rows = 0;                    // those that see the run
  Wide<T>*grad_key = nullptr, *grad_value = nullptr;  // [count, padded_width]
  const KeyRun* run = nullptr;
};

// Queries that share a head of keys.
template <class T>
struct AttentionBlock {
  int64_t width, rows;
  double scale, softcap;  // softcap 0: none
  const T* query[kAttentionRows];
  T* output[kAttentionRows];
  Wide<T>* lse[kAttentionRows];
};

// All queries of a head that see the same runs, `rows` of them.
template <class T>
struct AttentionHead {
  int64_t width, rows;
  double scale, softcap;
  const T *query, *grad_output, *output;  // grad_output may be null
  int64_t query_stride, grad_stride, output_stride;
  const Wide<T>*lse, *grad_lse;  // grad_lse may be null
  T* grad_query;                 // null where it is not needed
  int64_t grad_query_stride;
  bool needs_key, needs_value, needs_scores;
};

constexpr int64_t attention_scratch_size(int64_t width) {
  return 2 * padded_width(width) * (kAttentionRows + kDecodeTile) + 4 * kDecodeTile;
}
constexpr int64_t attention_grad_scratch_size(int64_t width, int64_t rows) {
  return padded_width(width) * (5 * kDecodeTile + 3 * rows) + 64 * kDecodeTile + rows;
}

template <class T>
struct AttentionKernels {
  // scratch: of the size above, and 64-byte aligned.
  void (*forward)(const AttentionBlock<T>&, const AttentionRun<T>* runs, int64_t num_runs,
                  Wide<T>* scratch);
  void (*backward)(const AttentionHead<T>&, const AttentionRun<T>* runs, int64_t num_runs,
                   Wide<T>* scratch);
  void (*sum_heads)(Wide<T>* rows, int64_t head_stride, int64_t count, int64_t width, T* out);
};

struct KernelTable {
  const char* name;
  LogprobKernels<float> logprobs_f32;
  LogprobKernels<BFloat16> logprobs_bf16;
  LogprobKernels<Half> logprobs_f16;
  SampleKernels<float> sample_f32;
  SampleKernels<BFloat16> sample_bf16;
  SampleKernels<Half> sample_f16;
  DecodeKernels<float> decode_f32;
  DecodeKernels<double> decode_f64;
  DecodeKernels<BFloat16> decode_bf16;
  DecodeKernels<Half> decode_f16;
  AttentionKernels<float> attention_f32;
  AttentionKernels<double> attention_f64;
  AttentionKernels<BFloat16> attention_bf16;
  AttentionKernels<Half> attention_f16;
  ReturnsKernels returns;
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

// sample_tokens on the CPU: one pass for the masses of a row's chunks, and another look into the
// chunk that u falls into. A small top_k adds a pass for the blocks' maxima, any other truncation a
// histogram of masses, and a look at where it ends.
#include <tuple>

#include "sampling.h"

namespace fastrl {
namespace {

// The upper 24 bits of Philox-4x32-10's first word: fastrl/reference/_philox.py, for float32.
double uniform(uint64_t seed, uint64_t step) {
  uint32_t c0 = static_cast<uint32_t>(step), c1 = static_cast<uint32_t>(step >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return (c0 >> 8) * 0x1p-24;
}

struct Sampler {
  const int64_t* seeds;
  uint64_t step;
  double temperature;
  bool greedy;
  Truncation cut;
  int64_t* token_ids;
  float *logprobs, *lowest;
  int64_t* last_id;

  // scratch.states holds those of the row's chunks.
  template <class T>
  void sample(const T* x, int64_t vocab, int64_t r, Scratch& scratch) const {
    RowState state = scratch.states[0];
    for (size_t c = 1; c < scratch.states.size(); ++c) {
      merge(state, scratch.states[c], 1.0 / temperature);
    }
    const RowScale scale{static_cast<float>(state.max), temperature};
    const LogitRow<T> row{x, vocab, scale, state.rest + state.count, sample_kernels<T>()};
    Kept kept{kNan, -1};  // without a distribution, any id: 0, of which finish() makes NaN
    token_ids[r] = 0;
    if (std::isfinite(state.max) && std::isfinite(state.rest)) {
      const bool all = cut.top_k >= vocab && cut.top_p >= 1.0;
      kept = all ? Kept{} : truncate(row, cut, scratch);
      token_ids[r] = greedy ? first_maximum(row) : draw_from(row, kept, all, r, scratch);
    }
    lowest[r] = kept.lowest;
    last_id[r] = kept.last_id;
    float max, log_total;
    const Forward one{token_ids + r, temperature, -1,   false,
                      logprobs + r,  nullptr,     &max, &log_total};
    one.finish(x, vocab, 0, state);
  }

  template <class T>
  int64_t draw_from(const LogitRow<T>& row, const Kept& kept, bool all, int64_t r,
                    Scratch& scratch) const {
    const double u = uniform(static_cast<uint64_t>(seeds[r]), step);
    if (!all && scratch.listed) return draw_listed(scratch.entries, u);
    scratch.masses.clear();
    for (size_t c = 0; c < scratch.states.size(); ++c) {
      const RowState& s = scratch.states[c];
      const int64_t start = c * kVocabChunk;
      scratch.masses.push_back(
          all ? (s.rest + s.count) * (s.max == row.scale.max ? 1.0 : row.mass(s.max))
              : row.k.kept_mass(row.x + start, std::min(kVocabChunk, row.vocab - start),
                                kept.from(start), row.scale));
    }
    return draw(row, kept, scratch.masses, u);
  }
};

template <class T>
void sample(const T* logits, const LogitRows& rows, const LogprobKernels<T>& k,
            const Sampler& sampler) {
  const int64_t chunks = (rows.vocab + kVocabChunk - 1) / kVocabChunk;
  const auto chunk_state = [&](const T* row, int64_t chunk) {
    const int64_t start = chunk * kVocabChunk;
    const int64_t n = std::min(kVocabChunk, rows.vocab - start);
    return k.chunk_state(row + start, n, sampler.temperature, false);
  };
  const bool few = rows.count < 4 * int64_t{torch::stable::get_num_threads()} && chunks > 1;
  std::vector<RowState> shared(few ? rows.count * chunks : 0);
  if (few) {  // a row is too much for one thread: they share its chunks
    torch::stable::parallel_for(0, rows.count * chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        shared[i] = chunk_state(logits + rows.offset(i / chunks), i % chunks);
      }
    });
  }
  const int64_t grain = std::max<int64_t>(1, 32768 / rows.vocab);
  torch::stable::parallel_for(0, rows.count, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    scratch.states.resize(chunks);
    for (int64_t r = begin; r < end; ++r) {
      const T* row = logits + rows.offset(r);
      for (int64_t c = 0; c < chunks; ++c) {
        scratch.states[c] = few ? shared[r * chunks + c] : chunk_state(row, c);
      }
      sampler.sample(row, rows.vocab, r, scratch);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_tokens_cpu(const Tensor& logits,
                                                             const Tensor& seeds, int64_t step,
                                                             double temperature,
                                                             std::optional<int64_t> top_k,
                                                             std::optional<double> top_p) {
  const LogitRows rows(logits);
  STD_TORCH_CHECK(rows.vocab > 0, "sample_tokens: the vocabulary is empty");
  STD_TORCH_CHECK(seeds.scalar_type() == ScalarType::Long && seeds.is_contiguous() &&
                      seeds.numel() == rows.count,
                  "sample_tokens: seeds must be contiguous int64, one per row of logits");
  STD_TORCH_CHECK(temperature >= 0.0 && top_k.value_or(1) >= 1 && top_p.value_or(1.0) > 0.0,
                  "sample_tokens: expected temperature >= 0, top_k >= 1 and top_p > 0");
  auto shape = shape_of(logits);
  shape.pop_back();
  Tensor token_ids = empty_cpu(shape, ScalarType::Long);
  Tensor logprobs = empty_cpu(shape, ScalarType::Float);
  Tensor lowest = empty_cpu(shape, ScalarType::Float);
  Tensor last_id = empty_cpu(shape, ScalarType::Long);
  const bool greedy = temperature == 0.0;
  const Sampler sampler{ptr<int64_t>(seeds),
                        static_cast<uint64_t>(step),
                        greedy ? 1.0 : temperature,
                        greedy,
                        {top_k.value_or(rows.vocab), top_p.value_or(1.0)},
                        mutable_ptr<int64_t>(token_ids),
                        mutable_ptr<float>(logprobs),
                        mutable_ptr<float>(lowest),
                        mutable_ptr<int64_t>(last_id)};
  dispatch(logits, [&](auto dtype, const auto& k) {
    sample(ptr<decltype(dtype)>(logits), rows, k, sampler);
  });
  return {token_ids, logprobs, lowest, last_id};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) {
  m.impl("sample_tokens", TORCH_BOX(&sample_tokens_cpu));
}

}  // namespace fastrl

// The backward pass of attention for one head of queries of a tree, at one instruction set's width:
//
//     p_ij = exp(s_ij - lse_i),  delta_i = <grad_output_i, output_i> - grad_lse_i
//     grad_s_ij = p_ij (<grad_output_i, value_j> - delta_i),  times 1 - (s_ij / softcap)^2
//
// An output of 16 bits is too coarse for delta where keys or values have a mean: what is left of
// grad_s is then far smaller than its terms. For it <grad_output_i, output_i> is taken as
// sum_j p_ij <grad_output_i, value_j>, at two more products.
//
// Tile of keys by tile, for each of these the blocks of queries that see some of it. Included by
// kernels_*.cpp after attention_kernel.h.

namespace fastrl::FASTRL_SIMD {

constexpr int64_t kGradRows = 32;  // of queries whose weights are kept for the gradients of keys

// sums[r][d] += sum_j weights[r][j] rows[j][d], for C vectors from d; weights of either order.
template <int R, int C, int kRowStep, int kStep, class Vec, int N, class Num>
FASTRL_INLINE void add_rows(const Num* weights, const Num* rows, int64_t stride, int64_t count,
                            Num* sums, int64_t sum_stride) {
  Vec sum[R][C] = {};
  for (int64_t j = 0; j < count; ++j) {
    Vec x[C];
    for (int c = 0; c < C; ++c) x[c] = load_wide(rows + j * stride + c * N);
    for (int r = 0; r < R; ++r) {
      const Vec w = splat_like(Vec{}, weights[r * kRowStep + j * kStep]);
      for (int c = 0; c < C; ++c) sum[r][c] += w * x[c];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      Num* const at = sums + r * sum_stride + c * N;
      store_wide(at, load_wide(at) + sum[r][c]);
    }
  }
}

template <class T>
struct HeadGrads {
  typedef typename DecodeVectors<T>::Vec Vec;
  typedef Wide<T> Num;
  static constexpr int N = DecodeVectors<T>::kLanesOf;
  static constexpr bool kCoarse = !std::is_same_v<T, Num>;

  const AttentionHead<T>& h;
  const DecodeExp exp;
  int64_t wide, vectors;
  Num *query, *grad, *grad_query, *delta;           // of all queries
  Num *keys, *values, *packed, *of_key, *of_value;  // of a tile
  Num *p, *grad_s;                                  // [kGradRows, kDecodeTile]

  HeadGrads(const AttentionHead<T>& head, Num* scratch)
      : h(head), wide(padded_width(head.width)), vectors((head.width + N - 1) / N) {
    const auto take = [&](int64_t size) {
      Num* const start = scratch;
      scratch += size;
      return start;
    };
    for (Num** tile : {&keys, &values, &packed, &of_key, &of_value}) {
      *tile = take(kDecodeTile * wide);
    }
    p = take(kGradRows * kDecodeTile), grad_s = take(kGradRows * kDecodeTile);
    for (Num** rows : {&query, &grad, &grad_query}) *rows = take(h.rows * wide);
    delta = take(h.rows);
    __builtin_memset(grad_query, 0, h.rows * wide * sizeof(Num));
    for (int64_t i = 0; i < h.rows; ++i) pack(i);
  }

  void pack(int64_t i) {
    pack_row(h.query + i * h.query_stride, h.width, query + i * wide);
    Vec sum = {};
    if (h.grad_output) {
      const T *g = h.grad_output + i * h.grad_stride, *output = h.output + i * h.output_stride;
      pack_row(g, h.width, grad + i * wide);
      for (int64_t d = 0; d < h.width; d += N) {
        sum += load_wide(grad + i * wide + d) * load_part(output, d, h.width);
      }
    } else {
      __builtin_memset(grad + i * wide, 0, wide * sizeof(Num));
    }
    delta[i] = h.grad_lse ? -h.grad_lse[i] : Num(0);
    if (!kCoarse) delta[i] += total_of(sum);
  }

  static Num total_of(Vec sum) {
    Num total = 0;
    for (int l = 0; l < N; ++l) total += sum[l];
    return total;
  }

  // What R queries see of a tile adds to their delta.
  template <int R>
  FASTRL_INLINE void add_delta(const AttentionRun<T>& run, int64_t r, int64_t tile,
                               int64_t count) const {
    const int32_t *from = run.from + r, *to = run.to + r;
    const auto [first, last] = seen_by<R, N>(from, to, tile, count);
    if (first >= last) return;
    const int64_t limit = (last - first + N - 1) / N * N, start = tile + first;
    const int64_t i = run.first_row + r;
    multiply_keys<R, Vec, N>(query + i * wide, wide, keys + first, h.width, limit, p);
    multiply_keys<R, Vec, N>(grad + i * wide, wide, values + first, h.width, limit, grad_s);
    for (int64_t k = 0; k < R; ++k) {
      Num* const grad_row = grad_s + k * kDecodeTile;
      weigh<true>(i + k, limit, std::clamp<int64_t>(from[k] - start, 0, limit),
                  std::clamp<int64_t>(to[k] - start, 0, limit), p + k * kDecodeTile, grad_row);
      Vec sum = {};
      for (int64_t j = 0; j < limit; j += N) sum += load_wide(grad_row + j);
      delta[i + k] += total_of(sum);
    }
  }

  void add_deltas(const AttentionRun<T>& run) const {
    for (int64_t tile = 0; tile < run.count; tile += kDecodeTile) {
      const int64_t count = std::min(kDecodeTile, run.count - tile);
      pack_columns(run.keys + tile * run.key_stride, run.key_stride, count, h.width, keys);
      pack_columns(run.values + tile * run.value_stride, run.value_stride, count, h.width, values);
      for (int64_t r = 0; r < run.rows; r += kGradRows) {
        const int64_t end = std::min(r + kGradRows, run.rows);
        if (!sees(run, r, end - r, tile, count)) continue;
        int64_t i = r;
        for (; i + kTogether <= end; i += kTogether) add_delta<kTogether>(run, i, tile, count);
        for (; i < end; ++i) add_delta<1>(run, i, tile, count);
      }
    }
  }

  // The first `limit` scores of a row become p, and <grad_output, value> becomes grad_s; of
  // delta's terms, p <grad_output, value>.
  template <bool kTerms = false>
  FASTRL_INLINE void weigh(int64_t i, int64_t limit, int64_t from, int64_t to, Num* row,
                           Num* grad_row) const {
    const Num scale = static_cast<Num>(h.scale), softcap = static_cast<Num>(h.softcap);
    const Vec lse = splat_like(Vec{}, h.lse[i]);
    const Vec shift = splat_like(Vec{}, kTerms ? Num(0) : delta[i]);
    for (int64_t j = 0; j < limit; j += N) {
      Vec s = load_wide(row + j) * scale, slope = splat_like(Vec{}, scale);
      if (softcap != 0) {
        slope = tanh_slope(s / softcap, exp) * scale;
        s = tanh_of(s / softcap, exp) * softcap;
      }
      const Vec weight = exp(s - lse);
      store_wide(row + j, weight);
      const Vec terms = (load_wide(grad_row + j) - shift) * weight;
      store_wide(grad_row + j, kTerms ? terms : terms * slope);
    }
    for (int64_t j = 0; j < std::min(from, limit); ++j) row[j] = grad_row[j] = 0;
    for (int64_t j = to; j < limit; ++j) row[j] = grad_row[j] = 0;
  }

  template <int R, int kRowStep, int kStep>
  FASTRL_INLINE void add(const Num* weights, const Num* rows, int64_t stride, int64_t count,
                         Num* sums) const {
    int64_t c = 0;
    for (; c + kVectors <= vectors; c += kVectors) {
      add_rows<R, kVectors, kRowStep, kStep, Vec, N>(weights, rows + c * N, stride, count,
                                                     sums + c * N, wide);
    }
    for (; c < vectors; ++c) {
      add_rows<R, 1, kRowStep, kStep, Vec, N>(weights, rows + c * N, stride, count, sums + c * N,
                                              wide);
    }
  }

  // p and grad_s of R queries, and the gradient of these; gives the keys that they see.
  template <int R>
  FASTRL_INLINE AttentionSpan weigh_group(const AttentionRun<T>& run, int64_t r, int64_t i,
                                          int64_t at, int64_t tile, int64_t count,
                                          const WideRows<T>& key_rows) const {
    const int32_t *from = run.from + r, *to = run.to + r;
    const auto [first, last] = seen_by<R, N>(from, to, tile, count);
    Num *const weights = p + at * kDecodeTile, *const grads = grad_s + at * kDecodeTile;
    __builtin_memset(weights, 0, R * kDecodeTile * sizeof(Num));
    __builtin_memset(grads, 0, R * kDecodeTile * sizeof(Num));
    if (first >= last) return {kDecodeTile, 0};
    const int64_t limit = (last - first + N - 1) / N * N, start = tile + first;
    multiply_keys<R, Vec, N>(query + i * wide, wide, keys + first, h.width, limit, weights + first);
    if (h.needs_scores) {
      multiply_keys<R, Vec, N>(grad + i * wide, wide, values + first, h.width, limit,
                               grads + first);
    }
    for (int64_t k = 0; k < R; ++k) {
      weigh(i + k, limit, std::clamp<int64_t>(from[k] - start, 0, limit),
            std::clamp<int64_t>(to[k] - start, 0, limit), weights + k * kDecodeTile + first,
            grads + k * kDecodeTile + first);
    }
    if (h.grad_query) {
      add<R, kDecodeTile, 1>(grads + first, key_rows.data + first * key_rows.stride,
                             key_rows.stride, last - first, grad_query + i * wide);
    }
    return {first, last};
  }

  // Without a way out: most blocks of a long row see nothing of a tile, and this is all they cost.
  static bool sees(const AttentionRun<T>& run, int64_t r, int64_t num_rows, int64_t tile,
                   int64_t count) {
    const int32_t *from = run.from + r, *to = run.to + r;
    const int32_t first = static_cast<int32_t>(tile), end = static_cast<int32_t>(tile + count);
    int32_t any = 0;
    for (int64_t i = 0; i < num_rows; ++i) {
      any |= (from[i] < to[i]) & (to[i] > first) & (from[i] < end);
    }
    return any != 0;
  }

  // A block of queries, from row r of a run on.
  void add_block(const AttentionRun<T>& run, int64_t r, int64_t num_rows, int64_t tile,
                 int64_t count, const WideRows<T>& key_rows) const {
    if (!sees(run, r, num_rows, tile, count)) return;
    const int64_t i = run.first_row + r;
    AttentionSpan seen = {kDecodeTile, 0}, rows = {num_rows, 0};
    const auto include = [&](int64_t at, int64_t together, const AttentionSpan& span) {
      if (span.first >= span.last) return;
      seen = {std::min(seen.first, span.first), std::max(seen.last, span.last)};
      rows = {std::min(rows.first, at), at + together};
    };
    int64_t at = 0;
    for (; at + kTogether <= num_rows; at += kTogether) {
      include(at, kTogether,
              weigh_group<kTogether>(run, r + at, i + at, at, tile, count, key_rows));
    }
    for (; at < num_rows; ++at) {
      include(at, 1, weigh_group<1>(run, r + at, i + at, at, tile, count, key_rows));
    }
    const int64_t used = rows.last - rows.first, row = i + rows.first;
    for (int64_t j = seen.first / kTogether * kTogether; j < seen.last; j += kTogether) {
      const int64_t from = rows.first * kDecodeTile + j;
      if (h.needs_value) {
        add<kTogether, 1, kDecodeTile>(p + from, grad + row * wide, wide, used,
                                       of_value + j * wide);
      }
      if (h.needs_key) {
        add<kTogether, 1, kDecodeTile>(grad_s + from, query + row * wide, wide, used,
                                       of_key + j * wide);
      }
    }
  }

  void add_run(const AttentionRun<T>& run) const {
    for (int64_t tile = 0; tile < run.count; tile += kDecodeTile) {
      const int64_t count = std::min(kDecodeTile, run.count - tile);
      const T *key = run.keys + tile * run.key_stride,
              *value = run.values + tile * run.value_stride;
      pack_columns(key, run.key_stride, count, h.width, keys);
      if (h.needs_scores) pack_columns(value, run.value_stride, count, h.width, values);
      const WideRows<T> key_rows(key, run.key_stride, count, h.width, packed);
      __builtin_memset(of_key, 0, kDecodeTile * wide * sizeof(Num));
      __builtin_memset(of_value, 0, kDecodeTile * wide * sizeof(Num));
      for (int64_t r = 0; r < run.rows; r += kGradRows) {
        add_block(run, r, std::min(kGradRows, run.rows - r), tile, count, key_rows);
      }
      if (h.needs_key) {
        __builtin_memcpy(run.grad_key + tile * wide, of_key, count * wide * sizeof(Num));
      }
      if (h.needs_value) {
        __builtin_memcpy(run.grad_value + tile * wide, of_value, count * wide * sizeof(Num));
      }
    }
  }

  void finish() const {
    if (!h.grad_query) return;
    for (int64_t i = 0; i < h.rows; ++i) {
      AttentionSums<T>::store_row(grad_query + i * wide, Num(1), h.width,
                                  h.grad_query + i * h.grad_query_stride);
    }
  }
};

template <class T>
void attend_backward(const AttentionHead<T>& head, const AttentionRun<T>* runs, int64_t num_runs,
                     Wide<T>* scratch) {
  const HeadGrads<T> grads(head, scratch);
  if (HeadGrads<T>::kCoarse && head.needs_scores && head.grad_output) {
    for (int64_t i = 0; i < num_runs; ++i) {
      list_seen(*runs[i].run, runs[i].from, runs[i].to);
      grads.add_deltas(runs[i]);
    }
  }
  for (int64_t i = 0; i < num_runs; ++i) {
    list_seen(*runs[i].run, runs[i].from, runs[i].to);
    grads.add_run(runs[i]);
  }
  grads.finish();
}

// A row of each of `count` heads, head_stride apart, added up in their order; overwrites the first.
template <class T>
void sum_heads(Wide<T>* rows, int64_t head_stride, int64_t count, int64_t width, T* out) {
  constexpr int N = DecodeVectors<T>::kLanesOf;
  for (int64_t g = 1; g < count; ++g) {
    for (int64_t d = 0; d < width; d += N) {
      store_wide(rows + d, load_wide(rows + d) + load_wide(rows + g * head_stride + d));
    }
  }
  AttentionSums<T>::store_row(rows, Wide<T>(1), width, out);
}

template <class T>
constexpr AttentionKernels<T> kAttention = {&attend_block<T>, &attend_backward<T>, &sum_heads<T>};

}  // namespace fastrl::FASTRL_SIMD

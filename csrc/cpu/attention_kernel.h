// Attention of a block of queries to runs of keys, tile by tile: online softmax, at one instruction
// set's width. Included by kernels_*.cpp after decode_attention_kernel.h, whose products and
// weights it shares. A key that a query does not see has the weight 0 exactly, and a query takes
// the same steps in a group of four and alone: what other queries see changes no bit of it.

namespace fastrl::FASTRL_SIMD {

// Of a tile: the keys that some of R queries see, from a whole vector on.
template <int R, int N>
FASTRL_INLINE AttentionSpan seen_by(const int32_t* from, const int32_t* to, int64_t tile,
                                    int64_t count) {
  int64_t first = kDecodeTile, last = 0;
  for (int r = 0; r < R; ++r) {
    if (from[r] >= to[r]) continue;
    first = std::min<int64_t>(first, from[r] - tile);
    last = std::max<int64_t>(last, to[r] - tile);
  }
  return {std::max<int64_t>(first, 0) / N * N, std::min(last, count)};
}

// rows [count, width] to [width, kDecodeTile], zeros behind the last one up to a whole vector.
template <class T>
inline void pack_columns(const T* rows, int64_t stride, int64_t count, int64_t width,
                         Wide<T>* out) {
  typedef typename DecodeVectors<T>::Vec Vec;
  constexpr int N = DecodeVectors<T>::kLanesOf;
  for (int64_t j = 0; j < count; j += N) {
    for (int64_t d = 0; d < width; d += N) {
      Vec block[N];
      for (int i = 0; i < N; ++i) {
        block[i] = j + i < count ? load_part(rows + (j + i) * stride, d, width) : Vec{};
      }
      transpose<1, N>(block);
      for (int i = 0; i < N; ++i) store_wide(out + (d + i) * kDecodeTile + j, block[i]);
    }
  }
}

// Rows as the products take them: where they are, if they are what these compute in and end with a
// whole vector, else a copy in `packed`.
template <class T>
struct WideRows {
  const Wide<T>* data;
  int64_t stride;

  WideRows(const T* rows, int64_t row_stride, int64_t count, int64_t width, Wide<T>* packed)
      : data(packed), stride(padded_width(width)) {
    if constexpr (std::is_same_v<T, Wide<T>>) {
      if (width % DecodeVectors<T>::kLanesOf == 0) {
        data = rows, stride = row_stride;
        return;
      }
    }
    for (int64_t j = 0; j < count; ++j) pack_row(rows + j * row_stride, width, packed + j * stride);
  }
  const Wide<T>* row(int64_t j) const { return data + j * stride; }
};

// A block of queries and what it has seen so far.
template <class T>
struct AttentionSums {
  typedef typename DecodeVectors<T>::Vec Vec;
  typedef Wide<T> Num;
  static constexpr int N = DecodeVectors<T>::kLanesOf;

  const AttentionBlock<T>& b;
  const DecodeExp exp;
  int64_t wide, vectors;
  Num *queries, *sums, *keys, *packed, *scores;
  DecodeQuery<Vec, Num> states[kAttentionRows];

  AttentionSums(const AttentionBlock<T>& block, Num* scratch)
      : b(block), wide(padded_width(block.width)), vectors((block.width + N - 1) / N) {
    queries = scratch;
    sums = queries + kAttentionRows * wide;
    keys = sums + kAttentionRows * wide;
    packed = keys + kDecodeTile * wide;
    scores = packed + kDecodeTile * wide;
    for (int64_t r = 0; r < b.rows; ++r) {
      pack_row(b.query[r], b.width, queries + r * wide);
      clear(r);
    }
  }

  void clear(int64_t r) {
    __builtin_memset(sums + r * wide, 0, wide * sizeof(Num));
    states[r].max = kFloor<Num>;
    states[r].sum = Vec{};
  }

  template <int R>
  FASTRL_INLINE void attend(int64_t i, const AttentionRun<T>& run, int64_t tile, int64_t count,
                            const WideRows<T>& values) {
    const int32_t *from = run.from + i, *to = run.to + i;
    const auto [first, last] = seen_by<R, N>(from, to, tile, count);
    if (first >= last) return;
    const int64_t limit = (last - first + N - 1) / N * N, start = tile + first;
    multiply_keys<R, Vec, N>(queries + i * wide, wide, keys + first, b.width, limit, scores);
    Num shrink[R];
    for (int r = 0; r < R; ++r) {
      shrink[r] = states[i + r].template weigh<N>(
          scores + r * kDecodeTile, limit, std::clamp<int64_t>(from[r] - start, 0, limit),
          std::clamp<int64_t>(to[r] - start, 0, limit), static_cast<Num>(b.scale),
          static_cast<Num>(b.softcap), exp);
    }
    // From the first key that is seen on: what a window has left behind is not read.
    int64_t lead = limit;
    for (int r = 0; r < R; ++r) {
      if (from[r] < to[r]) lead = std::min(lead, std::max<int64_t>(from[r] - start, 0));
    }
    const Num *const weights = scores + lead, *const value = values.row(first + lead);
    const int64_t used = last - first - lead;
    Num* const sum = sums + i * wide;
    int64_t c = 0;
    for (; c + kVectors <= vectors; c += kVectors) {
      add_values<R, kVectors, Vec, N>(weights, shrink, value + c * N, values.stride, used,
                                      sum + c * N, wide);
    }
    for (; c < vectors; ++c) {
      add_values<R, 1, Vec, N>(weights, shrink, value + c * N, values.stride, used, sum + c * N,
                               wide);
    }
  }

  // For the queries [begin, end) of the block.
  void add(const AttentionRun<T>& run, int64_t begin, int64_t end) {
    int64_t first = run.count, last = 0;
    for (int64_t r = begin; r < end; ++r) {
      if (run.from[r] >= run.to[r]) continue;
      first = std::min<int64_t>(first, run.from[r]);
      last = std::max<int64_t>(last, run.to[r]);
    }
    for (int64_t tile = first / kDecodeTile * kDecodeTile; tile < last; tile += kDecodeTile) {
      const int64_t count = std::min(kDecodeTile, run.count - tile);
      pack_columns(run.keys + tile * run.key_stride, run.key_stride, count, b.width, keys);
      const WideRows<T> values(run.values + tile * run.value_stride, run.value_stride, count,
                               b.width, packed);
      int64_t i = begin;
      for (; i + kTogether <= end; i += kTogether) {
        attend<kTogether>(i, run, tile, count, values);
      }
      for (; i < end; ++i) attend<1>(i, run, tile, count, values);
    }
  }

  bool is_finite(int64_t r) const {
    Vec zeros = {};
    for (int64_t d = 0; d < wide; d += N) zeros += load_wide(sums + r * wide + d) * Num(0);
    Num total = 0;
    for (int l = 0; l < N; ++l) total += zeros[l];
    return total == 0;
  }

  // A weight of 0 does not stop the infinity or NaN of a value that only others of the four see.
  void add_alone(const AttentionRun<T>* runs, int64_t num_runs) {
    for (int64_t r = 0; r < b.rows; ++r) {
      if (is_finite(r)) continue;
      clear(r);
      for (int64_t i = 0; i < num_runs; ++i) add(runs[i], r, r + 1);
    }
  }

  void finish() {
    for (int64_t r = 0; r < b.rows; ++r) {
      Num total = 0;
      for (int l = 0; l < N; ++l) total += states[r].sum[l];
      // The sums of a query without keys are 0 already.
      *b.lse[r] = total == 0 ? -static_cast<Num>(__builtin_inf())
                             : static_cast<Num>(states[r].max + std::log(double(total)));
      store_row(sums + r * wide, total == 0 ? Num(1) : total, b.width, b.output[r]);
    }
  }

  // A row by a divisor.
  static void store_row(const Num* row, Num divisor, int64_t width, T* out) {
    for (int64_t d = 0; d < width; d += N) {
      T part[N];
      store_wide(part, load_wide(row + d) / divisor);
      __builtin_memcpy(out + d, part, std::min<int64_t>(N, width - d) * sizeof(T));
    }
  }
};

template <class T>
void attend_block(const AttentionBlock<T>& block, const AttentionRun<T>* runs, int64_t num_runs,
                  Wide<T>* scratch) {
  AttentionSums<T> sums(block, scratch);
  for (int64_t i = 0; i < num_runs; ++i) sums.add(runs[i], 0, block.rows);
  sums.add_alone(runs, num_runs);
  sums.finish();
}

}  // namespace fastrl::FASTRL_SIMD

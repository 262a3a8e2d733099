// Attention of a few queries to a chunk of keys: online softmax over tiles of keys, at one
// instruction set's width. Included by kernels_*.cpp after decode_products.h. A key that a query
// does not see has the weight 0 exactly: what other queries see changes no bit of it.

namespace fastrl::FASTRL_SIMD {

template <class Num>
constexpr Num kFloor = -3.0e38f;  // finite: before a query's first key, floor - floor is 0

template <class Vec, class Num>
struct DecodeQuery {
  Num max;
  Vec sum;  // of exp(s_j - max), a part in each lane

  // The first `limit` scores of a tile become weights; gives what the sums so far shrink by.
  template <int N>
  FASTRL_INLINE Num weigh(Num* scores, int64_t limit, int64_t from, int64_t to, Num scale,
                          Num softcap, const DecodeExp& exp) {
    Vec top = splat_like(Vec{}, max);
    for (int64_t j = 0; j < limit; j += N) {
      Vec s = load_wide(scores + j) * scale;
      if (softcap != 0) s = tanh_of(s / softcap, exp) * softcap;
      store_wide(scores + j, s);
    }
    const Num unseen = -__builtin_inf();
    for (int64_t j = 0; j < std::min(from, limit); ++j) scores[j] = unseen;
    for (int64_t j = to; j < limit; ++j) scores[j] = unseen;
    for (int64_t j = 0; j < limit; j += N) top = larger(load_wide(scores + j), top);
    Num highest = top[0];
    for (int l = 1; l < N; ++l) highest = top[l] > highest ? top[l] : highest;
    const Vec shrink = exp(splat_like(Vec{}, max - highest));
    sum *= shrink;
    for (int64_t j = 0; j < limit; j += N) {
      const Vec w = exp(load_wide(scores + j) - highest);
      store_wide(scores + j, w);
      sum += w;
    }
    max = highest;
    return shrink[0];
  }
};

// A tile of keys and its scores, for R queries from number i on; those that do not exist are zeros.
template <int R, class T, class Vec, int N, class Num>
FASTRL_INLINE void attend_tile(const DecodeBlock<T>& b, int64_t i, int64_t tile, int64_t count,
                               const Num* values, int64_t value_stride, const DecodeExp& exp,
                               DecodeQuery<Vec, Num>* states, Num* scores, Num* sums) {
  const int64_t wide = padded_width(b.width), vectors = (b.width + N - 1) / N;
  const int64_t limit = (count + N - 1) / N * N;
  const Num scale = static_cast<Num>(b.scale), softcap = static_cast<Num>(b.softcap);
  Num shrink[R];
  for (int r = 0; r < R; ++r) {
    const bool exists = i + r < b.num_queries;
    const int64_t from = exists ? b.from[i + r] - tile : 0, to = exists ? b.to[i + r] - tile : 0;
    shrink[r] = states[i + r].template weigh<N>(
        scores + r * kDecodeTile, limit, std::clamp<int64_t>(from, 0, kDecodeTile),
        std::clamp<int64_t>(to, 0, kDecodeTile), scale, softcap, exp);
  }
  int64_t c = 0;
  for (; c + kVectors <= vectors; c += kVectors) {
    add_values<R, kVectors, Vec, N>(scores, shrink, values + c * N, value_stride, count,
                                    sums + i * wide + c * N, wide);
  }
  for (; c < vectors; ++c) {
    add_values<R, 1, Vec, N>(scores, shrink, values + c * N, value_stride, count,
                             sums + i * wide + c * N, wide);
  }
}

template <class T>
void attend_chunk(const DecodeBlock<T>& b, Wide<T>* scratch) {
  typedef typename DecodeVectors<T>::Vec Vec;
  typedef Wide<T> Num;
  constexpr int N = DecodeVectors<T>::kLanesOf;
  const int64_t wide = padded_width(b.width);
  Num* const queries = scratch;
  Num* const sums = queries + kDecodeQueries * wide;
  Num* const keys = sums + kDecodeQueries * wide;
  Num* const packed = keys + kDecodeTile * wide;
  Num* const scores = packed + kDecodeTile * wide;
  const int64_t padded = (b.num_queries + kTogether - 1) / kTogether * kTogether;
  DecodeQuery<Vec, Num> states[kDecodeQueries];
  int64_t first = b.count, last = 0;
  __builtin_memset(queries, 0, padded * wide * sizeof(Num));
  __builtin_memset(sums, 0, padded * wide * sizeof(Num));
  for (int64_t i = 0; i < padded; ++i) {  // of the many that there may be, those that there are
    states[i].max = kFloor<Num>;
    states[i].sum = Vec{};
  }
  for (int i = 0; i < b.num_queries; ++i) {
    pack_row(b.query[i], b.width, queries + i * wide);
    if (b.from[i] < b.to[i]) {
      first = std::min<int64_t>(first, b.from[i]);
      last = std::max<int64_t>(last, b.to[i]);
    }
  }
  const DecodeExp exp;
  const bool in_place = std::is_same_v<T, Num> && b.width % N == 0;
  first = first / kDecodeTile * kDecodeTile;
  Ahead<T>{b, first}.fetch_all();
  for (int64_t tile = first; tile < last; tile += kDecodeTile) {
    const int64_t count = std::min<int64_t>(kDecodeTile, b.count - tile);
    const int64_t limit = (count + N - 1) / N * N;
    const T* const first_key = b.keys + tile * b.key_stride;
    const Ahead<T> ahead{b, tile + kDecodeTile};
    if (b.is_lone) {
      multiply_lone(queries, first_key, b.key_stride, count, b.width, ahead, scores);
    } else {
      pack_keys(first_key, b.key_stride, count, b.width, ahead, keys);
    }
    const Num* values = packed;
    int64_t value_stride = wide;
    if (in_place) {
      values = reinterpret_cast<const Num*>(b.values + tile * b.value_stride);
      value_stride = b.value_stride;
    } else {
      for (int64_t j = 0; j < count; ++j) {
        pack_row(b.values + (tile + j) * b.value_stride, b.width, packed + j * wide);
      }
    }
    for (int64_t i = 0; i < b.num_queries; i += kTogether) {
      const auto attend = [&](auto together) {
        constexpr int R = decltype(together)::value;
        if (!b.is_lone) {
          multiply_keys<R, Vec, N>(queries + i * wide, wide, keys, b.width, limit, scores);
        }
        attend_tile<R, T, Vec, N>(b, i, tile, count, values, value_stride, exp, states, scores,
                                  sums);
      };
      if (i + 1 == b.num_queries) {
        attend(std::integral_constant<int, 1>());
      } else {
        attend(std::integral_constant<int, kTogether>());
      }
    }
  }
  for (int i = 0; i < b.num_queries; ++i) {
    __builtin_memcpy(b.partial[i], sums + i * wide, wide * sizeof(Num));
    Num total = 0;
    for (int l = 0; l < N; ++l) total += states[i].sum[l];
    b.partial[i][wide] = states[i].max;
    b.partial[i][wide + 1] = total;
  }
}

template <class T>
void merge_chunks(const DecodePartials<T> runs[2], int64_t width, Wide<T>* weights, T* output,
                  Wide<T>* lse) {
  typedef typename DecodeVectors<T>::Vec Vec;
  typedef Wide<T> Num;
  constexpr int N = DecodeVectors<T>::kLanesOf;
  const int64_t wide = padded_width(width);
  const auto each = [&](auto&& body) {
    int64_t at = 0;
    for (int run = 0; run < 2; ++run) {
      for (int64_t c = 0; c < runs[run].count; ++c) {
        body(runs[run].first + c * runs[run].stride, at++);
      }
    }
  };
  Num max = kFloor<Num>;
  each([&](const Num* part, int64_t) { max = std::max(max, part[wide]); });
  double total = 0.0;
  each([&](const Num* part, int64_t at) {
    weights[at] = static_cast<Num>(std::exp(static_cast<double>(part[wide]) - max));
    total += static_cast<double>(weights[at]) * part[wide + 1];
  });
  *lse = static_cast<Num>(max + std::log(total));
  const Vec divisor = splat_like(Vec{}, static_cast<Num>(total));
  for (int64_t d = 0; d < width; d += N) {
    Vec sum = {};
    each([&](const Num* part, int64_t at) { sum += load_wide(part + d) * weights[at]; });
    T out[N];
    store_wide(out, sum / divisor);
    __builtin_memcpy(output + d, out, std::min<int64_t>(N, width - d) * sizeof(T));
  }
}

template <class T>
constexpr DecodeKernels<T> kDecode = {&attend_chunk<T>, &merge_chunks<T>};

}  // namespace fastrl::FASTRL_SIMD

// What decode_attention works through on a CPU: for each prefix and each row the chunks of its keys
// that queries see.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace fastrl {

struct Keys {
  int64_t from, to;
};

// Which keys of the prefix, and which of a row's own, query t sees: `own` keys stand behind
// `shared` ones, the last query at the last of them.
struct Sight {
  int64_t shared, own, queries, window;

  int64_t position(int64_t t) const { return shared + own - queries + t; }
  Keys prefix(int64_t t) const { return clip(t, 0, shared); }
  Keys row(int64_t t) const { return clip(t, shared, shared + own); }

 private:
  Keys clip(int64_t t, int64_t begin, int64_t end) const {
    const int64_t last = std::min(position(t) + 1, end);
    const int64_t first = std::max(position(t) + 1 - window, begin);
    return {first - begin, std::max(last, first) - begin};
  }
};

constexpr int64_t kNever = int64_t{1} << 40;  // more keys than there are

inline int64_t chunks_of(int64_t keys) { return (keys + kDecodeChunk - 1) / kDecodeChunk; }

// A chunk of a prefix, or of a row's own keys, for up to kDecodeQueries queries.
struct Task {
  bool is_shared;
  int64_t source;           // the prefix, or the row
  int64_t first_row, head;  // of the queries, which count from the first one of first_row
  int64_t first_query, num_queries, chunk;
};

// The sizes of a call, and the keys of each of its rows.
struct Call {
  int64_t batch, query_heads, key_heads, queries, width, num_keys, num_shared;
  std::vector<int64_t> start;          // per row: its first key
  std::vector<Sight> sight;            // per row
  std::vector<int64_t> first_partial;  // per row, and of the next
  std::vector<Task> tasks;
  int64_t products = 0;
  double scale, softcap;

  int64_t queries_per_key() const { return query_heads / key_heads * queries; }
  int64_t prefix_chunks(int64_t row) const { return chunks_of(sight[row].shared); }

  // Tasks for the rows that read a prefix, or for a row and its own keys.
  void add_tasks(bool is_shared, int64_t source, int64_t first_row, int64_t rows) {
    const int64_t total = rows * queries_per_key();
    for (int64_t q = 0; q < total; q += kDecodeQueries) {
      const int64_t count = std::min<int64_t>(kDecodeQueries, total - q);
      int64_t first = kNever, last = 0;
      for (int64_t i = q; i < q + count; ++i) {
        const Keys keys = seen(is_shared, first_row + i / queries_per_key(), i % queries);
        if (keys.from >= keys.to) continue;
        first = std::min(first, keys.from);
        last = std::max(last, keys.to);
      }
      products += count * std::max<int64_t>(0, last - first) * width * key_heads;
      for (int64_t c = first / kDecodeChunk; c < chunks_of(last); ++c) {
        for (int64_t head = 0; head < key_heads; ++head) {
          tasks.push_back({is_shared, source, first_row, head, q, count, c});
        }
      }
    }
  }
  Keys seen(bool is_shared, int64_t row, int64_t t) const {
    return is_shared ? sight[row].prefix(t) : sight[row].row(t);
  }
};

inline const int32_t* bounds(const std::optional<Tensor>& x, int64_t count) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Int && x->is_contiguous() && x->dim() == 1 &&
                      x->numel() == count,
                  "decode_attention: bounds must be contiguous int32, ", count, " of them");
  return ptr<int32_t>(*x);
}

struct Arguments {
  const Tensor &query, &key, &value;
  const std::optional<Tensor>&key_start, &key_end, &prefix_key, &prefix_value, &prefix_end,
      &prefix_cu_rows;
  double scale;
  std::optional<int64_t> window;
  std::optional<double> softcap;
};

inline void check_shapes(const Arguments& a) {
  const auto is = [](const Tensor& x, int64_t rows, const Tensor& like) {
    return x.dim() == 4 && x.size(0) == rows && x.size(1) == like.size(1) &&
           x.size(2) == like.size(2) && x.size(3) == like.size(3);
  };
  const auto same = [&](const Tensor& x) { return x.scalar_type() == a.query.scalar_type(); };
  bool fits = a.query.dim() == 4 && a.key.dim() == 4 && is(a.value, a.query.size(0), a.key) &&
              a.key.size(0) == a.query.size(0) && a.key.size(3) == a.query.size(3) &&
              a.key.size(1) > 0 && a.query.size(1) % a.key.size(1) == 0 && same(a.key) &&
              same(a.value) && a.prefix_key.has_value() == a.prefix_value.has_value();
  if (fits && a.prefix_key) {
    const Tensor &key = *a.prefix_key, &value = *a.prefix_value;
    fits = key.dim() == 4 && is(value, key.size(0), key) && key.size(1) == a.key.size(1) &&
           key.size(3) == a.key.size(3) && same(key) && same(value);
  }
  STD_TORCH_CHECK(fits, "decode_attention: shapes or dtypes disagree");
}

inline Call plan(const Arguments& a) {
  check_shapes(a);
  Call call;
  call.batch = a.query.size(0), call.query_heads = a.query.size(1), call.queries = a.query.size(2);
  call.width = a.query.size(3), call.key_heads = a.key.size(1), call.num_keys = a.key.size(2);
  call.num_shared = a.prefix_key ? a.prefix_key->size(2) : 0;
  call.scale = a.scale, call.softcap = a.softcap.value_or(0.0);
  const int64_t prefixes = a.prefix_key ? a.prefix_key->size(0) : 0, batch = call.batch;
  const int32_t *starts = bounds(a.key_start, batch), *ends = bounds(a.key_end, batch);
  const int32_t* lengths = bounds(a.prefix_end, prefixes);
  const int32_t* rows = bounds(a.prefix_cu_rows, prefixes + 1);
  const auto within = [](int64_t x, int64_t most) { return std::clamp<int64_t>(x, 0, most); };
  std::vector<int64_t> group(prefixes + 1, batch);  // the first row of each prefix
  STD_TORCH_CHECK(rows || prefixes == 0 || batch % prefixes == 0,
                  "decode_attention: the rows do not share the prefixes evenly");
  for (int64_t p = 0; p < prefixes; ++p) group[p] = rows ? rows[p] : p * (batch / prefixes);
  bool rises = prefixes == 0 || (group[0] == 0 && (!rows || rows[prefixes] == batch));
  for (int64_t p = 0; p < prefixes; ++p) rises = rises && group[p] <= group[p + 1];
  STD_TORCH_CHECK(rises, "decode_attention: prefix_cu_rows must rise from 0 to the batch");
  std::vector<int64_t> prefix(batch, -1);  // of each row
  for (int64_t p = 0; p < prefixes; ++p) {
    for (int64_t b = group[p]; b < group[p + 1]; ++b) prefix[b] = p;
  }
  const int64_t window = std::min(a.window.value_or(kNever), kNever);
  call.first_partial.assign(1, 0);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t p = prefix[b];
    const int64_t start = within(starts ? starts[b] : 0, call.num_keys);
    const int64_t end = within(ends ? ends[b] : call.num_keys, call.num_keys);
    const int64_t shared =
        p < 0 ? 0 : within(lengths ? lengths[p] : call.num_shared, call.num_shared);
    call.start.push_back(start);
    call.sight.push_back({shared, std::max<int64_t>(end - start, 0), call.queries, window});
    const Sight& s = call.sight.back();
    call.first_partial.push_back(call.first_partial.back() + chunks_of(s.shared) +
                                 chunks_of(s.own));
  }
  for (int64_t p = 0; p < prefixes; ++p) {
    if (group[p] < group[p + 1]) call.add_tasks(true, p, group[p], group[p + 1] - group[p]);
  }
  for (int64_t b = 0; b < batch; ++b) call.add_tasks(false, b, b, 1);
  return call;
}

}  // namespace fastrl

// decode_attention on the CPU. The keys of a prefix, and those of each row, are cut into chunks of
// a fixed length; a thread takes a chunk with the queries that see it (of a prefix those of many
// rows, so that it is read for all of them), and what the chunks add up to is merged in their
// order.
#include <atomic>
#include <memory>
#include <tuple>

#include "kernels.h"
#include "tensors.h"

namespace fastrl {
namespace {

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

int64_t chunks_of(int64_t keys) { return (keys + kDecodeChunk - 1) / kDecodeChunk; }

// Strides of [rows, heads, steps, width], width being dense.
template <class T>
struct Heads {
  const T* data;
  int64_t row_stride, head_stride, step_stride;

  explicit Heads(const Tensor& x) : data(ptr<T>(x)) {
    const auto strides = x.strides();
    STD_TORCH_CHECK(x.dim() == 4 && (x.size(3) <= 1 || strides[3] == 1),
                    "decode_attention: tensors must be [B, H, S, D], dense along D");
    row_stride = strides[0], head_stride = strides[1], step_stride = strides[2];
  }
  const T* at(int64_t row, int64_t head, int64_t step) const {
    return data + row * row_stride + head * head_stride + step * step_stride;
  }
};

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
  std::vector<int64_t> start, prefix;  // per row: its first key, and its prefix or -1
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

const int32_t* bounds(const std::optional<Tensor>& x, int64_t count) {
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

void check_shapes(const Arguments& a) {
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

Call plan(const Arguments& a) {
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
  for (int64_t p = 0; p < prefixes; ++p) {
    group[p] = within(rows ? rows[p] : p * (batch / prefixes), batch);
  }
  call.prefix.assign(batch, -1);
  for (int64_t p = 0; p < prefixes; ++p) {
    for (int64_t b = group[p]; b < group[p + 1]; ++b) call.prefix[b] = p;
  }
  call.first_partial.assign(1, 0);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t p = call.prefix[b];
    const int64_t start = within(starts ? starts[b] : 0, call.num_keys);
    const int64_t end = within(ends ? ends[b] : call.num_keys, call.num_keys);
    const int64_t shared =
        p < 0 ? 0 : within(lengths ? lengths[p] : call.num_shared, call.num_shared);
    call.start.push_back(start);
    call.sight.push_back(
        {shared, std::max<int64_t>(end - start, 0), call.queries, a.window.value_or(kNever)});
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

template <class Body>
void share(int64_t count, bool alone, Body body) {
  std::atomic<int64_t> next{0};  // who takes what changes no bit of it
  const int64_t threads = alone ? 1 : std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { body(next); });
}

template <class T>
struct Engine {
  const Call& call;
  const DecodeKernels<T>& k;
  Heads<T> query, key, value;
  std::optional<Heads<T>> prefix_key, prefix_value;
  Wide<T>* partials;
  T* output;
  Wide<T>* lse;

  int64_t partial_stride() const {
    return call.query_heads * call.queries * decode_partial_size(call.width);
  }
  Wide<T>* partial(int64_t row, int64_t chunk, int64_t head_and_query) const {
    return partials + (call.first_partial[row] + chunk) * partial_stride() +
           head_and_query * decode_partial_size(call.width);
  }

  void attend(const Task& task, Wide<T>* scratch) const {
    const int64_t first_key = task.chunk * kDecodeChunk, per_row = call.queries_per_key();
    DecodeBlock<T> block;
    const Heads<T>& keys = task.is_shared ? *prefix_key : key;
    const Heads<T>& values = task.is_shared ? *prefix_value : value;
    const Sight& s = call.sight[task.first_row];
    const int64_t exist = task.is_shared ? s.shared : s.own;
    const int64_t step = first_key + (task.is_shared ? 0 : call.start[task.source]);
    block.keys = keys.at(task.source, task.head, step);
    block.values = values.at(task.source, task.head, step);
    block.key_stride = keys.step_stride, block.value_stride = values.step_stride;
    block.width = call.width, block.scale = call.scale, block.softcap = call.softcap;
    block.count = static_cast<int>(std::min<int64_t>(kDecodeChunk, exist - first_key));
    block.num_queries = static_cast<int>(task.num_queries);
    for (int i = 0; i < block.num_queries; ++i) {
      const int64_t q = task.first_query + i, row = task.first_row + q / per_row;
      const int64_t of_head = q % per_row, t = q % call.queries;
      const int64_t head = task.head * (call.query_heads / call.key_heads) + of_head / call.queries;
      const Keys seen = call.seen(task.is_shared, row, t);
      const auto within = [&](int64_t j) {
        return static_cast<int>(std::clamp<int64_t>(j - first_key, 0, block.count));
      };
      block.query[i] = query.at(row, head, t);
      block.from[i] = within(seen.from), block.to[i] = within(seen.to);
      const int64_t chunk = task.chunk + (task.is_shared ? 0 : call.prefix_chunks(row));
      block.partial[i] = partial(row, chunk, head * call.queries + t);
    }
    k.attend(block, scratch);
  }

  void merge(int64_t row, Wide<T>* weights) const {
    const int64_t count = call.query_heads * call.queries;
    for (int64_t i = 0; i < count; ++i) {
      DecodePartials<T> runs[2];
      for (const bool is_shared : {true, false}) {
        const Keys seen = call.seen(is_shared, row, i % call.queries);
        const int64_t first = seen.from / kDecodeChunk;
        const int64_t chunks = seen.from < seen.to ? chunks_of(seen.to) - first : 0;
        const int64_t before = is_shared ? 0 : call.prefix_chunks(row);
        runs[is_shared ? 0 : 1] = {partial(row, before + first, i), partial_stride(), chunks};
      }
      T* const out = output + (row * count + i) * call.width;
      Wide<T>* const out_lse = lse + row * count + i;
      if (runs[0].count + runs[1].count == 0) {
        std::memset(static_cast<void*>(out), 0, call.width * sizeof(T));
        *out_lse = -__builtin_inff();
      } else {
        k.merge(runs, call.width, weights, out, out_lse);
      }
    }
  }

  void run() const {
    constexpr int64_t kSmall = 1 << 18;  // products, which take as long as waking a thread
    const int64_t tasks = static_cast<int64_t>(call.tasks.size());
    const bool alone = call.products < kSmall;
    share(tasks, alone, [&](std::atomic<int64_t>& next) {
      const int64_t size = decode_scratch_size(call.width);
      const std::unique_ptr<Wide<T>[]> memory(new Wide<T>[size + 64 / sizeof(Wide<T>)]);
      void* aligned = memory.get();
      size_t space = (size + 64 / sizeof(Wide<T>)) * sizeof(Wide<T>);
      std::align(64, size * sizeof(Wide<T>), aligned, space);
      for (int64_t i; (i = next++) < tasks;) {
        attend(call.tasks[i], static_cast<Wide<T>*>(aligned));
      }
    });
    int64_t most = 0;
    for (int64_t b = 0; b < call.batch; ++b) {
      most = std::max(most, call.first_partial[b + 1] - call.first_partial[b]);
    }
    share(call.batch, alone, [&](std::atomic<int64_t>& next) {
      const std::unique_ptr<Wide<T>[]> weights(new Wide<T>[most]);
      for (int64_t b; (b = next++) < call.batch;) merge(b, weights.get());
    });
  }
};

template <class T>
std::tuple<Tensor, Tensor> decode(const Arguments& a, const DecodeKernels<T>& k) {
  const bool is_double = a.query.scalar_type() == ScalarType::Double;
  std::vector<int64_t> shape = shape_of(a.query);
  Tensor output = empty_cpu(shape, a.query.scalar_type());
  shape.pop_back();
  Tensor lse = empty_cpu(shape, is_double ? ScalarType::Double : ScalarType::Float);
  if (lse.numel() == 0) return {output, lse};
  const Call call = plan(a);
  const int64_t size =
      call.first_partial.back() * call.query_heads * call.queries * decode_partial_size(call.width);
  const std::unique_ptr<Wide<T>[]> partials(new Wide<T>[size]);
  const auto heads = [](const std::optional<Tensor>& x) {
    return x ? std::optional<Heads<T>>(Heads<T>(*x)) : std::nullopt;
  };
  const Engine<T> engine{call,
                         k,
                         Heads<T>(a.query),
                         Heads<T>(a.key),
                         Heads<T>(a.value),
                         heads(a.prefix_key),
                         heads(a.prefix_value),
                         partials.get(),
                         mutable_ptr<T>(output),
                         mutable_ptr<Wide<T>>(lse)};
  engine.run();
  return {output, lse};
}

std::tuple<Tensor, Tensor> decode_attention_cpu(
    const Tensor& query, const Tensor& key, const Tensor& value,
    const std::optional<Tensor>& key_start, const std::optional<Tensor>& key_end,
    const std::optional<Tensor>& prefix_key, const std::optional<Tensor>& prefix_value,
    const std::optional<Tensor>& prefix_end, const std::optional<Tensor>& prefix_cu_rows,
    double scale, std::optional<int64_t> window, std::optional<double> softcap) {
  const Arguments a{query,        key,        value,          key_start, key_end, prefix_key,
                    prefix_value, prefix_end, prefix_cu_rows, scale,     window,  softcap};
  check_shapes(a);
  switch (query.scalar_type()) {
    case ScalarType::Float:
      return decode<float>(a, kernels().decode_f32);
    case ScalarType::Double:
      return decode<double>(a, kernels().decode_f64);
    case ScalarType::BFloat16:
      return decode<BFloat16>(a, kernels().decode_bf16);
    case ScalarType::Half:
      return decode<Half>(a, kernels().decode_f16);
    default:
      STD_TORCH_CHECK(false, "decode_attention: expected a floating-point query");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention_cpu));
}

}  // namespace fastrl

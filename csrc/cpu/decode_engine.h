// decode_attention on the CPU. The keys of a prefix, and those of each row, are cut into chunks of
// a fixed length; a thread takes a chunk with the queries that see it (of a prefix those of many
// rows, so that it is read for all of them), and what the chunks add up to is merged in their
// order.
#pragma once

#include <memory>
#include <tuple>

#include "decode_tasks.h"
#include "heads.h"

namespace fastrl {

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
    block.key_stride = keys.stride, block.value_stride = values.stride;
    block.width = call.width, block.scale = call.scale, block.softcap = call.softcap;
    block.count = static_cast<int>(std::min<int64_t>(kDecodeChunk, exist - first_key));
    block.num_queries = static_cast<int>(task.num_queries);
    block.is_lone = !task.is_shared && per_row == 1;
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
        const int64_t first = seen.from < seen.to ? seen.from / kDecodeChunk : 0;
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
    const int64_t tasks = static_cast<int64_t>(call.tasks.size());
    const bool alone = call.products < kSmall;
    share(tasks, alone, [&](Tickets& next, int64_t) {
      const int64_t size = decode_scratch_size(call.width);
      const std::unique_ptr<Wide<T>[]> memory(new Wide<T>[size + 64 / sizeof(Wide<T>)]);
      void* aligned = memory.get();
      size_t space = (size + 64 / sizeof(Wide<T>)) * sizeof(Wide<T>);
      std::align(64, size * sizeof(Wide<T>), aligned, space);
      for (int64_t i; (i = next.take()) < tasks;) {
        attend(call.tasks[i], static_cast<Wide<T>*>(aligned));
      }
    });
    int64_t most = 0;
    for (int64_t b = 0; b < call.batch; ++b) {
      most = std::max(most, call.first_partial[b + 1] - call.first_partial[b]);
    }
    share(call.batch, alone, [&](Tickets& next, int64_t) {
      const std::unique_ptr<Wide<T>[]> weights(new Wide<T>[most]);
      for (int64_t b; (b = next.take()) < call.batch;) merge(b, weights.get());
    });
  }
};

template <class T>
inline std::tuple<Tensor, Tensor> decode(const Arguments& a, const Call& call,
                                         const DecodeKernels<T>& k) {
  const bool is_double = a.query.scalar_type() == ScalarType::Double;
  std::vector<int64_t> shape = shape_of(a.query);
  Tensor output = empty_cpu(shape, a.query.scalar_type());
  shape.pop_back();
  Tensor lse = empty_cpu(shape, is_double ? ScalarType::Double : ScalarType::Float);
  if (lse.numel() == 0) return {output, lse};
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

}  // namespace fastrl

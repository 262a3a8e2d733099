// The backward pass of attention on the CPU. A thread takes a head of a tree's queries through all
// keys of the tree; what the heads that share keys give to these is added up afterwards, in their
// order. Who takes what, and when, changes no bit of it.
#include <tuple>

#include "attention_call.h"

namespace fastrl {
namespace {

struct Needs {
  bool query, key, value;
};

// A tree and a head of its keys; where in a buffer what its heads of queries give begins.
struct Unit {
  const Tree* tree;
  int64_t head, start, keys;
};

template <class T>
struct Backward {
  typedef Wide<T> Num;

  const AttentionKernels<T>& k;
  Numbers numbers;
  Needs needs;
  bool alone;
  Heads<T> query, key, value, output;
  std::optional<Heads<T>> grad_output;
  const Num *lse, *grad_lse;
  std::optional<Heads<T>> grads[3];
  int64_t query_heads, key_heads, width, queries;
  Num *scratch, *parts[2];
  int64_t scratch_size;

  int64_t group() const { return query_heads / key_heads; }
  T* grad_at(int which, int64_t row, int64_t head, int64_t token) const {
    return grads[which] ? grads[which]->at(row, head, token) : nullptr;
  }

  void attend(const Unit& unit, int64_t g, Num* memory) const {
    const Tree& tree = *unit.tree;
    const int64_t head = unit.head * group() + g, row = tree.row, first = tree.query_start;
    const int64_t at = (row * query_heads + head) * queries + first;
    AttentionHead<T> h;
    h.width = width, h.rows = tree.queries();
    h.scale = numbers.scale, h.softcap = numbers.softcap;
    h.query = query.at(row, head, first), h.query_stride = query.stride;
    h.output = output.at(row, head, first), h.output_stride = output.stride;
    h.grad_output = grad_output ? grad_output->at(row, head, first) : nullptr;
    h.grad_stride = grad_output ? grad_output->stride : 0;
    h.lse = lse + at, h.grad_lse = grad_lse ? grad_lse + at : nullptr;
    h.grad_query = grad_at(0, row, head, first);
    h.grad_query_stride = grads[0] ? grads[0]->stride : 0;
    h.needs_key = needs.key, h.needs_value = needs.value;
    h.needs_scores = needs.query || needs.key;
    const int64_t wide = padded_width(width);
    int64_t part = unit.start + g * unit.keys * wide;
    std::vector<int32_t> from(tree.queries()), to(tree.queries());  // of one run at a time
    std::vector<AttentionRun<T>> runs;
    for (const KeyRun& run : tree.runs) {
      runs.push_back({key.at(row, unit.head, run.key_start),
                      value.at(row, unit.head, run.key_start), key.stride, value.stride, run.keys(),
                      from.data(), to.data(), run.query_start - first,
                      run.query_end - run.query_start, parts[0] + part, parts[1] + part, &run});
      part += run.keys() * wide;
    }
    k.backward(h, runs.data(), static_cast<int64_t>(runs.size()), memory);
  }

  void add_up(const Unit& unit) const {
    const int64_t wide = padded_width(width);
    for (const int which : {1, 2}) {
      if (!grads[which]) continue;
      Num* part = parts[which - 1] + unit.start;
      for (const KeyRun& run : unit.tree->runs) {
        for (int64_t j = run.key_start; j < run.key_end; ++j, part += wide) {
          k.sum_heads(part, unit.keys * wide, group(), width,
                      grad_at(which, unit.tree->row, unit.head, j));
        }
      }
    }
  }

  void run(const std::vector<Unit>& units) const {
    const int64_t count = static_cast<int64_t>(units.size());
    share(count * group(), alone, [&](Tickets& next, int64_t worker) {
      for (int64_t i; (i = next.take()) < count * group();) {
        attend(units[i / group()], i % group(), scratch + worker * scratch_size);
      }
    });
    share(count, alone, [&](Tickets& next, int64_t) {
      for (int64_t i; (i = next.take()) < count;) add_up(units[i]);
    });
  }
};

// The units in batches, each as small as keeps all threads busy: a batch's parts are in memory.
std::vector<std::vector<Unit>> batches_of(const std::vector<Tree>& trees, const Tensor& query,
                                          int64_t key_heads, int64_t* largest) {
  constexpr int64_t kFew = 1 << 21;  // numbers
  const int64_t group = query.size(1) / key_heads, wide = padded_width(query.size(3));
  const int64_t busy = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  std::vector<std::vector<Unit>> batches(1);
  int64_t size = 0;
  for (const Tree& tree : trees) {
    int64_t keys = 0;
    for (const KeyRun& run : tree.runs) keys += run.keys();
    for (int64_t head = 0; head < key_heads; ++head) {
      if (static_cast<int64_t>(batches.back().size()) * group >= busy && size >= kFew) {
        batches.emplace_back();
        size = 0;
      }
      batches.back().push_back({&tree, head, size, keys});
      size += group * keys * wide;
      *largest = std::max(*largest, size);
    }
  }
  return batches;
}

Tensor empty_or_gradient(const Tensor& like, bool needed, bool clear) {
  if (!needed) return empty_cpu({0}, like.scalar_type());
  Tensor grad = token_major(like);
  if (clear) torch::stable::zero_(grad);
  return grad;
}

template <class T>
std::optional<Heads<T>> heads_of(const Tensor& x, bool given) {
  return given ? std::optional<Heads<T>>(Heads<T>(x)) : std::nullopt;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const AttentionKernels<T>& k,
                                            const std::optional<Tensor>& grad_output,
                                            const std::optional<Tensor>& grad_lse,
                                            const Tensor& query, const Tensor& key,
                                            const Tensor& value, const Tensor& output,
                                            const Tensor& lse, const Visible& visible,
                                            Numbers numbers, Needs needs) {
  const Sizes sizes = sizes_of(query, key, value);
  const ScalarType wide_type =
      query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor held_lse = torch::stable::contiguous(lse);
  const Tensor held_grad_lse = torch::stable::contiguous(grad_lse ? *grad_lse : lse);
  const auto fits = [&](const Tensor& x, int64_t numel, ScalarType type) {
    return x.numel() == numel && x.scalar_type() == type;
  };
  const int64_t rows = query.size(0) * query.size(1) * query.size(2);
  STD_TORCH_CHECK(
      fits(output, query.numel(), query.scalar_type()) && output.dim() == 4 &&
          fits(lse, rows, wide_type) && (!grad_lse || fits(*grad_lse, rows, wide_type)) &&
          (!grad_output ||
           (grad_output->dim() == 4 && fits(*grad_output, query.numel(), query.scalar_type()))),
      "attention: what the forward pass gave and its gradients must be like query");
  // Keys that do not exist, and those of no query, have none.
  const bool clear = visible.key_start || visible.key_end || query.numel() == 0;
  const Tensor grads[3] = {empty_or_gradient(query, needs.query, false),
                           empty_or_gradient(key, needs.key, clear),
                           empty_or_gradient(value, needs.value, clear)};
  const auto found = std::make_tuple(grads[0], grads[1], grads[2]);
  if (query.numel() == 0) return found;
  const std::vector<Tree> trees = trees_of(sizes, visible);
  int64_t part_size = 0, longest = 0;
  const auto batches = batches_of(trees, query, key.size(1), &part_size);
  for (const Tree& tree : trees) longest = std::max(longest, tree.queries());
  const int64_t width = query.size(3);
  const int64_t scratch_size =
      (attention_grad_scratch_size(width, longest) + 15) / 16 * 16;  // whole lines of a cache
  const bool alone = products_of(trees, query) < kSmall;
  const int64_t threads = threads_for(query.size(0) * query.size(1) * sizes.queries, alone);
  const Tensor scratch = empty_cpu({scratch_size * threads + 16}, wide_type);
  const Tensor parts = empty_cpu({2 * part_size}, wide_type);
  Wide<T>* const first_part = mutable_ptr<Wide<T>>(parts);
  const uintptr_t address = reinterpret_cast<uintptr_t>(mutable_ptr<Wide<T>>(scratch));
  const Backward<T> pass{k,
                         numbers,
                         needs,
                         alone,
                         Heads<T>(query),
                         Heads<T>(key),
                         Heads<T>(value),
                         Heads<T>(output),
                         grad_output ? heads_of<T>(*grad_output, true) : std::nullopt,
                         ptr<Wide<T>>(held_lse),
                         grad_lse ? ptr<Wide<T>>(held_grad_lse) : nullptr,
                         {heads_of<T>(grads[0], needs.query), heads_of<T>(grads[1], needs.key),
                          heads_of<T>(grads[2], needs.value)},
                         query.size(1),
                         key.size(1),
                         width,
                         query.size(2),
                         reinterpret_cast<Wide<T>*>((address + 63) / 64 * 64),
                         {first_part, first_part + part_size},
                         scratch_size};
  for (const auto& units : batches) pass.run(units);
  return found;
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd_cpu(
    const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_lse,
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& lse, const Tensor&, const std::optional<Tensor>& key_start,
    const std::optional<Tensor>& key_end, const std::optional<Tensor>& position_ids,
    const std::optional<Tensor>& visible_until, std::vector<Tensor> schedule, bool causal,
    double scale, std::optional<int64_t> window, std::optional<double> softcap, bool needs_query,
    bool needs_key, bool needs_value) {
  const Visible visible{key_start, key_end, position_ids, schedule, causal, window};
  return with_kernels(query, [&](const auto& k) {
    return backward(k, grad_output, grad_lse, query, key, value, output, lse, visible,
                    {scale, softcap.value_or(0.0)}, {needs_query, needs_key, needs_value});
  });
}

}  // namespace

void list_seen(const KeyRun& run, int32_t* from, int32_t* to) {
  for (int64_t i = run.query_start; i < run.query_end; ++i) {
    const KeyRun::Seen seen = run.seen_by(i);
    *from++ = static_cast<int32_t>(seen.from), *to++ = static_cast<int32_t>(seen.to);
  }
}

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) {
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd_cpu));
}

}  // namespace fastrl

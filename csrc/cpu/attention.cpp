// attention on the CPU: a thread takes a block of a tree's queries, those of all heads that share
// keys, through the runs of keys that they see. Who takes what, and when, changes no bit of it.
#include <memory>
#include <tuple>

#include "attention_call.h"

namespace fastrl {
namespace {

template <class Num>
class Scratch {
 public:
  explicit Scratch(int64_t size) : memory_(new Num[size + 64 / sizeof(Num)]) {}
  Num* get() const {
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory_.get());
    return reinterpret_cast<Num*>((at + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<Num[]> memory_;
};

template <class T>
struct Forward {
  const AttentionKernels<T>& k;
  const std::vector<Tree>& trees;
  Numbers numbers;
  Heads<T> query, key, value, output;
  Wide<T>* lse;
  int64_t query_heads, key_heads, width, queries;

  struct Task {
    const Tree* tree;
    int64_t first, tokens, head, heads;  // of queries
  };

  int64_t group() const { return query_heads / key_heads; }

  // Those with the most keys first.
  std::vector<Task> tasks() const {
    const int64_t heads = std::min(group(), kAttentionRows), tokens = kAttentionRows / heads;
    std::vector<Task> found;
    for (const Tree& tree : trees) {
      const int64_t blocks = (tree.queries() + tokens - 1) / tokens;
      for (int64_t block = blocks; block-- > 0;) {
        const int64_t first = tree.query_start + block * tokens;
        for (int64_t head = 0; head < key_heads; ++head) {
          for (int64_t g = 0; g < group(); g += heads) {
            found.push_back({&tree, first, std::min(tokens, tree.query_end - first),
                             head * group() + g, std::min(heads, group() - g)});
          }
        }
      }
    }
    return found;
  }

  void attend(const Task& task, Wide<T>* scratch) const {
    AttentionBlock<T> block;
    const int64_t row = task.tree->row, key_head = task.head / group();
    block.width = width, block.rows = task.heads * task.tokens;
    block.scale = numbers.scale, block.softcap = numbers.softcap;
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t head = task.head + r / task.tokens, token = task.first + r % task.tokens;
      block.query[r] = query.at(row, head, token);
      block.output[r] = output.at(row, head, token);
      block.lse[r] = lse + (row * query_heads + head) * queries + token;
    }
    std::vector<AttentionRun<T>> runs;
    std::vector<std::vector<int32_t>> seen;  // from and to of each row, per run
    for (const KeyRun& run : task.tree->runs) {
      if (run.query_end <= task.first || run.query_start >= task.first + task.tokens) continue;
      std::vector<int32_t> from(block.rows, 0), to(block.rows, 0);
      for (int64_t r = 0; r < block.rows; ++r) {
        const int64_t i = task.first + r % task.tokens;
        if (i < run.query_start || i >= run.query_end) continue;
        const KeyRun::Seen keys = run.seen_by(i);
        from[r] = static_cast<int32_t>(keys.from), to[r] = static_cast<int32_t>(keys.to);
      }
      seen.push_back(std::move(from));
      seen.push_back(std::move(to));
      runs.push_back({key.at(row, key_head, run.key_start), value.at(row, key_head, run.key_start),
                      key.stride, value.stride, run.keys(), seen[seen.size() - 2].data(),
                      seen.back().data()});
    }
    k.forward(block, runs.data(), static_cast<int64_t>(runs.size()), scratch);
  }

  void run(bool alone) const {
    const std::vector<Task> all = tasks();
    const int64_t count = static_cast<int64_t>(all.size());
    share(count, alone, [&](Tickets& next, int64_t) {
      const Scratch<Wide<T>> scratch(attention_scratch_size(width));
      for (int64_t i; (i = next.take()) < count;) attend(all[i], scratch.get());
    });
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const AttentionKernels<T>& k, const Tensor& query,
                                           const Tensor& key, const Tensor& value,
                                           const Visible& visible, Numbers numbers) {
  const Sizes sizes = sizes_of(query, key, value);
  const bool is_double = query.scalar_type() == ScalarType::Double;
  Tensor output = token_major(query);
  std::vector<int64_t> shape = shape_of(query);
  shape.pop_back();
  Tensor lse = empty_cpu(shape, is_double ? ScalarType::Double : ScalarType::Float);
  const Tensor residue = empty_cpu({0}, query.scalar_type());
  if (query.numel() == 0) return {output, lse, residue};
  const std::vector<Tree> trees = trees_of(sizes, visible);
  const Forward<T> pass{k,
                        trees,
                        numbers,
                        Heads<T>(query),
                        Heads<T>(key),
                        Heads<T>(value),
                        Heads<T>(output),
                        mutable_ptr<Wide<T>>(lse),
                        query.size(1),
                        key.size(1),
                        query.size(3),
                        query.size(2)};
  pass.run(products_of(trees, query) < kSmall);
  return {output, lse, residue};
}

std::tuple<Tensor, Tensor, Tensor> attention_fwd_cpu(
    const Tensor& query, const Tensor& key, const Tensor& value,
    const std::optional<Tensor>& key_start, const std::optional<Tensor>& key_end,
    const std::optional<Tensor>& position_ids, const std::optional<Tensor>& visible_until,
    std::vector<Tensor> schedule, bool causal, double scale, std::optional<int64_t> window,
    std::optional<double> softcap, bool) {  // the backward pass sums delta itself
  const Visible visible{key_start, key_end, position_ids, schedule, causal, window};
  return with_kernels(query, [&](const auto& k) {
    return forward(k, query, key, value, visible, {scale, softcap.value_or(0.0)});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd_cpu));
}

}  // namespace fastrl

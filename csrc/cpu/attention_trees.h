// What attention works through on a CPU: trees of queries and keys that see but each other, and in
// each the runs of keys, with what each query sees of them: one interval a run. A layout's root
// with all that continues it is a tree, and its segments are the runs; without a layout a row of
// the batch is one, with the keys that exist.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "tensors.h"

namespace fastrl {

// The keys [key_start, key_end), of which query_start + i sees [from[i], to[i]), counted from
// key_start.
struct KeyRun {
  int64_t key_start, key_end, query_start, query_end;
  std::vector<int32_t> from, to;

  int64_t keys() const { return key_end - key_start; }
};

struct Tree {
  int64_t row, query_start, query_end;
  std::vector<KeyRun> runs;

  int64_t queries() const { return query_end - query_start; }
  int64_t pairs() const {
    int64_t sum = 0;
    for (const KeyRun& run : runs) {
      for (size_t i = 0; i < run.from.size(); ++i) sum += std::max(0, run.to[i] - run.from[i]);
    }
    return sum;
  }
};

struct Sizes {
  int64_t batch, queries, keys;
};

struct Visible {
  const std::optional<Tensor>&key_start, &key_end, &position_ids;
  const std::vector<Tensor>& schedule;
  bool causal;
  std::optional<int64_t> window;
};

// Of one row, the last query at the last key.
inline KeyRun run_of_row(int64_t start, int64_t end, int64_t queries, const Visible& v) {
  KeyRun run{start, end, 0, queries, {}, {}};
  run.from.reserve(queries), run.to.reserve(queries);
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t count = run.keys(), last = v.causal ? count - queries + i + 1 : count;
    const int64_t first = v.window && *v.window < last ? last - *v.window : 0;
    run.from.push_back(static_cast<int32_t>(first));
    run.to.push_back(static_cast<int32_t>(std::clamp<int64_t>(last, 0, count)));
  }
  return run;
}

inline std::vector<Tree> trees_of_rows(const Sizes& sizes, const Visible& v) {
  const auto bounds = [&](const std::optional<Tensor>& x) {
    STD_TORCH_CHECK(!x || (x->scalar_type() == ScalarType::Int && x->is_contiguous() &&
                           x->numel() == sizes.batch),
                    "attention: key_start and key_end must be contiguous int32, one a row");
    return ptr<int32_t>(x);
  };
  const int32_t *starts = bounds(v.key_start), *ends = bounds(v.key_end);
  std::vector<Tree> trees;
  for (int64_t b = 0; b < sizes.batch; ++b) {
    const int64_t start = starts ? std::clamp<int64_t>(starts[b], 0, sizes.keys) : 0;
    const int64_t end = ends ? std::clamp<int64_t>(ends[b], 0, sizes.keys) : sizes.keys;
    trees.push_back({b, 0, sizes.queries, {}});
    if (start < end) trees.back().runs.push_back(run_of_row(start, end, sizes.queries, v));
  }
  return trees;
}

// Queries from key_start on see the keys up to their own place: all, where they continue them.
inline void see_segment(KeyRun* run, const int64_t* positions, const Visible& v) {
  run->from.reserve(run->query_end - run->query_start);
  run->to.reserve(run->query_end - run->query_start);
  for (int64_t i = run->query_start; i < run->query_end; ++i) {
    const int64_t last = std::min(i + 1 - run->key_start, run->keys());
    int64_t first = 0;
    if (v.window) {
      // Along a path positions count up by one.
      const int64_t distance = positions[i] - positions[run->key_start];
      first = std::clamp<int64_t>(distance + 1 - std::min(*v.window, distance + 1), 0, last);
    }
    run->from.push_back(static_cast<int32_t>(first));
    run->to.push_back(static_cast<int32_t>(last));
  }
}

// A segment's triangle stands in the schedule before the rectangle of what continues it.
inline std::vector<Tree> trees_of_layout(const Sizes& sizes, const Visible& v) {
  const Tensor& parts = v.schedule[0];
  STD_TORCH_CHECK(parts.scalar_type() == ScalarType::Int && parts.is_contiguous() &&
                      parts.dim() == 2 && parts.size(1) == 5 && sizes.batch == 1 &&
                      sizes.queries == sizes.keys,
                  "attention: a schedule is [P, 5] int32, of one row");
  STD_TORCH_CHECK(!v.window || (v.position_ids && v.position_ids->is_contiguous() &&
                                v.position_ids->scalar_type() == ScalarType::Long &&
                                v.position_ids->numel() == sizes.queries),
                  "attention: a window needs the position_ids, int64, of a layout");
  const int64_t* positions = v.window ? ptr<int64_t>(v.position_ids) : nullptr;
  std::vector<Tree> trees;
  int64_t covered = 0;
  for (int64_t p = 0; p < parts.size(0); ++p) {
    const int32_t* part = ptr<int32_t>(parts) + 5 * p;
    if (part[0] >= part[1] || part[2] >= part[3]) continue;
    STD_TORCH_CHECK(part[2] >= 0, "attention: a schedule begins at 0");
    if (part[2] >= covered) {
      STD_TORCH_CHECK(part[0] == covered, "attention: a schedule leaves no query out");
      trees.push_back({0, covered, covered, {}});
    }
    std::vector<KeyRun>& runs = trees.back().runs;
    const bool goes_on = !runs.empty() && runs.back().key_start == part[2] &&
                         runs.back().key_end == part[3] && runs.back().query_end == part[0];
    if (goes_on) {
      runs.back().query_end = part[1];
    } else {
      runs.push_back({part[2], part[3], part[0], part[1], {}, {}});
    }
    covered = std::max<int64_t>(covered, part[1]);
    trees.back().query_end = covered;
    STD_TORCH_CHECK(trees.back().query_start <= part[2] && part[2] <= part[0] &&
                        part[3] <= covered && covered <= sizes.queries,
                    "attention: a schedule's keys stand before its queries");
  }
  STD_TORCH_CHECK(covered == sizes.queries, "attention: a schedule leaves no query out");
  for (Tree& tree : trees) {
    for (KeyRun& run : tree.runs) see_segment(&run, positions, v);
  }
  return trees;
}

inline std::vector<Tree> trees_of(const Sizes& sizes, const Visible& visible) {
  return visible.schedule.empty() ? trees_of_rows(sizes, visible) : trees_of_layout(sizes, visible);
}

}  // namespace fastrl

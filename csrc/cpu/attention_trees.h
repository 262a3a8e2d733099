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

// The keys [key_start, key_end) and the queries that see some of them. An interval follows from its
// query, and none is kept: a deep tree has as many as pairs of tokens.
struct KeyRun {
  int64_t key_start, key_end, query_start, query_end;
  // Where the keys of query_start end, and by how much later those of the next one do.
  int64_t first_end, step;
  std::optional<int64_t> window = std::nullopt;
  const int64_t* positions = nullptr;  // of a layout's tokens, where there is a window

  int64_t keys() const { return key_end - key_start; }

  struct Seen {
    int64_t from, to;
  };
  // Of query i, counted from key_start.
  Seen seen_by(int64_t i) const {
    const int64_t end = first_end + step * (i - query_start);
    const int64_t to = std::clamp<int64_t>(end, 0, keys());
    if (!window) return {0, to};
    // Along a path positions count up by one.
    const int64_t place = positions ? positions[i] - positions[key_start] + 1 : end;
    return {place > *window ? std::min(place - *window, to) : 0, to};
  }
};

struct Tree {
  int64_t row, query_start, query_end;
  std::vector<KeyRun> runs;

  int64_t queries() const { return query_end - query_start; }
  int64_t pairs() const {
    int64_t sum = 0;
    for (const KeyRun& run : runs) {
      for (int64_t i = run.query_start; i < run.query_end; ++i) {
        const KeyRun::Seen seen = run.seen_by(i);
        sum += seen.to - seen.from;
      }
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
    if (start >= end) continue;
    // The last query is at the last key.
    const int64_t count = end - start, first_end = v.causal ? count - sizes.queries + 1 : count;
    trees.back().runs.push_back({start, end, 0, sizes.queries, first_end, v.causal, v.window});
  }
  return trees;
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
      // Queries from key_start on see the keys up to their own place: all, where they continue
      // them.
      runs.push_back(
          {part[2], part[3], part[0], part[1], part[0] + 1 - part[2], 1, v.window, positions});
    }
    covered = std::max<int64_t>(covered, part[1]);
    trees.back().query_end = covered;
    STD_TORCH_CHECK(trees.back().query_start <= part[2] && part[2] <= part[0] &&
                        part[3] <= covered && covered <= sizes.queries,
                    "attention: a schedule's keys stand before its queries");
  }
  STD_TORCH_CHECK(covered == sizes.queries, "attention: a schedule leaves no query out");
  return trees;
}

inline std::vector<Tree> trees_of(const Sizes& sizes, const Visible& visible) {
  return visible.schedule.empty() ? trees_of_rows(sizes, visible) : trees_of_layout(sizes, visible);
}

}  // namespace fastrl

// One row's draw, from the row's maximum to the id: what is kept, by selection and without a sort,
// and the id whose cumulative mass exceeds u.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <type_traits>
#include <vector>

#include "logit_rows.h"

namespace fastrl {

template <class T>
const SampleKernels<T>& sample_kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return kernels().sample_f32;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return kernels().sample_bf16;
  } else {
    return kernels().sample_f16;
  }
}

template <class T>
struct LogitRow {
  const T* x;
  int64_t vocab;
  RowScale scale;
  double total;  // mass
  const SampleKernels<T>& k;

  double mass(double logit) const { return std::exp((logit - scale.max) / scale.temperature); }
};

struct Truncation {
  int64_t top_k;  // the vocabulary's size or more: none
  double top_p;   // 1: none
};

struct Entry {
  int64_t id;
  float logit;
  double mass;

  bool operator<(const Entry& other) const {  // the most likely first, of equals the lowest id
    return logit > other.logit || (logit == other.logit && id < other.id);
  }
};

struct Scratch {
  std::vector<Bin> bins;
  std::vector<Entry> entries;
  bool listed = false;  // the entries are all that is kept
  std::vector<float> maxima;
  std::vector<RowState> states;  // of the row's chunks
  std::vector<double> masses;    // and what of them is kept
};

// Where the running sum of `what`, from the maximum down, reaches the goal: the bin, and the sums
// before it. The last bin that holds anything if it never does.
struct Crossing {
  int bin = 0;
  Bin before = {0.0, 0.0};
};

inline Crossing crossing(const std::vector<Bin>& bins, double Bin::* what, double goal, int last) {
  Crossing found;
  Bin sum = {0.0, 0.0};
  for (int b = 0; b <= last; ++b) {
    if (bins[b].count == 0.0) continue;
    found = {b, sum};
    sum.mass += bins[b].mass;
    sum.count += bins[b].count;
    if (sum.*what >= goal) break;
  }
  return found;
}

// How many entries it takes, in order, until `before` and their weights reach the goal; all if they
// do not. Those come to stand first. There must be one entry.
template <class Weight>
int64_t select(std::vector<Entry>& entries, double before, double goal, Weight weight) {
  auto low = entries.begin(), high = entries.end();
  while (high - low > 1) {
    const auto middle = low + (high - low) / 2;
    std::nth_element(low, middle, high);
    double sum = before;
    for (auto e = low; e != middle; ++e) sum += weight(*e);
    if (sum < goal) {
      low = middle;
      before = sum;
    } else {
      high = middle;
    }
  }
  return low - entries.begin() + 1;
}

// list(x, n, ids): how many of n logits are wanted, and which.
template <class T, class List>
void list_entries(const LogitRow<T>& row, std::vector<Entry>& entries, List list) {
  entries.clear();
  int64_t ids[kSampleBlock];
  for (int64_t start = 0; start < row.vocab; start += kSampleBlock) {
    const T* x = row.x + start;
    const int64_t count = list(x, std::min(kSampleBlock, row.vocab - start), ids);
    for (int64_t i = 0; i < count; ++i) {
      const float logit = static_cast<float>(Forward::value(x[ids[i]]));
      entries.push_back({start + ids[i], logit, row.mass(logit)});
    }
  }
}

inline double one(const Entry&) { return 1.0; }
inline double mass(const Entry& e) { return e.mass; }

inline double sum_of_masses(const std::vector<Entry>& entries) {
  double sum = 0.0;
  for (const Entry& e : entries) sum += e.mass;
  return sum;
}

inline Kept up_to(const Entry& e) { return {e.logit, e.id}; }

// A top_k that is small beside the vocabulary: the top_k-th of the blocks' maxima is a logit that
// top_k reach, and few more do. These are listed, and nothing else is looked at again.
template <class T>
Kept truncate_short(const LogitRow<T>& row, const Truncation& cut, Scratch& scratch) {
  auto& entries = scratch.entries;
  auto& maxima = scratch.maxima;
  maxima.resize((row.vocab + kSampleBlock - 1) / kSampleBlock);
  row.k.block_maxima(row.x, row.vocab, maxima.data());
  const auto kth = maxima.begin() + (cut.top_k - 1);
  std::nth_element(maxima.begin(), kth, maxima.end(), std::greater<float>());
  list_entries(row, entries, [&](const T* x, int64_t n, int64_t* ids) {
    return row.k.list_kept(x, n, {*kth, n}, 0, ids);
  });
  entries.resize(select(entries, 0.0, static_cast<double>(cut.top_k), one));
  if (cut.top_p < 1.0) {
    const double goal = cut.top_p * sum_of_masses(entries);
    entries.resize(select(entries, 0.0, goal, mass));
  }
  scratch.listed = true;
  return up_to(entries.back());
}

// A logit with less below it than half of what top_p leaves out, even if all of the row stood
// there.
template <class T>
float top_p_floor(const LogitRow<T>& row, double top_p) {
  if (top_p > 0.9999) return -INFINITY;  // nearly all is kept, and rounding must not matter
  const double gap = std::log(2.0 * row.vocab / ((1.0 - top_p) * row.total));
  const double floor = row.scale.max - gap * row.scale.temperature;
  return std::nextafter(static_cast<float>(floor), -INFINITY);
}

// top_k, then top_p of what it leaves. Only the bin in which each of them ends is looked into.
template <class T>
Kept truncate(const LogitRow<T>& row, const Truncation& cut, Scratch& scratch) {
  const bool cuts_k = cut.top_k < row.vocab;
  if (cuts_k && cut.top_k * kSampleBlock <= row.vocab) return truncate_short(row, cut, scratch);
  auto& bins = scratch.bins;
  auto& entries = scratch.entries;
  scratch.listed = false;
  bins.assign(kBins + kSpareBins, {0.0, 0.0});
  const float floor = cuts_k ? -INFINITY : top_p_floor(row, cut.top_p);
  row.k.add_to_bins(row.x, row.vocab, floor, row.scale, bins.data());
  const auto list_bin = [&](int bin) {
    list_entries(row, entries, [&](const T* x, int64_t n, int64_t* ids) {
      return row.k.list_bin(x, n, row.scale, bin, ids);
    });
  };
  Kept kept;
  int last = kBins - 1;
  double total = row.total;
  if (cuts_k) {
    const double goal = static_cast<double>(cut.top_k);
    const Crossing end = crossing(bins, &Bin::count, goal, last);
    list_bin(end.bin);
    entries.resize(select(entries, end.before.count, goal, one));
    kept = up_to(entries.back());
    last = end.bin;
    bins[last] = {sum_of_masses(entries), static_cast<double>(entries.size())};
    total = end.before.mass + bins[last].mass;
  }
  if (cut.top_p < 1.0) {
    const double goal = cut.top_p * total;
    const Crossing end = crossing(bins, &Bin::mass, goal, last);
    if (!cuts_k || end.bin != last) list_bin(end.bin);  // else they are listed, and cut by top_k
    kept = up_to(entries[select(entries, end.before.mass, goal, mass) - 1]);
  }
  return kept;
}

template <class T>
int64_t first_maximum(const LogitRow<T>& row) {
  int64_t ids[kSampleBlock];
  for (int64_t start = 0; start < row.vocab; start += kSampleBlock) {
    const T* x = row.x + start;
    const int64_t n = std::min(kSampleBlock, row.vocab - start);
    const Kept maximum{row.scale.max, n};
    if (row.k.list_kept(x, n, maximum, start, ids) > 0) return ids[0];
  }
  return 0;
}

// The first of the masses with which `before` exceeds the threshold; the last that is not 0 if
// rounding leaves them below.
inline int64_t first_above(const float* masses, int64_t n, double before, double threshold) {
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (masses[i] == 0.0f) continue;
    before += masses[i];
    last = i;
    if (before > threshold) break;
  }
  return last;
}

// The first id with which the mass of the kept ids, in id order, exceeds u of them all.
inline int64_t draw_listed(std::vector<Entry>& entries, double u) {
  const auto by_id = [](const Entry& a, const Entry& b) { return a.id < b.id; };
  std::sort(entries.begin(), entries.end(), by_id);
  const double threshold = u * sum_of_masses(entries);
  double sum = 0.0;
  for (const Entry& e : entries) {
    sum += e.mass;
    if (sum > threshold) return e.id;
  }
  return entries.back().id;  // never: the sum of them all is that of which u < 1 is a part
}

// The same where nothing is listed. `chunks` are the masses of the stretches of kVocabChunk
// columns, so that only one of these is summed again.
template <class T>
int64_t draw(const LogitRow<T>& row, const Kept& kept, const std::vector<double>& chunks,
             double u) {
  double total = 0.0, before = 0.0;
  for (const double mass : chunks) total += mass;
  const double threshold = u * total;
  int64_t start = 0;
  for (const double mass : chunks) {
    if (before + mass > threshold) break;
    before += mass;
    start += kVocabChunk;
  }
  float masses[kSampleBlock];
  int64_t last = -1;  // a block with mass that ends at the threshold or below
  for (; start < row.vocab; start += kSampleBlock) {
    const int64_t n = std::min(kSampleBlock, row.vocab - start);
    const double mass = row.k.kept_block(row.x + start, n, kept.from(start), row.scale, masses);
    if (before + mass > threshold) return start + first_above(masses, n, before, threshold);
    before += mass;
    if (mass > 0.0) last = start;
  }
  // A chunk may have a mass in double although each of its masses is 0 in float.
  if (last < 0) return first_maximum(row);
  const int64_t n = std::min(kSampleBlock, row.vocab - last);
  row.k.kept_block(row.x + last, n, kept.from(last), row.scale, masses);
  return last + first_above(masses, n, 0.0, INFINITY);
}

}  // namespace fastrl

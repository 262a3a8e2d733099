// Rows, chunks of rows and threads around the scan of the returns.
#include "returns.h"

#include <memory>

namespace fastrl {
namespace {

constexpr int64_t kGrain = 8192;  // steps that are worth a thread

using torch::stable::get_num_threads;
using torch::stable::parallel_for;

// Rows side by side that are scanned together.
int64_t rows_together(const Rows& rows) {
  if (!rows.time_major()) return 1;
  const int64_t share = (rows.count() + get_num_threads() - 1) / get_num_threads();
  return std::min<int64_t>(kRowsTogether, (share + 15) / 16 * 16);
}

// x before each of the piece's rows, in the scan's order.
void write_rows(const Scan& scan, const Trajectories& x, const Piece& p) {
  double before[kRowsTogether];
  Affine found[kRowsTogether];
  for (int l = 0; l < p.count; ++l) before[l] = scan.before(x, p, l);
  scan.write(x, p, before, found);
}

void each_row_whole(const Scan& scan, const Trajectories& x, const Rows& rows, int64_t together) {
  if (!rows.time_major()) {
    parallel_for(0, rows.num_steps(), kGrain, [&](int64_t from, int64_t to) {
      const int64_t last = to == rows.num_steps() ? rows.count() : rows.first_from(to);
      // In the scan's order, so that memory is one stream from row to row.
      const int64_t first = rows.first_from(from);
      for (int64_t i = 0; i < last - first; ++i) {
        write_rows(scan, x, rows.piece(scan.forward_in_time ? first + i : last - 1 - i));
      }
    });
    return;
  }
  const int64_t groups = (rows.count() + together - 1) / together;
  const int64_t grain = std::max<int64_t>(1, kGrain / (together * rows.length(0)));
  parallel_for(0, groups, grain, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
      const int64_t count = std::min(together, rows.count() - g * together);
      write_rows(scan, x, rows.piece(g * together, static_cast<int>(count)));
    }
  });
}

// A stretch of a row, of kRowChunk steps at most.
struct Chunk {
  Piece piece;
  bool first, last;      // of its row, in the scan's order
  int64_t steps_before;  // of all chunks before this one
};

std::vector<Chunk> chunks_of(const Scan& scan, const Rows& rows, int64_t together) {
  std::vector<Chunk> chunks;
  int64_t steps = 0;
  for (int64_t s = 0; s < rows.count(); s += together) {
    const Piece row = rows.piece(s, static_cast<int>(std::min(together, rows.count() - s)));
    for (int64_t done = 0; done < row.length; done += kRowChunk) {
      const int64_t n = std::min(kRowChunk, row.length - done);
      Chunk c{row, done == 0, done + n == row.length, steps};
      c.piece.begin = scan.forward_in_time ? done : row.length - done - n;
      c.piece.end = c.piece.begin + n;
      chunks.push_back(c);
      steps += n * row.count;
    }
  }
  return chunks;
}

// Long rows by their chunks. Threads share the steps. Where a thread meets the beginning of a row's
// scan, it writes from there on; until then it finds out what the chunks add up to. Then it is
// known what comes before each, and they are written too.
void chunk_by_chunk(const Scan& scan, const Trajectories& x, const Rows& rows, int64_t together) {
  const std::vector<Chunk> chunks = chunks_of(scan, rows, together);
  const int64_t count = static_cast<int64_t>(chunks.size()), threads = get_num_threads();
  std::vector<Affine> found(count * together);
  std::vector<double> before(count * together);
  const auto find_before = [&](int64_t i) {
    for (int64_t l = 0; l < chunks[i].piece.count; ++l) {
      const int64_t at = i * together + l, earlier = at - together;
      before[at] = chunks[i].first ? scan.before(x, chunks[i].piece, static_cast<int>(l))
                                   : scan.after(found[earlier], before[earlier]);
    }
  };
  // Of a single row the first thread writes all of its share, which takes longer than adding up.
  constexpr double kCompose = 0.6;
  const double whole = static_cast<double>(rows.num_steps());
  const double head = whole * (chunks[0].piece.length * chunks[0].piece.count == rows.num_steps()
                                   ? kCompose / (threads - 1 + kCompose)
                                   : 1.0 / threads);
  const auto share = [&](int64_t thread) {
    if (thread == 0) return int64_t{0};
    return static_cast<int64_t>(head +
                                (thread - 1) * (whole - head) / std::max<int64_t>(1, threads - 1));
  };
  std::vector<char> written(count, false);
  parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    const auto is_before = [](const Chunk& c, int64_t step) { return c.steps_before < step; };
    const auto at = [&](int64_t step) {
      return std::lower_bound(chunks.begin(), chunks.end(), step, is_before) - chunks.begin();
    };
    const int64_t start = at(share(from)), end = to == threads ? count : at(share(to));
    for (int64_t i = start; i < end; ++i) {
      const bool goes_on = i > start && written[i - 1];
      if (chunks[i].first || goes_on) {
        find_before(i);
        scan.write(x, chunks[i].piece, &before[i * together], &found[i * together]);
        written[i] = true;
      } else if (!chunks[i].last) {
        scan.compose(x, chunks[i].piece, &found[i * together]);
      }
    }
  });
  std::vector<int64_t> left;
  for (int64_t i = 0; i < count; ++i) {
    if (written[i]) continue;
    find_before(i);
    left.push_back(i);
  }
  parallel_for(0, static_cast<int64_t>(left.size()), 1, [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      const int64_t i = left[k];
      scan.write(x, chunks[i].piece, &before[i * together], &found[i * together]);
    }
  });
}

}  // namespace

// By chunks some inputs are read twice, but no thread waits for one with a long row.
void run(const Scan& scan, const Trajectories& x, const Rows& rows) {
  if (rows.num_steps() == 0) return;
  const int64_t together = rows_together(rows), threads = get_num_threads();
  const int64_t longest = rows.longest(), share = rows.num_steps() / threads;
  const int64_t groups = (rows.count() + together - 1) / together;
  const int64_t most =
      rows.packed() ? share + longest : (groups + threads - 1) / threads * together * longest;
  if (longest > kRowChunk && 2 * most > 3 * share) {
    chunk_by_chunk(scan, x, rows, together);
  } else {
    each_row_whole(scan, x, rows, together);
  }
}

void run_windows(Windows windows, int64_t scratch_per_step, const Trajectories& x, const Rows& rows,
                 int64_t n) {
  if (rows.num_steps() == 0) return;
  const int64_t together = rows.time_major() ? kWindowRows : 1;
  const int64_t groups = (rows.count() + together - 1) / together;
  const int64_t grain = std::max<int64_t>(1, kGrain * groups / rows.num_steps());
  const int64_t scratch_size = scratch_per_step * rows.longest() * together;
  parallel_for(0, groups, grain, [&](int64_t first, int64_t last) {
    // Not cleared, which would take a tenth of a long row's time.
    const std::unique_ptr<double[]> scratch(new double[scratch_size]);
    for (int64_t g = first; g < last; ++g) {
      const int64_t count = std::min(together, rows.count() - g * together);
      windows(x, rows.piece(g * together, static_cast<int>(count)), n, scratch.get());
    }
  });
}

}  // namespace fastrl

// Which steps a warp scans next.
//
// All steps of a call stand in one line, cut into windows of 2048; a block has a window, each of
// its 8 warps a stretch of 256. To a window or stretch belong the rows, and the chunks of 2048
// steps of longer rows, whose first step in the order of the scan lies in it. Rows of up to a tile
// of 256 steps share a warp's lanes with their neighbours. What is longer goes to the whole block,
// tile by tile.
#pragma once

#include "tile.cuh"

namespace fastrl::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kChunk = kTile * kWarps;
constexpr int kPieces =
    2;  // longer than a tile: a row's first chunk, and the last one of the next row
static_assert(kWarps * kPieces <= kLanes);

// A row, or a chunk of one.
struct Piece {
  int64_t row, begin, length, chunk;

  FASTRL_DEVICE int tiles() const {
    return static_cast<int>((smaller(kChunk, length - chunk * kChunk) + kTile - 1) / kTile);
  }
};

// The chunk of the row whose first step lies in start .. start + width - 1, if one does.
template <bool kForwardInTime>
FASTRL_DEVICE bool find_chunk(Piece& p, int64_t start, int64_t width) {
  const int64_t last = p.begin + p.length - 1, stop = start + width;
  if (kForwardInTime ? p.begin >= stop : last < start) return false;
  p.chunk = (kForwardInTime ? stop - 1 - p.begin : last - start) / kChunk;
  const int64_t first = kForwardInTime ? p.begin + p.chunk * kChunk : last - p.chunk * kChunk;
  return start <= first && first < stop && p.chunk * kChunk < p.length;
}

// What is to be done lies here, so that the registers are the tiles'.
struct Shared {
  int64_t window;
  int64_t next_row[kWarps];  // of each stretch; behind its last one: -1
  int found[kWarps];
  Piece pieces[kWarps * kPieces];  // longer than a tile, as many as `found` of each stretch
  struct {
    Piece piece;  // of length 0 where there is nothing for the warp
    int first;    // tile of the same piece
  } assigned[kWarps];
  Piece chained;  // of these pieces that which is a chunk of a longer row
  int chained_first, chained_tiles;
  bool is_last;
  Affine tiles[kWarps];
  Affine spans[kWarps];
  double before;
};

FASTRL_DEVICE int warp_of_thread() { return threadIdx.x / kLanes; }

FASTRL_DEVICE int sum_up_to_lane(int n) {
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    const int below = __shfl_up_sync(kAllLanes, n, lanes);
    if (lane_of_thread() >= lanes) n += below;
  }
  return n;
}

template <bool kForwardInTime>
class Stretch {
 public:
  FASTRL_DEVICE Stretch(Shared& shared, const Rows& rows) : shared_(shared), rows_(rows) {}

  FASTRL_DEVICE void begin() const {
    const int64_t row = start() < rows_.total ? rows_.at(start()) : -1;
    if (lane_of_thread() == 0) {
      shared_.next_row[warp_of_thread()] = row;
      shared_.found[warp_of_thread()] = 0;
    }
    __syncwarp();
  }

  // Fills the lanes with short rows. False where none is left; then `pieces` has the longer ones.
  FASTRL_DEVICE bool next(Place& place) const {
    for (int64_t next; (next = shared_.next_row[warp_of_thread()]) >= 0;) {
      const int64_t row = next + lane_of_thread();
      Piece piece{row, rows_.begin(row), rows_.begin(row + 1), 0};
      const bool inside = row < rows_.count && piece.begin < stop();
      piece.length = inside ? piece.length - piece.begin : 0;
      const bool mine = piece.length > 0 && find_chunk<kForwardInTime>(piece, start(), kTile);
      const bool is_short = mine && piece.length <= kTile;
      const int lanes = is_short ? static_cast<int>(piece.length + kSteps - 1) / kSteps : 0;
      const bool fills = __any_sync(kAllLanes, is_short);
      const int taken = fills ? lay_out(piece, lanes, place) : kLanes;
      note(mine && !is_short && lane_of_thread() < taken, piece);
      skip(next, piece, inside, taken);
      if (fills) return true;
    }
    return false;
  }

 private:
  FASTRL_DEVICE int64_t start() const { return shared_.window * kChunk + warp_of_thread() * kTile; }
  FASTRL_DEVICE int64_t stop() const { return start() + kTile; }

  // As many of the rows, of which a lane each knows, as fit side by side into `lanes` each. Gives
  // their number.
  FASTRL_DEVICE int lay_out(const Piece& own, int lanes, Place& place) const {
    const int lane = lane_of_thread(), lanes_to = sum_up_to_lane(lanes);
    const int taken = __popc(__ballot_sync(kAllLanes, lanes_to <= kLanes));
    int from = 0;  // the lane that knows of this lane's row: the first whose sum is above `lane`
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      if (__shfl_sync(kAllLanes, lanes_to, from + step - 1) <= lane) from += step;
    }
    const int64_t row = __shfl_sync(kAllLanes, own.row, from);
    const int64_t begin = __shfl_sync(kAllLanes, own.begin, from);
    const int64_t length = __shfl_sync(kAllLanes, own.length, from);
    const int before = lane - __shfl_sync(kAllLanes, lanes_to - lanes, from);
    place = {0, 0, 0, 0, 0};
    if (lane < __shfl_sync(kAllLanes, lanes_to, taken - 1)) {
      place = {row, rows_.index(row, begin), length, before * kSteps, before};
    }
    return taken;
  }

  FASTRL_DEVICE void note(bool is_long, const Piece& piece) const {
    const unsigned lanes = __ballot_sync(kAllLanes, is_long);
    int& found = shared_.found[warp_of_thread()];
    const int at = found + __popc(lanes & lanes_below(lane_of_thread()));
    if (is_long && at < kPieces) shared_.pieces[warp_of_thread() * kPieces + at] = piece;
    __syncwarp();
    if (lane_of_thread() == 0) found = static_cast<int>(smaller(kPieces, found + __popc(lanes)));
  }

  // Behind the rows that were looked at; over any number of empty ones at once.
  FASTRL_DEVICE void skip(int64_t next, const Piece& piece, bool inside, int taken) const {
    const bool all_inside = __all_sync(kAllLanes, inside);
    const bool all_empty = __all_sync(kAllLanes, piece.length == 0);
    next = taken < kLanes || all_inside ? next + taken : -1;
    if (all_inside && all_empty) {
      next = larger(next, rows_.at(__shfl_sync(kAllLanes, piece.begin, kLanes - 1)));
    }
    __syncwarp();
    if (lane_of_thread() == 0) shared_.next_row[warp_of_thread()] = next;
    __syncwarp();
  }

  Shared& shared_;
  const Rows& rows_;
};

// The block's longer pieces, as many at a time as fit into its tiles: each in one go, because its
// steps stay in registers until what comes before them is known. By the first warp, for all.
class Pieces {
 public:
  template <bool kForwardInTime>
  FASTRL_DEVICE void assign(Shared& shared, const Rows& rows) {
    const int lane = lane_of_thread();
    Piece piece{0, 0, 0, 0};
    if (rows.cu_seqlens) {
      if (lane < kWarps * kPieces && lane % kPieces < shared.found[lane / kPieces]) {
        piece = shared.pieces[lane];
      }
    } else {
      const int64_t start = shared.window * kChunk;
      piece = {start / rows.length + lane, 0, rows.length, 0};
      piece.begin = piece.row * rows.length;
      if (piece.row >= rows.count || !find_chunk<kForwardInTime>(piece, start, kChunk)) {
        piece.length = 0;
      }
    }
    const int tiles = piece.length > 0 ? piece.tiles() : 0;
    const int tiles_to = sum_up_to_lane(tiles), done = done_;
    const unsigned fit = __ballot_sync(kAllLanes, tiles_to - done <= kWarps);
    done_ = __shfl_sync(kAllLanes, tiles_to, __popc(fit) - 1);
    const int first = tiles_to - tiles - done;
    if (lane < kWarps) shared.assigned[lane].piece.length = 0;
    if (lane == 0) shared.chained_tiles = 0;
    __syncwarp();
    if (tiles > 0 && done < tiles_to && tiles_to <= done_) {
      for (int i = first; i < first + tiles; ++i) shared.assigned[i] = {piece, first};
      // Of longer rows there is at most one chunk: where those of two begin in one window, the
      // first in the order of the scan is whole and fills the block.
      if (piece.length > kChunk) {
        shared.chained = piece;
        shared.chained_first = first;
        shared.chained_tiles = tiles;
      }
    }
    const int all = __shfl_sync(kAllLanes, tiles_to, kLanes - 1);
    if (lane == 0) shared.is_last = done_ == all;
  }

 private:
  int done_ = 0;  // tiles
};

// The thread's place in its warp's tile. `first`: of the block's tiles the first of the same piece.
FASTRL_DEVICE Place assigned_place(const Shared& shared, const Rows& rows, int& first) {
  const int tile = warp_of_thread(), lane = lane_of_thread();
  const Piece& p = shared.assigned[tile].piece;
  if (p.length == 0) {
    first = tile;
    return {0, 0, 0, 0, 0};
  }
  first = shared.assigned[tile].first;
  return {p.row, rows.index(p.row, p.begin), p.length,
          p.chunk * kChunk + (tile - first) * kTile + lane * kSteps, lane};
}

}  // namespace fastrl::cuda

// The scan over pieces of rows, chunk by chunk: what the table of kernels offers for each
// estimator. Included by kernels_*.cpp after returns_kernel.h.

namespace fastrl::FASTRL_SIMD {

// body(t, steps) for the vectors of steps [begin, end) in the scan's order; the last one may reach
// over the end of the row, or of the piece.
template <class E, class Body>
FASTRL_INLINE void for_each_vector(int64_t begin, int64_t end, Body body) {
  const int64_t whole = (end - begin) / kDoubles, rest = (end - begin) % kDoubles;
  for (int64_t k = 0; k < whole; ++k) {
    body(E::kForwardInTime ? begin + k * kDoubles : end - (k + 1) * kDoubles, Present{0, kDoubles});
  }
  const int left = static_cast<int>(rest);
  if (left == 0) return;
  if (E::kForwardInTime) {
    body(end - left, Present{0, left});
  } else {
    body(begin + left - kDoubles, Present{kDoubles - left, left});
  }
}

// The value that the first step of the scan sees as v_{t+1}: that of the next action behind the
// piece, or bootstrap_value.
template <class E>
inline double value_behind(const Trajectories& row, const Piece& p, int lane) {
  if (!kLooksAhead<E> || row.next_values.data) return 0.0;
  const int64_t t = next_action(row, p.end, p.length, lane);
  if (t < p.length) return value_at(row.values, place(row, row.values.stride, t, lane));
  return row.bootstrap_value.data ? value_at(row.bootstrap_value, p.number + lane) : 0.0;
}

template <class E, bool kWrite, bool kPlain>
__attribute__((noinline)) void scan_row(const Trajectories& x, int64_t begin, int64_t end,
                                        const Clips& clips, Carry& at_start) {
  Trajectories row = x;  // a copy that no store can change
  if constexpr (kPlain) assume_plain(row);
  Carry carry = at_start;
  // exp takes about as long as all that waits for it: it runs one vector ahead.
  constexpr bool kRatio = kPlain && (E::kReads & kLogRatio) != 0;
  constexpr Present kWhole{0, kDoubles};
  const int64_t first = E::kForwardInTime ? begin : end - kDoubles;
  VecD ratio = {};
  if (kRatio && end - begin >= kDoubles) ratio = load_ratio<true>(row.log_ratio, first, kWhole);
  for_each_vector<E>(begin, end, [&](int64_t t, const Present& in) __attribute__((always_inline)) {
    if (__builtin_expect(in.count < kDoubles, false)) {
      scan_lanes<E, false, kWrite>(row, t, in, clips, carry);
    } else if constexpr (kRatio) {
      const VecD now = ratio;
      const int64_t next = t - kStepBack<E> * kDoubles;
      if (next >= begin && next + kDoubles <= end) {
        ratio = load_ratio<true>(row.log_ratio, next, kWhole);
      }
      scan_lanes<E, true, kWrite>(row, t, in, clips, carry, &now);
    } else {
      scan_lanes<E, true, kWrite>(row, t, in, clips, carry);
    }
  });
  at_start = carry;
}

template <class E, bool kWrite>
__attribute__((noinline)) void scan_rows_together(const Trajectories& x, int64_t begin, int64_t end,
                                                  int count, const Clips& clips, Carry* carries) {
  const Trajectories rows = x;
  for_each_vector<E>(
      begin, end, [&](int64_t t, const Present& steps) __attribute__((always_inline)) {
        for (int lane = 0; lane < count; lane += kDoubles) {
          const int lanes = std::min(kDoubles, count - lane);
          Carry& carry = carries[lane / kDoubles];
          const int64_t ahead = t - kStepBack<E> * kDoubles;
          if (lane % 16 == 0 && ahead >= begin && ahead + kDoubles <= end) {
            prefetch_steps(rows, ahead, lane);
          }
          if (lanes == kDoubles) {
            scan_vectors<E, true, kWrite>(rows, t, lane, steps, {0, lanes}, clips, carry);
          } else {
            scan_vectors<E, false, kWrite>(rows, t, lane, steps, {0, lanes}, clips, carry);
          }
        }
      });
}

// A piece chunk by chunk in the scan's order. begin(lane) is what its rows' scans start from;
// end(lane, a, b) is told what the last chunk added up to.
template <class E, bool kWrite, class Begin, class End>
inline void scan_chunks(const Trajectories& x, const Piece& p, Carry* carries, Begin begin,
                        End end) {
  const Clips clips{x.rho_clip, x.c_clip};
  const Trajectories row = from_row(x, p.row, p.origin);
  const bool plain = is_plain(row);
  for (int lane = 0; lane < p.count; ++lane) {
    Carry& carry = carries[lane / kDoubles];
    const double value = value_behind<E>(row, p, lane), before = begin(lane);
    carry.later = x.time_major ? carry.later : splat_double(value);
    carry.x = x.time_major ? carry.x : splat_double(before);
    carry.later[lane % kDoubles] = value;
    carry.x[lane % kDoubles] = before;
  }
  for (int64_t done = 0; done < p.end - p.begin; done += kRowChunk) {
    const int64_t n = std::min(kRowChunk, p.end - p.begin - done);
    const int64_t first = E::kForwardInTime ? p.begin + done : p.end - done - n;
    for (int lane = 0; done > 0 && lane < p.count; lane += kDoubles) {
      carries[lane / kDoubles].next_chunk();
    }
    if (x.time_major) {
      scan_rows_together<E, kWrite>(row, first, first + n, p.count, clips, carries);
    } else if (plain) {
      scan_row<E, kWrite, true>(row, first, first + n, clips, carries[0]);
    } else {
      scan_row<E, kWrite, false>(row, first, first + n, clips, carries[0]);
    }
  }
  for (int lane = 0; lane < p.count; ++lane) {
    const Carry& carry = carries[lane / kDoubles];
    double a = carry.a[lane % kDoubles];
    if (!kWrite && a == 0.0) {
      const VecL zero = carry.least == 0.0;
      const bool cut = x.time_major ? zero[lane % kDoubles] != 0 : any(zero);
      a = cut ? 0.0 : kLeastFactor;
    }
    end(lane, a, carry.b[lane % kDoubles]);
  }
}

template <class E, bool kWrite, class Begin, class End>
inline void scan_piece(const Trajectories& x, const Piece& p, Begin begin, End end) {
  if (x.time_major) {
    Carry carries[kRowsTogether / kDoubles];
    scan_chunks<E, kWrite>(x, p, carries, begin, end);
  } else {
    Carry carry;
    scan_chunks<E, kWrite>(x, p, &carry, begin, end);
  }
}

template <class E>
void compose(const Trajectories& x, const Piece& p, Affine* found) {
  scan_piece<E, false>(
      x, p, [](int) { return 0.0; }, [&](int lane, double a, double b) { found[lane] = {a, b}; });
}

template <class E>
void write(const Trajectories& x, const Piece& p, const double* before, Affine* found) {
  scan_piece<E, true>(
      x, p, [&](int lane) { return before[lane]; },
      [&](int lane, double a, double b) { found[lane] = {a, b}; });
}

inline double after(const Affine& chunk, double x) {
  return apply<true>(splat_double(chunk.a), splat_double(chunk.b), splat_double(x))[0];
}

// 0; or the value behind the row, bootstrap_value or next_values at its last action.
template <class E>
double before(const Trajectories& x, const Piece& p, int lane) {
  if constexpr (E::kEndsOnValue) {
    if (x.bootstrap_value.data) return value_at(x.bootstrap_value, p.number + lane);
    if (!x.next_values.data) return 0.0;
    const Trajectories row = from_row(x, p.row, p.origin);
    const int64_t t = last_action(row, p.length, lane);
    return t < 0 ? 0.0 : value_at(row.next_values, place(row, row.next_values.stride, t, lane));
  }
  return 0.0;
}

template <class E>
constexpr Scan kScan = {&compose<E>, &write<E>, &after, &before<E>, E::kForwardInTime};

}  // namespace fastrl::FASTRL_SIMD

// What the kernels of estimators over trajectories are given, and their part of the table.
#pragma once

#include <cstdint>

namespace fastrl {

// Arrays of a call on trajectories: [rows, steps], the steps of a row or the rows of a step side by
// side. Null data: the argument was not given.
enum class Float : int32_t { f32, f64, bf16, f16 };
struct Floats {
  const void* data = nullptr;
  Float type = Float::f32;
  int64_t stride = 0;  // from one row to the next; of `time_major` from one step to the next
};
struct Flags {
  const uint8_t* data = nullptr;
  int64_t stride = 0;
};
struct Results {
  void* data = nullptr;
  Float type = Float::f32;  // f32 or f64
  int64_t stride = 0;
};

// What the estimators read and write; the names are those of csrc/estimators.h.
struct Trajectories {
  Floats rewards, values, next_values, q_values, log_ratio;
  Floats grad_first, grad_second, td_error, carried;
  Floats gamma, gae_lambda;  // per step; null: the two numbers
  Flags terminated, truncated, mask;
  Floats bootstrap_value;  // one number a row
  double constant_gamma = 1.0, constant_lambda = 1.0, rho_clip = 1.0, c_clip = 1.0;
  Results results[4];
  bool time_major = false;

  // Of value_grads: whether a value is learned through its own step as well as through the step
  // before, whether next values count at truncations alone, whether there are next_values; and
  // where what flows to bootstrap_value goes, one number a row.
  bool own = false, only_at_cuts = false, has_next_values = false;
  Results to_bootstrap_value;
};

// Steps `begin` to `end` of one row, or of `count` rows side by side where time_major. Step 0 of
// the row stands at row * stride + origin: of a packed batch row is 0, of a dense one origin.
struct Piece {
  int64_t row, origin, number;  // number: which row or segment it is
  int64_t length;               // of the whole row
  int64_t begin, end;
  int count = 1;
};

// x -> b + a x: what a stretch of a row does to what comes before it in the scan.
struct Affine {
  double a, b;
};

// A row is scanned in stretches of this many steps, from where its scan begins, whoever computes
// them: the result depends neither on the number of threads nor on the rest of the batch.
constexpr int64_t kRowChunk = 16384;
constexpr int kRowsTogether = 256;  // of time_major rows, at most

constexpr int kWindowScratch = 6;
constexpr int kWindowRows = 8;  // of time_major rows, at most

struct Scan {
  // What a piece of one chunk at most adds up to; of each of the rows.
  void (*compose)(const Trajectories&, const Piece&, Affine*);
  // Writes the results of a piece that begins with a chunk (in the scan's direction), and what its
  // last chunk adds up to; x is what comes before the piece in the scan, for each of the rows.
  void (*write)(const Trajectories&, const Piece&, const double* x, Affine*);
  // What comes after a stretch, given what comes before it: as `write` itself works it out.
  double (*after)(const Affine&, double x);
  // What comes before row p.row + lane in the scan.
  double (*before)(const Trajectories&, const Piece& p, int lane);
  bool forward_in_time;
};

struct ReturnsKernels {
  Scan gae, lambda_returns, discounted_returns, vtrace, retrace_returns;
  Scan td_bwd, vtrace_bwd, retrace_returns_bwd;
  Scan value_grads;  // of grad_first: grad_rewards, grad_second: grad_returns, carried: grad_next
  // A whole row, or rows together; scratch: kWindowScratch doubles for each of their steps, of the
  // backward pass twice as many.
  void (*n_step_returns)(const Trajectories&, const Piece&, int64_t n, double* scratch);
  void (*n_step_returns_bwd)(const Trajectories&, const Piece&, int64_t n, double* scratch);
};

}  // namespace fastrl

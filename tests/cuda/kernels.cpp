// The kernels of csrc/cuda in the emulator, for ctypes.
#include "cuda/n_step_returns.cuh"
#include "cuda/scan.cuh"
#include "cuda/value_grads.cuh"

using namespace fastrl::cuda;

namespace {

struct CArray {
  void* data;
  int64_t row_stride, step_stride;
};

}  // namespace

// emulator.py has the same.
struct Call {
  const int32_t* cu_seqlens;
  int64_t count, length, total;
  CArray reward, value, next_value, q_value, log_ratio, gamma, gae_lambda, bootstrap, grad_first,
      grad_second, td_error, carried, terminated, truncated, mask, out[4];
  double constant_gamma, constant_lambda, rho_clip, c_clip;
  int64_t n, flags;
  int32_t workers, seed;
};

namespace {

template <class T>
Array<T> array(const CArray& x) {
  return {static_cast<T*>(x.data), x.row_stride, x.step_stride};
}

Rows rows_of(const Call& c) { return {c.cu_seqlens, c.count, c.length, c.total}; }

template <class T>
Trajectories<T> trajectories(const Call& c) {
  using R = Result<T>;
  Trajectories<T> x{rows_of(c),
                    array<const T>(c.reward),
                    array<const T>(c.value),
                    array<const T>(c.next_value),
                    array<const T>(c.q_value),
                    array<const T>(c.log_ratio),
                    array<const T>(c.gamma),
                    array<const T>(c.gae_lambda),
                    array<const T>(c.bootstrap),
                    array<const R>(c.grad_first),
                    array<const R>(c.grad_second),
                    array<const R>(c.td_error),
                    array<const R>(c.carried),
                    array<const uint8_t>(c.terminated),
                    array<const uint8_t>(c.truncated),
                    array<const uint8_t>(c.mask),
                    {},
                    c.constant_gamma,
                    c.constant_lambda,
                    {c.rho_clip, c.c_clip}};
  for (int k = 0; k < 4; ++k) x.out[k] = array<R>(c.out[k]);
  return x;
}

// f(trajectories) for the dtype of the inputs.
template <class F>
std::string with_dtype(const Call& c, int dtype, F f) {
  switch (dtype) {
    case 0:
      return f(trajectories<float>(c));
    case 1:
      return f(trajectories<double>(c));
    case 2:
      return f(trajectories<__nv_bfloat16>(c));
    default:
      return f(trajectories<__half>(c));
  }
}

template <class E, class T>
std::string scan(const Call& c, const Trajectories<T>& x) {
  const ScanLaunch launch(x.rows);
  void* memory = launch.bytes > 0 ? emulator::guarded(launch.bytes, true) : nullptr;
  const Slots slots = launch.slots(memory);
  std::string error = emulator::launch(static_cast<unsigned>(launch.blocks), kThreads, c.workers,
                                       c.seed, [&] { scan_kernel<E, T>(x, slots); });
  if (memory) emulator::free_guarded(memory, launch.bytes, true);
  return error;
}

template <class E>
std::string scan(const Call& c, int dtype) {
  return with_dtype(c, dtype, [&](const auto& x) { return scan<E>(c, x); });
}

// With a thread for each step.
template <class Kernel>
std::string each_step(const Call& c, int dtype, Kernel kernel) {
  return with_dtype(c, dtype, [&](const auto& x) {
    const auto blocks = static_cast<unsigned>(step_blocks(x.rows));
    return emulator::launch(blocks, kStepThreads, c.workers, c.seed, [&] { kernel(x); });
  });
}

const char* kept(std::string error) {
  static thread_local std::string last;
  last = std::move(error);
  return last.c_str();
}

}  // namespace

extern "C" {

#if PART == 0
const char* scan_forward(int estimator, int dtype, const Call* c) {
  switch (estimator) {
    case 0:
      return kept(scan<Gae>(*c, dtype));
    case 1:
      return kept(scan<LambdaReturns>(*c, dtype));
    case 2:
      return kept(scan<DiscountedReturns>(*c, dtype));
    case 3:
      return kept(scan<Vtrace>(*c, dtype));
    default:
      return kept(scan<RetraceReturns>(*c, dtype));
  }
}

const char* n_step(int, int dtype, const Call* c) {
  return kept(each_step(*c, dtype, [&](const auto& x) { n_step_kernel(x, c->n); }));
}
const char* n_step_backward(int, int dtype, const Call* c) {
  return kept(each_step(*c, dtype, [&](const auto& x) { n_step_backward_kernel(x, c->n); }));
}
const char* value_grads(int, int dtype, const Call* c) {
  const ValueGrads what{(c->flags & 1) != 0, (c->flags & 2) != 0, (c->flags & 4) != 0};
  return kept(each_step(*c, dtype, [&](const auto& x) { value_grads_kernel(x, what); }));
}

void* guarded(size_t bytes, bool at_end) { return emulator::guarded(bytes, at_end); }
void free_guarded(void* memory, size_t bytes, bool at_end) {
  emulator::free_guarded(memory, bytes, at_end);
}
#else
const char* scan_backward(int estimator, int dtype, const Call* c) {
  switch (estimator) {
    case 0:
      return kept(scan<TdBackward>(*c, dtype));
    case 1:
      return kept(scan<VtraceBackward>(*c, dtype));
    default:
      return kept(scan<RetraceBackward>(*c, dtype));
  }
}
#endif

}  // extern "C"

// The launches of csrc/cuda, into the emulator. Instantiated in two parts, which are compiled side
// by side.
#include "cuda/launch.h"
#include "cuda/n_step_returns.cuh"

namespace emulator {
extern int workers;
extern unsigned seed;
}  // namespace emulator

namespace fastrl::cuda {
namespace {

template <class Kernel>
cudaError_t launch(int64_t blocks, int threads, Kernel kernel) {
  if (blocks == 0) return cudaSuccess;
  const std::string error = emulator::launch(static_cast<unsigned>(blocks), threads,
                                             emulator::workers, emulator::seed, kernel);
  return cudaFailure(error);
}

}  // namespace

template <class E, class T>
cudaError_t launch_scan(const Trajectories<T>& x, void* memory, cudaStream_t) {
  const ScanLaunch scan(x.rows);
  const Slots slots = scan.slots(memory);
  return launch(scan.blocks, kThreads, [&] { scan_kernel<E, T>(x, slots); });
}
template <class T>
cudaError_t launch_n_step_returns(const Trajectories<T>& x, int64_t n, cudaStream_t) {
  return launch(step_blocks(x.rows), kStepThreads, [&] { n_step_kernel(x, n); });
}
template <class T>
cudaError_t launch_n_step_returns_bwd(const Trajectories<T>& x, int64_t n, cudaStream_t) {
  return launch(step_blocks(x.rows), kStepThreads, [&] { n_step_backward_kernel(x, n); });
}
template <class T>
cudaError_t launch_value_grads(const Trajectories<T>& x, const ValueGrads& what, cudaStream_t) {
  return launch(step_blocks(x.rows), kStepThreads, [&] { value_grads_kernel(x, what); });
}

#define SCAN(E, T) template cudaError_t launch_scan<E, T>(const Trajectories<T>&, void*, void*);
#define STEPS(name, T, Argument) \
  template cudaError_t launch_##name<T>(const Trajectories<T>&, Argument, void*);
#if PART == 0
#define LAUNCHES(T) \
  SCAN(Gae, T)      \
  SCAN(Vtrace, T)   \
  SCAN(RetraceReturns, T)
#else
#define LAUNCHES(T)                     \
  SCAN(DiscountedReturns, T)            \
  SCAN(TdBackward, T)                   \
  SCAN(VtraceBackward, T)               \
  SCAN(RetraceBackward, T)              \
  STEPS(n_step_returns, T, int64_t)     \
  STEPS(n_step_returns_bwd, T, int64_t) \
  STEPS(value_grads, T, const ValueGrads&)
#endif

LAUNCHES(float)
LAUNCHES(double)
LAUNCHES(__nv_bfloat16)
LAUNCHES(__half)

}  // namespace fastrl::cuda

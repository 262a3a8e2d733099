#include "launch.h"
#include "n_step_returns.cuh"

namespace fastrl::cuda {

template <class T>
cudaError_t launch_n_step_returns(const Trajectories<T>& x, int64_t n, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(step_blocks(x.rows));
  if (blocks > 0) n_step_kernel<T><<<blocks, kStepThreads, 0, stream>>>(x, n);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_n_step_returns_bwd(const Trajectories<T>& x, int64_t n, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(step_blocks(x.rows));
  if (blocks > 0) n_step_backward_kernel<T><<<blocks, kStepThreads, 0, stream>>>(x, n);
  return cudaGetLastError();
}

template cudaError_t launch_n_step_returns(const Trajectories<float>&, int64_t, cudaStream_t);
template cudaError_t launch_n_step_returns(const Trajectories<double>&, int64_t, cudaStream_t);
template cudaError_t launch_n_step_returns(const Trajectories<__nv_bfloat16>&, int64_t,
                                           cudaStream_t);
template cudaError_t launch_n_step_returns(const Trajectories<__half>&, int64_t, cudaStream_t);
template cudaError_t launch_n_step_returns_bwd(const Trajectories<float>&, int64_t, cudaStream_t);
template cudaError_t launch_n_step_returns_bwd(const Trajectories<double>&, int64_t, cudaStream_t);
template cudaError_t launch_n_step_returns_bwd(const Trajectories<__nv_bfloat16>&, int64_t,
                                               cudaStream_t);
template cudaError_t launch_n_step_returns_bwd(const Trajectories<__half>&, int64_t, cudaStream_t);

}  // namespace fastrl::cuda

#include "launch.h"

namespace fastrl::cuda {

template <class T>
cudaError_t launch_value_grads(const Trajectories<T>& x, const ValueGrads& what,
                               cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(step_blocks(x.rows));
  if (blocks > 0) value_grads_kernel<T><<<blocks, kStepThreads, 0, stream>>>(x, what);
  return cudaGetLastError();
}

template cudaError_t launch_value_grads(const Trajectories<float>&, const ValueGrads&,
                                        cudaStream_t);
template cudaError_t launch_value_grads(const Trajectories<double>&, const ValueGrads&,
                                        cudaStream_t);
template cudaError_t launch_value_grads(const Trajectories<__nv_bfloat16>&, const ValueGrads&,
                                        cudaStream_t);
template cudaError_t launch_value_grads(const Trajectories<__half>&, const ValueGrads&,
                                        cudaStream_t);

}  // namespace fastrl::cuda

// The returns' kernels as functions of raw pointers: what the files of torch's tensors know of
// them. Each is instantiated in the file of its op.
#pragma once

#include <cuda_runtime.h>

#include "scan.cuh"
#include "value_grads.cuh"

namespace fastrl::cuda {

// memory: ScanLaunch(x.rows).bytes of it, all bits set, or nullptr for none.
template <class E, class T>
cudaError_t launch_scan(const Trajectories<T>& x, void* memory, cudaStream_t stream);

template <class T>
cudaError_t launch_n_step_returns(const Trajectories<T>& x, int64_t n, cudaStream_t stream);
template <class T>
cudaError_t launch_n_step_returns_bwd(const Trajectories<T>& x, int64_t n, cudaStream_t stream);

template <class T>
cudaError_t launch_value_grads(const Trajectories<T>& x, const ValueGrads& what,
                               cudaStream_t stream);

}  // namespace fastrl::cuda

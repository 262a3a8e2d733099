#pragma once

#include "launch.h"

namespace fastrl::cuda {

template <class E, class T>
cudaError_t launch_scan(const Trajectories<T>& x, void* memory, cudaStream_t stream) {
  const ScanLaunch launch(x.rows);
  if (launch.blocks == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(launch.blocks);
  scan_kernel<E, T><<<blocks, kThreads, 0, stream>>>(x, launch.slots(memory));
  return cudaGetLastError();
}

#define FASTRL_LAUNCH_SCAN(E, T) \
  template cudaError_t launch_scan<E, T>(const Trajectories<T>&, void*, cudaStream_t);
#define FASTRL_LAUNCH_SCANS(E)         \
  FASTRL_LAUNCH_SCAN(E, float)         \
  FASTRL_LAUNCH_SCAN(E, double)        \
  FASTRL_LAUNCH_SCAN(E, __nv_bfloat16) \
  FASTRL_LAUNCH_SCAN(E, __half)

}  // namespace fastrl::cuda

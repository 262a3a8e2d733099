// What the launchers use of CUDA's header of this name; memory is the system's.
#pragma once

#include <cstring>
#include <string>

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

inline thread_local std::string cuda_failure;

inline cudaError_t cudaFailure(const std::string& what) {
  cuda_failure = what;
  return what.empty() ? cudaSuccess : 1;
}
inline const char* cudaGetErrorString(cudaError_t) { return cuda_failure.c_str(); }
inline cudaError_t cudaMemsetAsync(void* at, int byte, size_t bytes, cudaStream_t) {
  std::memset(at, byte, bytes);
  return cudaSuccess;
}

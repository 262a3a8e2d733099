// The launchers of csrc/cuda as ops on tensors of a CPU, in a library of their own:
// torch.ops.fastrl_emulated. What they allocate stands in guarded memory.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

// Exported since torch 2.11; weak so that older ones load this too, and keep what they allocate.
extern "C" AOTITorchError torch_from_blob(void* data, int64_t dims, const int64_t* sizes,
                                          const int64_t* strides, int64_t offset, int32_t dtype,
                                          int32_t device_type, int32_t device_index,
                                          AtenTensorHandle* handle, int32_t layout,
                                          const uint8_t* opaque, int64_t opaque_size,
                                          void (*deleter)(void*, void*), void* context)
    __attribute__((weak));

namespace emulator {

int workers = 3;
unsigned seed = 0;

namespace {
size_t bytes_of(void* context) { return reinterpret_cast<size_t>(context) >> 1; }
void give_back(void* data, void* context) {
  free_guarded(data, bytes_of(context), reinterpret_cast<size_t>(context) & 1);
}
}  // namespace

AOTITorchError empty(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                     int32_t device, int32_t, AtenTensorHandle* handle) {
  size_t bytes = dtype == aoti_torch_dtype_float32() ? 4 : 8;
  for (int64_t d = 0; d < dims; ++d) bytes *= sizes[d];
  if (bytes == 0 || !torch_from_blob) {
    return aoti_torch_empty_strided(dims, sizes, strides, dtype, device, 0, handle);
  }
  static bool at_end = false;
  at_end = !at_end;
  return torch_from_blob(guarded(bytes, at_end), dims, sizes, strides, 0, dtype, device, -1, handle,
                         aoti_torch_layout_strided(), nullptr, 0, &give_back,
                         reinterpret_cast<void*>(bytes << 1 | at_end));
}

struct NoGuard {
  explicit NoGuard(int32_t) {}
};

}  // namespace emulator

namespace torch::stable::accelerator {
using emulator::NoGuard;
}

#define DeviceGuard NoGuard
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define aoti_torch_empty_strided emulator::empty
#define aoti_torch_get_current_cuda_stream emulator_stream
#define CUDA CPU

#include "cuda/call.cu"
#include "cuda/returns.cu"
#include "cuda/returns_bwd.cu"

extern "C" {

AOTITorchError emulator_stream(int32_t, void** stream) {
  *stream = nullptr;
  return TORCH_SUCCESS;
}

// For ctypes.
#pragma GCC visibility push(default)
void emulator_configure(int workers, unsigned seed) {
  emulator::workers = workers;
  emulator::seed = seed;
}
void* emulator_guarded(size_t bytes, bool at_end) { return emulator::guarded(bytes, at_end); }
void emulator_free(void* memory, size_t bytes, bool at_end) {
  emulator::free_guarded(memory, bytes, at_end);
}
#pragma GCC visibility pop

}  // extern "C"

// What autograd asks of a device, in a torch that knows of no GPU: of "cuda" there is one, with one
// stream. To be loaded before torch, which looks for the former once.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  // Not "override": some are new, and some were made const.
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasCUDA() const { return true; }
  bool hasPrimaryContext(DeviceIndex) const { return true; }
  DeviceIndex current_device() const { return 0; }
  DeviceIndex getCurrentDevice() const { return 0; }
  DeviceIndex deviceCount() const { return 1; }
  int getNumGPUs() const { return 1; }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

namespace {

using c10::Device, c10::DeviceIndex, c10::Stream;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(c10::kCUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

}  // namespace

// A CUDA device without hardware or driver, for the engine of autograd: it requires an accelerator with a device guard
// and a stream, although fake tensors never launch a kernel. Loaded by fake_cuda.py before torch.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device;
using c10::DeviceType;
using c10::Stream;

static const Device only_device(DeviceType::CUDA, 0);

struct SingleDeviceGuard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return only_device; }
  Device exchangeDevice(Device) const override { return only_device; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, only_device); }
};

C10_REGISTER_GUARD_IMPL(CUDA, SingleDeviceGuard);

namespace at {
// The name is the key under which ATen looks for hooks.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

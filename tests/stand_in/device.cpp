// What libtorch asks of a device: a guard, hooks, streams (one), generators; and the beginning of it all.
#include "stand_in.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <limits>

namespace stand_in {

const Options& options() {
  static const Options read = [] {
    auto flag = [](const char* name) {
      const char* value = std::getenv(name);
      return value && *value && *value != '0';
    };
    const char* limit = std::getenv("STAND_IN_LIMIT");
    const char* report = std::getenv("STAND_IN_REPORT");
    const char* multiprocessors = std::getenv("STAND_IN_MULTIPROCESSORS");
    return Options{flag("STAND_IN_FENCE"), flag("STAND_IN_NO_F64"), flag("STAND_IN_SHAPES"),
                   flag("STAND_IN_NO_KERNELS"), flag("STAND_IN_WRONG_KERNELS"),
                   multiprocessors ? std::atoi(multiprocessors) : 4,
                   limit ? std::atoll(limit) : std::numeric_limits<int64_t>::max(), report ? report : ""};
  }();
  return read;
}

int64_t choose_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                         std::optional<double>, bool);

namespace {

const c10::Stream STREAM(c10::Stream::DEFAULT, DEVICE);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    setDevice(device);
    return DEVICE;
  }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.is_cuda() && device.index() <= 0, "CUDA error: invalid device ordinal ", device);
  }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return STREAM; }
  c10::Stream getDefaultStream(c10::Device) const override { return STREAM; }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return STREAM; }
  c10::Stream getNewStream(c10::Device, int) const override { return STREAM; }
  c10::Stream exchangeStream(c10::Stream) const override { return STREAM; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void* getStreamNativeHandle(const c10::Stream) const override { return nullptr; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

}  // namespace
}  // namespace stand_in

namespace at {

// The name is that of libtorch's own: the registry looks for it.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static Generator generator = at::detail::createCPUGenerator();
    return generator;
  }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  Device getDeviceFromPtr(void*) const override { return stand_in::DEVICE; }
  bool isPinnedPtr(const void*) const override { return false; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  Allocator* getCUDADeviceAllocator() const override { return stand_in::allocator(); }
  std::string showConfig() const override { return "a stand-in for a CUDA device"; }
  int getNumGPUs() const override { return 1; }
  void deviceSynchronize(DeviceIndex) const override {}
};
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

namespace stand_in {
namespace {

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Start {
  Start() {
    start_memory();
    start_counts();
    // A protection key's rights belong to a thread: kernels may not hand work to others.
    at::set_num_threads(1);
    at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
  }
} start;

}  // namespace
}  // namespace stand_in

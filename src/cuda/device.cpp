#include "cuda/device.h"

#include <array>
#include <mutex>
#include <string>

#include "cuda/error.h"

namespace flash_mla::cuda {
namespace {

int attribute(cudaDeviceAttr attr, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attr, device), "cudaDeviceGetAttribute");
  return value;
}

/// 0 where the driver does not tell: of what is good to know, and no more.
int attribute_if_known(cudaDeviceAttr attr, int device) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, attr, device) == cudaSuccess) return value;
  (void)cudaGetLastError();
  return 0;
}

DeviceProperties read_properties(int device) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    (void)cudaGetLastError();
    throw Unsupported(std::string("no usable CUDA driver: ") + cudaGetErrorString(status) +
                      "; the kernels need a Hopper GPU (compute capability 9.0)");
  }
  if (device >= count) {
    throw Unsupported("device: expected a CUDA device below " + std::to_string(count) + ", got " +
                      std::to_string(device));
  }
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  constexpr double kHzPerKhz = 1000;
  const double transfers = 2 * kHzPerKhz * attribute_if_known(cudaDevAttrMemoryClockRate, device);  // two a clock
  return {major * 10 + minor, attribute(cudaDevAttrMultiProcessorCount, device),
          kHzPerKhz * attribute_if_known(cudaDevAttrClockRate, device),
          transfers * attribute_if_known(cudaDevAttrGlobalMemoryBusWidth, device) / 8};
}

constexpr int kNone = -1;
thread_local int guarded_device = kNone;

}  // namespace

const DeviceProperties& device_properties(int device) {
  static std::array<std::once_flag, kMaxDevices> once;
  static std::array<DeviceProperties, kMaxDevices> properties;
  if (device < 0 || device >= kMaxDevices) {
    throw Unsupported("device: expected a CUDA device from 0 to " + std::to_string(kMaxDevices - 1) + ", got " +
                      std::to_string(device));
  }
  std::call_once(once[device], [device] { properties[device] = read_properties(device); });
  return properties[device];
}

void require_hopper(int device) {
  const int found = device_properties(device).compute_capability;
  if (found != 90) {
    throw Unsupported("device: expected a Hopper GPU (compute capability 9.0), got compute capability " +
                      std::to_string(found / 10) + "." + std::to_string(found % 10));
  }
}

int current_device() {
  if (guarded_device != kNone) return guarded_device;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

DeviceGuard::DeviceGuard(int device) : previous_(device), changed_(false), outer_(guarded_device) {
  check(cudaGetDevice(&previous_), "cudaGetDevice");
  if (previous_ != device) {
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  guarded_device = device;
}

DeviceGuard::~DeviceGuard() {
  guarded_device = outer_;
  if (changed_) (void)cudaSetDevice(previous_);
}

}  // namespace flash_mla::cuda

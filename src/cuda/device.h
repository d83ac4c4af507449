#pragma once

#include "flash_mla/tensor.h"

namespace flash_mla::cuda {

/// The largest extent of a launch's grid in its second and third dimension.
constexpr int kMaxGridExtent = 65535;

/// Devices that the library can tell apart.
constexpr int kMaxDevices = 64;

/// What the library needs to know of a GPU.
struct DeviceProperties {
  int compute_capability;  // major * 10 + minor
  int num_sms;
  double sm_clock;          // the highest, in Hz; 0 where it is not known
  double memory_bandwidth;  // of the data sheet, in bytes a second; 0 where it is not known
};

/// Properties of a device, read once. Throws Unsupported where there is no driver or no such device.
const DeviceProperties& device_properties(int device);

/// Throws Unsupported unless `device` is a Hopper GPU (compute capability 9.0).
void require_hopper(int device);

/// The device that is current on this thread. Inside a DeviceGuard, CUDA isn't asked.
int current_device();

/// Makes a device current on this thread, and the previous one again at the end of the scope. Within the scope, nothing
/// else changes it.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
  bool changed_;
  int outer_;  // the device of the guard around this one
};

}  // namespace flash_mla::cuda

#pragma once

#include <nanobind/ndarray.h>

#include <cstdint>

// The part of DLPack's C ABI (major version 1, with the exchange table that 1.3 added) that nanobind doesn't declare.
// Layout: https://dmlc.github.io/dlpack/latest/c_api.html

namespace flash_mla::bindings::dlpack {

using nanobind::dlpack::dltensor;
using nanobind::dlpack::dtype_code;

constexpr std::uint32_t kMajorVersion = 1;
constexpr std::uint32_t kMinorVersion = 3;
constexpr std::uint64_t kFlagReadOnly = 1;

enum DeviceCode : std::int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

/// What a capsule named "dltensor" holds.
struct ManagedTensor {
  dltensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

/// What a capsule named "dltensor_versioned" holds.
struct ManagedTensorVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedTensorVersioned*);
  std::uint64_t flags;
  dltensor tensor;
};

struct ExchangeApiHeader {
  Version version;
  ExchangeApiHeader* previous;
};

using SetError = void (*)(void* context, const char* kind, const char* message);

/// What the capsule `type(array).__dlpack_c_exchange_api__` holds: the functions by which an array library hands out
/// its arrays without a detour through Python. All need the GIL; except for `allocate` they return 0, or -1 with a
/// Python error set.
struct ExchangeApi {
  ExchangeApiHeader header;
  int (*allocate)(dltensor* prototype, ManagedTensorVersioned** out, void* error_context, SetError set_error);
  int (*export_managed)(void* array, ManagedTensorVersioned** out);
  int (*import_managed)(ManagedTensorVersioned* tensor, void** out_array);
  int (*view)(void* array, dltensor* out);  ///< optional; the view lives as long as the array stays as it is
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** out_stream);
};

}  // namespace flash_mla::bindings::dlpack

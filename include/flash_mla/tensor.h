#pragma once

#include <array>
#include <cstdint>

#include "flash_mla/export.h"

// Forward declarations, so that callers need no CUDA headers: CUstream_st* is cudaStream_t.
struct CUstream_st;

namespace flash_mla {

/// Element types. The library computes on kBFloat16 and kFloat16; the others exist so that an error can name them.
enum class DType : std::uint8_t {
  kBFloat16,
  kFloat16,
  kFloat32,
  kFloat64,
  kFloat8E4M3,
  kFloat8E5M2,
  kInt8,
  kInt16,
  kInt32,
  kInt64,
  kUInt8,
  kUInt16,
  kUInt32,
  kUInt64,
  kBool,
  kOther,
};

/// "bfloat16", "int32", ...
FLASH_MLA_API const char* dtype_name(DType dtype) noexcept;

enum class DeviceType : std::uint8_t { kCpu, kCuda };

/// Where a tensor's memory is. `index` is the CUDA device ordinal, 0 for the CPU.
struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;
};

constexpr bool operator==(Device a, Device b) noexcept { return a.type == b.type && a.index == b.index; }
constexpr bool operator!=(Device a, Device b) noexcept { return !(a == b); }

/// The largest number of dimensions of any argument.
constexpr int kMaxRank = 4;

/// A view of memory that somebody else owns. Strides are in elements. A default-constructed Tensor (rank 0, no data)
/// stands for an argument left out.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kOther;
  Device device;
  int rank = 0;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> strides{};

  /// False for an argument left out. (An empty tensor may have no data, but it has a rank.)
  explicit operator bool() const noexcept { return rank != 0; }
};

/// A row-major view. `shape` holds `rank` extents.
template <class... Extents>
Tensor make_tensor(void* data, DType dtype, Device device, Extents... shape) {
  static_assert(sizeof...(shape) >= 1 && sizeof...(shape) <= kMaxRank, "rank 1 to 4");
  Tensor t;
  t.data = data;
  t.dtype = dtype;
  t.device = device;
  t.rank = static_cast<int>(sizeof...(shape));
  const std::int64_t extents[] = {static_cast<std::int64_t>(shape)...};
  std::int64_t stride = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    t.shape[i] = extents[i];
    t.strides[i] = stride;
    stride *= extents[i];
  }
  return t;
}

}  // namespace flash_mla

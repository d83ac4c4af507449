#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "flash_mla/error.h"
#include "flash_mla/export.h"

// Forward declarations, so that callers need no CUDA headers: CUstream_st* is cudaStream_t.
struct CUstream_st;

namespace flash_mla {

/// Element types. The library computes on kBFloat16, kFloat16 and kFloat32; the others exist so that an error can name
/// them.
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

/// Bytes of an element, 0 for kOther.
constexpr std::size_t dtype_size(DType dtype) noexcept {
  switch (dtype) {
    case DType::kFloat8E4M3:
    case DType::kFloat8E5M2:
    case DType::kInt8:
    case DType::kUInt8:
    case DType::kBool:
      return 1;
    case DType::kBFloat16:
    case DType::kFloat16:
    case DType::kInt16:
    case DType::kUInt16:
      return 2;
    case DType::kFloat32:
    case DType::kInt32:
    case DType::kUInt32:
      return 4;
    case DType::kFloat64:
    case DType::kInt64:
    case DType::kUInt64:
      return 8;
    case DType::kOther:
      break;
  }
  return 0;
}

enum class DeviceType : std::uint8_t { kCpu, kCuda };

/// Where a tensor's memory is. `index` is the CUDA device ordinal; of the CPU it says nothing.
struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;
};

constexpr bool operator==(Device a, Device b) noexcept {
  return a.type == b.type && (a.type == DeviceType::kCpu || a.index == b.index);
}
constexpr bool operator!=(Device a, Device b) noexcept { return !(a == b); }

/// The largest number of dimensions of any argument.
constexpr int kMaxRank = 5;

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

/// Sets the strides of a row-major tensor from its rank and shape.
inline void set_contiguous_strides(Tensor& t) {
  std::int64_t stride = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    const auto at = static_cast<std::size_t>(i);
    t.strides[at] = stride;
    stride *= t.shape[at];
  }
}

/// A row-major view. `shape` holds `rank` extents.
template <class... Extents>
Tensor make_tensor(void* data, DType dtype, Device device, Extents... shape) {
  static_assert(sizeof...(shape) >= 1 && sizeof...(shape) <= kMaxRank, "rank 1 to 5");
  Tensor t;
  t.data = data;
  t.dtype = dtype;
  t.device = device;
  t.rank = static_cast<int>(sizeof...(shape));
  t.shape = {static_cast<std::int64_t>(shape)...};
  set_contiguous_strides(t);
  return t;
}

/// The tensors that lie along a tensor's first dimension: views of the same memory, of one dimension less. None for a
/// tensor without dimensions.
/// @throws InvalidArgument where the rank is above kMaxRank
inline std::vector<Tensor> unstack(const Tensor& stacked) {
  if (stacked.rank < 0 || stacked.rank > kMaxRank) {
    throw InvalidArgument("stacked: expected rank 0 to " + std::to_string(kMaxRank) + ", got " +
                          std::to_string(stacked.rank));
  }
  std::vector<Tensor> tensors;
  if (stacked.rank == 0) return tensors;
  Tensor t = stacked;
  t.rank = stacked.rank - 1;
  for (std::size_t i = 0; i < kMaxRank; ++i) {
    const bool has = i < static_cast<std::size_t>(t.rank);
    t.shape[i] = has ? stacked.shape[i + 1] : 0;
    t.strides[i] = has ? stacked.strides[i + 1] : 0;
  }
  // Unsigned, as a stride may be anything here: whoever uses the views checks them.
  const std::uintptr_t step = static_cast<std::uintptr_t>(stacked.strides[0]) * dtype_size(stacked.dtype);
  for (std::int64_t i = 0; i < stacked.shape[0]; ++i) {
    t.data = stacked.data == nullptr ? nullptr
                                     : reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(stacked.data) +
                                                               static_cast<std::uintptr_t>(i) * step);
    tensors.push_back(t);
  }
  return tensors;
}

}  // namespace flash_mla

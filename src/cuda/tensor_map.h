#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>

#include "flash_mla/tensor.h"

namespace flash_mla::cuda {

/// A 4-dimensional view of global memory for bulk tensor copies; innermost dimension first, contiguous.
struct TensorMapArguments {
  void* data;  // 16-byte aligned
  DType dtype;
  std::array<std::int64_t, 4> shape;
  std::array<std::int64_t, 3> strides;  // of dimensions 1 to 3, in elements; multiples of 16 bytes
  std::array<int, 4> box;               // extents of one copy; box[0] elements are 128 bytes, the swizzle's row

  bool is_same_but_for_address(const TensorMapArguments& other) const {
    return dtype == other.dtype && shape == other.shape && strides == other.strides && box == other.box;
  }
};

/// A tensor map with 128-byte swizzle. Needs no current context and no link to libcuda.
class TensorMap {
 public:
  /// Encodes the map anew only where more than the address is another than last time: the maps of a model's layers
  /// differ in nothing else. Valid until the next call.
  const CUtensorMap& encode(const TensorMapArguments& args);

 private:
  TensorMapArguments last_{};
  CUtensorMap map_{};
};

}  // namespace flash_mla::cuda

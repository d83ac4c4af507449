#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "bindings/dlpack_abi.h"
#include "flash_mla/tensor.h"

namespace flash_mla::bindings {

namespace nb = nanobind;

enum class Access { kRead, kWrite };

/// NumPy and DLPack have no bfloat16 between them: an adapter passes such an array as uint16 bits, wrapped in this.
struct Bfloat16Bits {
  nb::object bits;
};

/// An array that isn't there yet, for checks of shapes and dtypes: row-major, on the CPU, without memory.
struct ShapeDType {
  std::vector<std::int64_t> shape;
  DType dtype;

  /// @param dtype_name  of flash_mla::dtype_name; any other counts as DType::kOther
  ShapeDType(std::vector<std::int64_t> extents, const std::string& dtype_name);
};

/// The exchange table of an array type, or null. Looked up once per type, which then lives on, so that its address
/// stays its own. The GIL is held.
const dlpack::ExchangeApi* find_exchange_api(nb::handle type);

/// @throws InvalidArgument naming the argument, where it has no or too many dimensions or lies on another kind of
/// device
Tensor to_tensor(const char* name, const dlpack::dltensor& source);

/// A Python array as a Tensor, for the length of a call. Make and destroy it with the GIL held.
///
/// Array types with DLPack's exchange table (PyTorch 2.11 and later) are read through it, others through `__dlpack__`,
/// asked not to synchronise; a DLPack capsule, Bfloat16Bits and ShapeDType are taken too. The constructor throws
/// InvalidArgument or InvalidType, naming the argument, for what isn't an array of 1 to 5 dimensions on a CPU or CUDA
/// device.
class ArrayView {
 public:
  ArrayView() = default;
  ArrayView(const char* name, nb::handle array, Access access = Access::kRead);

  /// For an argument that may be None: its Tensor is the default one then.
  static ArrayView optional(const char* name, nb::handle array, Access access = Access::kRead);

  const Tensor& tensor() const { return tensor_; }

  /// The array library's current stream on the array's device, null on the CPU. Without an exchange table it is
  /// `stream`, an address as an int, None for CUDA's default stream.
  CUstream_st* current_stream(nb::handle stream) const;

  /// The table of the array's type, null where it has none.
  const dlpack::ExchangeApi* exchange_api() const { return api_; }

 private:
  nb::object capsule_;  // owns the managed tensor, which its destructor frees
  const dlpack::ExchangeApi* api_ = nullptr;
  Tensor tensor_;
};

/// Device memory from the allocator of the library that `like` belongs to, given back at the end of the scope, in the
/// order of the current stream.
class Workspace {
 public:
  /// @param allocate  a Python callable, (num_bytes) -> uint8 array, for array types without an exchange table
  Workspace(const ArrayView& like, std::size_t num_bytes, nb::handle allocate);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  dlpack::ManagedTensorVersioned* managed_ = nullptr;
  ArrayView array_;
};

}  // namespace flash_mla::bindings

#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "flash_mla/tensor.h"

/// The short way for PyTorch's tensors: read by what DLPack's exchange table of their type comes down to, and made by
/// the C functions that PyTorch has for compiled models, or by what these come down to. All are looked up in the
/// process, so nothing is linked and no build of PyTorch must match.
///
/// New tensors don't come through DLPack, which would be as fast: PyTorch takes memory that it imports for somebody
/// else's, and of such a tensor record_stream() does nothing and resize_() fails.
namespace flash_mla::bindings::torch {

/// Looks up what the other functions use. `type` is torch.Tensor.
void find(nanobind::handle type);

/// Whether it is a tensor, of a subclass perhaps, unless the subclass has its own idea of what operations do
/// (`__torch_dispatch__`: FakeTensor, DTensor). False for everything before find(), and where this PyTorch lacks the
/// table (before 2.11) or one of the functions.
bool is_tensor(nanobind::handle array);

/// Whether the calling thread has told PyTorch to show every operation to somebody (`TorchDispatchMode`: make_fx,
/// FakeTensorMode, FlopCounterMode), who would not see a call that goes around PyTorch.
bool is_watched();

/// Fills in the view of a tensor. False where it has no memory to look at (on device "meta", inside torch.func's
/// transforms, under functionalisation), and where PyTorch has yet to negate what is there. The GIL is held.
/// @throws InvalidArgument naming the argument
bool view(const char* name, nanobind::handle tensor, Tensor& result);

/// Whether it is a tensor, not watched, and has memory to look at that holds its values. The GIL is held.
bool can_read(nanobind::handle array);

/// PyTorch's current stream on a device, null on the CPU. The GIL is held.
CUstream_st* current_stream(Device device);

/// A new tensor of PyTorch's that has no Python object yet.
class NewTensor {
 public:
  NewTensor() = default;

  /// Row-major, contents arbitrary, of bfloat16, float16, float32, int32 or uint8. False where PyTorch failed: asked in
  /// Python for the same, it says why. Needs no GIL.
  NewTensor(DType dtype, Device device, std::initializer_list<std::int64_t> shape);

  ~NewTensor();
  NewTensor(NewTensor&& other) noexcept;
  NewTensor& operator=(NewTensor&& other) noexcept;

  explicit operator bool() const { return handle_ != nullptr; }
  const Tensor& view() const { return view_; }

  /// The torch.Tensor, which is not to be asked for again. The GIL is held.
  nanobind::object to_python();

 private:
  void* handle_ = nullptr;
  Tensor view_;
};

/// Memory of a GPU from PyTorch's allocator, in the order of the device's current stream: given back at the end of the
/// scope, kept for a graph that is being captured. There is a tensor around it only where this PyTorch has no other
/// way, or the device isn't the current one. Needs no GIL.
class Workspace {
 public:
  Workspace(Device device, std::size_t num_bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  /// Null where PyTorch failed, and where no bytes are wanted.
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  void* bytes_ = nullptr;
  NewTensor tensor_;
};

}  // namespace flash_mla::bindings::torch

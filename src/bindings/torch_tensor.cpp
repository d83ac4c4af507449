#include "bindings/torch_tensor.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <unordered_map>
#include <utility>

#include "bindings/dlpack.h"

namespace flash_mla::bindings::torch {
namespace {

/// at::Tensor*, as PyTorch's C functions hand it out.
using Handle = void*;

// torch/csrc/inductor/aoti_torch/c/shim.h, whose ABI PyTorch keeps; they return 0, or another number on failure.
using EmptyStrided = std::int32_t (*)(std::int64_t rank, const std::int64_t* shape, const std::int64_t* strides,
                                      std::int32_t dtype, std::int32_t device_type, std::int32_t device_index,
                                      Handle* result);
using GetDataPtr = std::int32_t (*)(Handle tensor, void** data);
using DeleteTensor = std::int32_t (*)(Handle tensor);
// The same, of builds with CUDA. On the current device, in the order of its current stream.
using AllocateBytes = std::int32_t (*)(std::uint64_t num_bytes, void** data);
using FreeBytes = std::int32_t (*)(void* data);

// From here on, the types of arguments are part of the symbols' names: should they change, these aren't found.

/// PyObject* THPVariable_Wrap(at::TensorBase&&), by which every extension of PyTorch makes its results.
using Wrap = PyObject* (*)(Handle tensor);
constexpr const char* kWrapSymbol = "_Z16THPVariable_WrapON2at10TensorBaseE";

/// at::TensorBase, which functions return in memory that the caller names, as it can't be copied bit by bit.
struct TensorBase {
  TensorBase(const TensorBase&) = delete;
  void* counted;
};
static_assert(sizeof(TensorBase) == sizeof(void*), "c10::intrusive_ptr");

/// c10::IntArrayRef
struct IntArrayRef {
  const std::int64_t* data;
  std::size_t size;
};

/// std::optional<c10::Device>
struct OptionalDevice {
  std::int8_t type;
  std::int8_t index;
  bool has_value;
};

/// at::TensorBase at::detail::empty_strided_cuda(c10::IntArrayRef, c10::IntArrayRef, c10::ScalarType,
/// std::optional<c10::Device>), which is where aoti_torch_empty_strided gets to by way of PyTorch's dispatcher.
using EmptyStridedCuda = TensorBase (*)(IntArrayRef shape, IntArrayRef strides, std::int8_t dtype,
                                        OptionalDevice device);
constexpr const char* kEmptyStridedCudaSymbol =
    "_ZN2at6detail18empty_strided_cudaEN3c108ArrayRefIlEES3_NS1_10ScalarTypeESt8optionalINS1_6DeviceEE";

/// c10::DeviceIndex c10::cuda::current_device(), which knows devices that PyTorch has only meant to make current.
using CurrentDevice = std::int8_t (*)();
constexpr const char* kCurrentDeviceSymbol = "_ZN3c104cuda14current_deviceEv";

/// void at::toDLPackNonOwning(const at::Tensor&, DLTensor*), which throws where there is no memory to look at. The
/// exchange table's function calls it, and does two to three times the work around it.
using View = void (*)(const TensorBase& tensor, dlpack::dltensor* view);
constexpr const char* kViewSymbol = "_ZN2at17toDLPackNonOwningERKNS_6TensorEP8DLTensor";

/// bool at::native::is_neg(const at::Tensor&): whether the tensor's values are those in memory with the other sign, as
/// those of the imaginary part of a conjugate are.
using IsNegated = bool (*)(const TensorBase& tensor);
constexpr const char* kIsNegatedSymbol = "_ZN2at6native6is_negERKNS_6TensorE";

/// bool c10::impl::TorchDispatchModeTLS::any_modes_set(bool skip_infra_modes)
using AnyModesSet = bool (*)(bool skip_infra_modes);
constexpr const char* kAnyModesSetSymbol = "_ZN3c104impl20TorchDispatchModeTLS13any_modes_setEb";
constexpr const char* kDispatchAttribute = "__torch_dispatch__";

struct Library {
  PyObject* tensor_type = nullptr;  // torch.Tensor, which lives as long as the process, as does the next
  PyObject* no_dispatch = nullptr;  // __torch_dispatch__ of types that leave operations as they are
  const dlpack::ExchangeApi* exchange_api = nullptr;
  EmptyStrided empty_strided = nullptr;
  GetDataPtr get_data_ptr = nullptr;
  DeleteTensor delete_tensor = nullptr;
  Wrap wrap = nullptr;
  AnyModesSet any_modes_set = nullptr;
  View view = nullptr;
  IsNegated is_negated = nullptr;
  EmptyStridedCuda empty_strided_cuda = nullptr;
  AllocateBytes allocate_bytes = nullptr;
  FreeBytes free_bytes = nullptr;
  CurrentDevice current_device = nullptr;

  bool is_complete() const {
    return exchange_api != nullptr && no_dispatch != nullptr && empty_strided != nullptr && get_data_ptr != nullptr &&
           delete_tensor != nullptr && wrap != nullptr && any_modes_set != nullptr;
  }

  bool can_allocate_bytes() const {
    return allocate_bytes != nullptr && free_bytes != nullptr && current_device != nullptr;
  }
};

Library library;  // only ever complete, or empty

/// Finds a function of a shared library that the process has loaded already.
template <class Function>
void find_function(const char* file, const char* symbol, Function& function) {
  void* const handle = dlopen(file, RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) return;
  function = reinterpret_cast<Function>(dlsym(handle, symbol));
  dlclose(handle);
}

PyTypeObject* as_type(nb::handle type) { return reinterpret_cast<PyTypeObject*>(type.ptr()); }

/// Looked up once per type. find_exchange_api is asked first: it keeps alive each type that it is asked about.
bool is_ordinary_type(nb::handle type) {
  static auto* cache = new std::unordered_map<PyObject*, bool>;
  if (const auto it = cache->find(type.ptr()); it != cache->end()) return it->second;
  const bool is_ordinary = find_exchange_api(type) == library.exchange_api &&
                           PyType_IsSubtype(as_type(type), as_type(library.tensor_type)) != 0 &&
                           nb::getattr(type, kDispatchAttribute, nb::none()).ptr() == library.no_dispatch;
  cache->emplace(type.ptr(), is_ordinary);
  return is_ordinary;
}

/// What the Python object of a tensor holds, right behind what every Python object begins with.
const TensorBase& held_tensor(nb::handle tensor) {
  return *reinterpret_cast<const TensorBase*>(reinterpret_cast<const char*>(tensor.ptr()) + sizeof(PyObject));
}

/// Whether it is there: tensors tell the address of what they count.
bool is_held_tensor_found(nb::handle tensor) {
  return held_tensor(tensor).counted == reinterpret_cast<void*>(nb::cast<std::uintptr_t>(tensor.attr("_cdata")));
}

bool is_negated(nb::handle tensor) {
  if (library.is_negated != nullptr) return library.is_negated(held_tensor(tensor));
  return nb::cast<bool>(tensor.attr("is_neg")());
}

bool has_elements(const dlpack::dltensor& view) {
  return std::all_of(view.shape, view.shape + view.ndim, [](std::int64_t extent) { return extent > 0; });
}

/// False, and no Python error, where the tensor has no memory to look at, or memory that does not hold its values.
bool get_view(nb::handle tensor, dlpack::dltensor& view) {
  if (library.view != nullptr) {
    try {
      library.view(held_tensor(tensor), &view);
    } catch (const std::exception&) {
      return false;
    }
  } else if (library.exchange_api->view(tensor.ptr(), &view) != 0) {
    PyErr_Clear();
    return false;
  }
  if (view.data == nullptr && has_elements(view)) return false;
  return !is_negated(tensor);
}

/// c10::ScalarType, -1 for those that nobody asks for.
std::int32_t scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
      return 0;
    case DType::kInt32:
      return 3;
    case DType::kFloat16:
      return 5;
    case DType::kFloat32:
      return 6;
    case DType::kBFloat16:
      return 15;
    default:
      return -1;
  }
}

/// c10::DeviceType
std::int32_t device_type(Device device) { return device.type == DeviceType::kCpu ? 0 : 1; }

/// A new tensor of this shape, dtype and device. Null where PyTorch failed.
Handle make_tensor(const Tensor& like) {
  const std::int32_t dtype = scalar_type(like.dtype);
  const std::int32_t type = device_type(like.device);
  if (like.device.type == DeviceType::kCuda && library.empty_strided_cuda != nullptr) {
    const auto rank = static_cast<std::size_t>(like.rank);
    try {
      return new TensorBase(library.empty_strided_cuda(
          {like.shape.data(), rank}, {like.strides.data(), rank}, static_cast<std::int8_t>(dtype),
          {static_cast<std::int8_t>(type), static_cast<std::int8_t>(like.device.index), true}));
    } catch (const std::exception&) {
      return nullptr;
    }
  }
  Handle handle = nullptr;
  const std::int32_t status =
      library.empty_strided(like.rank, like.shape.data(), like.strides.data(), dtype, type, like.device.index, &handle);
  return status == 0 ? handle : nullptr;
}

}  // namespace

void find(nb::handle type) {
  Library found;
  found.tensor_type = type.ptr();
  found.exchange_api = find_exchange_api(type);
  found.no_dispatch = nb::getattr(type, kDispatchAttribute, nb::handle()).release().ptr();
  find_function("libtorch_cpu.so", "aoti_torch_empty_strided", found.empty_strided);
  find_function("libtorch_cpu.so", "aoti_torch_get_data_ptr", found.get_data_ptr);
  find_function("libtorch_cpu.so", "aoti_torch_delete_tensor_object", found.delete_tensor);
  find_function("libtorch_python.so", kWrapSymbol, found.wrap);
  find_function("libc10.so", kAnyModesSetSymbol, found.any_modes_set);
  find_function("libtorch_cuda.so", kEmptyStridedCudaSymbol, found.empty_strided_cuda);
  find_function("libtorch_cuda.so", "aoti_torch_cuda_caching_allocator_raw_alloc", found.allocate_bytes);
  find_function("libtorch_cuda.so", "aoti_torch_cuda_caching_allocator_raw_delete", found.free_bytes);
  find_function("libc10_cuda.so", kCurrentDeviceSymbol, found.current_device);
  if (!found.is_complete()) return;
  library = found;
  NewTensor any(DType::kUInt8, {DeviceType::kCpu, 0}, {1});
  if (any && is_held_tensor_found(any.to_python())) {
    find_function("libtorch_cpu.so", kViewSymbol, library.view);
    find_function("libtorch_cpu.so", kIsNegatedSymbol, library.is_negated);
  }
}

bool is_tensor(nb::handle array) {
  if (library.exchange_api == nullptr) return false;
  const nb::handle type = array.type();
  return type.ptr() == library.tensor_type || is_ordinary_type(type);
}

bool is_watched() { return library.any_modes_set(/*skip_infra_modes=*/false); }

bool view(const char* name, nb::handle tensor, Tensor& result) {
  dlpack::dltensor view;
  if (!get_view(tensor, view)) return false;
  result = to_tensor(name, view);
  return true;
}

bool can_read(nb::handle array) {
  dlpack::dltensor view;
  return is_tensor(array) && !is_watched() && get_view(array, view);
}

CUstream_st* current_stream(Device device) {
  if (device.type == DeviceType::kCpu) return nullptr;
  void* stream = nullptr;
  if (library.exchange_api->current_stream(dlpack::kCuda, device.index, &stream) != 0) throw nb::python_error();
  return static_cast<CUstream_st*>(stream);
}

NewTensor::NewTensor(DType dtype, Device device, std::initializer_list<std::int64_t> shape) {
  view_.dtype = dtype;
  view_.device = device;
  view_.rank = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (int i = view_.rank - 1; i >= 0; --i) {
    view_.shape[i] = shape.begin()[i];
    view_.strides[i] = stride;
    stride *= std::max<std::int64_t>(view_.shape[i], 1);
  }
  Handle const handle = make_tensor(view_);
  if (handle == nullptr) return;
  if (library.get_data_ptr(handle, &view_.data) != 0) {
    library.delete_tensor(handle);
    return;
  }
  handle_ = handle;
}

NewTensor::~NewTensor() {
  if (handle_ != nullptr) library.delete_tensor(handle_);
}

NewTensor::NewTensor(NewTensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)), view_(other.view_) {}

NewTensor& NewTensor::operator=(NewTensor&& other) noexcept {
  std::swap(handle_, other.handle_);
  std::swap(view_, other.view_);
  return *this;
}

nb::object NewTensor::to_python() {
  PyObject* const object = library.wrap(handle_);
  if (object == nullptr) throw nb::python_error();
  return nb::steal(object);
}

Workspace::Workspace(Device device, std::size_t num_bytes) {
  if (num_bytes == 0) return;
  if (library.can_allocate_bytes() && library.current_device() == device.index) {
    if (library.allocate_bytes(num_bytes, &bytes_) == 0) data_ = bytes_;
  } else {
    tensor_ = NewTensor(DType::kUInt8, device, {static_cast<std::int64_t>(num_bytes)});
    data_ = tensor_.view().data;
  }
}

Workspace::~Workspace() {
  if (bytes_ != nullptr) library.free_bytes(bytes_);
}

}  // namespace flash_mla::bindings::torch

#include "bindings/dlpack.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#include "flash_mla/error.h"

namespace flash_mla::bindings {
namespace {

DType to_dtype(nb::dlpack::dtype dtype) {
  using Code = dlpack::dtype_code;
  if (dtype.lanes != 1) return DType::kOther;
  switch (static_cast<Code>(dtype.code)) {
    case Code::Bfloat:
      return dtype.bits == 16 ? DType::kBFloat16 : DType::kOther;
    case Code::Float8_E4M3FN:
      return DType::kFloat8E4M3;
    case Code::Float8_E5M2:
      return DType::kFloat8E5M2;
    case Code::Bool:
      return DType::kBool;
    case Code::Float:
      switch (dtype.bits) {
        case 16:
          return DType::kFloat16;
        case 32:
          return DType::kFloat32;
        case 64:
          return DType::kFloat64;
        default:
          return DType::kOther;
      }
    case Code::Int:
      switch (dtype.bits) {
        case 8:
          return DType::kInt8;
        case 16:
          return DType::kInt16;
        case 32:
          return DType::kInt32;
        case 64:
          return DType::kInt64;
        default:
          return DType::kOther;
      }
    case Code::UInt:
      switch (dtype.bits) {
        case 8:
          return DType::kUInt8;
        case 16:
          return DType::kUInt16;
        case 32:
          return DType::kUInt32;
        case 64:
          return DType::kUInt64;
        default:
          return DType::kOther;
      }
    default:
      return DType::kOther;
  }
}

Device to_device(const char* name, nb::dlpack::device device) {
  switch (device.device_type) {
    case dlpack::kCpu:
    case dlpack::kCudaHost:
      return {DeviceType::kCpu, 0};
    case dlpack::kCuda:
    case dlpack::kCudaManaged:
      return {DeviceType::kCuda, device.device_id};
    default:
      throw InvalidArgument(std::string(name) +
                            ": expected an array on a CPU or CUDA device, got one on DLPack device " + "type " +
                            std::to_string(device.device_type));
  }
}

/// Throws what the array's library says of an array that it does not export, with the argument's name.
[[noreturn]] void refuse(const char* name, const nb::python_error& error) {
  const auto message = [&] {
    return std::string(name) + ": cannot be read through DLPack: " + nb::str(error.value()).c_str();
  };
  if (error.matches(PyExc_BufferError)) throw InvalidArgument(message());
  if (error.matches(PyExc_RuntimeError)) throw InvalidType(message());  // PyTorch's, of a dtype that DLPack has not
  throw error;
}

/// Calls array.__dlpack__ so that the producer neither synchronises nor makes another stream wait, which would end a
/// graph capture: whoever calls the library has made the data ready on the stream it names.
nb::object export_capsule(const char* name, nb::handle array) {
  if (!nb::hasattr(array, "__dlpack__") || !nb::hasattr(array, "__dlpack_device__")) {
    throw InvalidType(std::string(name) + ": expected an array that supports DLPack, got " +
                      nb::type_name(array.type()).c_str());
  }
  try {
    const auto device_type = nb::cast<std::int32_t>(nb::int_(array.attr("__dlpack_device__")()[nb::int_(0)]));
    nb::dict options;
    if (device_type == dlpack::kCuda || device_type == dlpack::kCudaManaged) options["stream"] = -1;
    nb::dict versioned = nb::borrow<nb::dict>(options.attr("copy")());
    versioned["max_version"] = nb::make_tuple(dlpack::kMajorVersion, dlpack::kMinorVersion);
    try {
      return array.attr("__dlpack__")(**versioned);
    } catch (const nb::python_error& e) {
      if (!e.matches(PyExc_TypeError)) throw;  // a producer from before DLPack 1.0 knows no max_version
    }
    return array.attr("__dlpack__")(**options);
  } catch (const nb::python_error& e) {
    refuse(name, e);
  }
}

/// The tensor in a capsule, which goes on owning it.
const dlpack::dltensor& open_capsule(const char* name, nb::handle capsule, Access access) {
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned") != 0) {
    const auto* managed =
        static_cast<dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    if (managed->version.major != dlpack::kMajorVersion) {
      throw InvalidArgument(std::string(name) + ": expected DLPack version 1, got " +
                            std::to_string(managed->version.major));
    }
    if (access == Access::kWrite && (managed->flags & dlpack::kFlagReadOnly) != 0) {
      throw InvalidArgument(std::string(name) + ": expected an array that can be written to, got a read-only one");
    }
    return managed->tensor;
  }
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor") != 0) {
    return static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor;
  }
  throw InvalidType(std::string(name) + ": expected an unused DLPack capsule, got " +
                    nb::type_name(capsule.type()).c_str());
}

void set_allocation_error(void* context, const char* /*kind*/, const char* message) {
  *static_cast<std::string*>(context) = message;
}

}  // namespace

Tensor to_tensor(const char* name, const dlpack::dltensor& source) {
  if (source.ndim < 1 || source.ndim > kMaxRank) {
    throw InvalidArgument(std::string(name) + ": expected 1 to " + std::to_string(kMaxRank) + " dimensions, got " +
                          std::to_string(source.ndim));
  }
  Tensor t;
  t.data = source.data == nullptr ? nullptr : static_cast<char*>(source.data) + source.byte_offset;
  t.dtype = to_dtype(source.dtype);
  t.device = to_device(name, source.device);
  t.rank = source.ndim;
  std::copy_n(source.shape, t.rank, t.shape.begin());
  if (source.strides == nullptr) {
    set_contiguous_strides(t);
  } else {
    std::copy_n(source.strides, t.rank, t.strides.begin());
  }
  return t;
}

const dlpack::ExchangeApi* find_exchange_api(nb::handle type) {
  static auto* cache = new std::unordered_map<PyObject*, const dlpack::ExchangeApi*>;
  if (const auto it = cache->find(type.ptr()); it != cache->end()) return it->second;

  const dlpack::ExchangeApi* api = nullptr;
  const nb::object capsule = nb::getattr(type, "__dlpack_c_exchange_api__", nb::none());
  if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api") != 0) {
    api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api->header.version.major != dlpack::kMajorVersion || api->view == nullptr) api = nullptr;
  }
  cache->emplace(nb::borrow(type).release().ptr(), api);
  return api;
}

ShapeDType::ShapeDType(std::vector<std::int64_t> extents, const std::string& dtype_name)
    : shape(std::move(extents)), dtype(DType::kOther) {
  for (int code = 0; code < static_cast<int>(DType::kOther); ++code) {
    if (dtype_name == flash_mla::dtype_name(static_cast<DType>(code))) dtype = static_cast<DType>(code);
  }
}

ArrayView::ArrayView(const char* name, nb::handle array, Access access) : api_(find_exchange_api(array.type())) {
  if (api_ != nullptr) {
    dlpack::dltensor view;
    if (api_->view(array.ptr(), &view) != 0) refuse(name, nb::python_error());
    tensor_ = to_tensor(name, view);
    return;
  }
  ShapeDType* described = nullptr;
  if (nb::try_cast(array, described) && described != nullptr) {  // None casts to null
    dlpack::dltensor view{};
    view.device = {dlpack::kCpu, 0};
    view.ndim = static_cast<std::int32_t>(described->shape.size());
    view.shape = described->shape.data();
    tensor_ = to_tensor(name, view);
    tensor_.dtype = described->dtype;
    return;
  }
  const Bfloat16Bits* bfloat16 = nullptr;
  if (nb::try_cast(array, bfloat16) && bfloat16 != nullptr) array = bfloat16->bits;
  capsule_ = PyCapsule_CheckExact(array.ptr()) ? nb::borrow(array) : export_capsule(name, array);
  tensor_ = to_tensor(name, open_capsule(name, capsule_, access));
  if (bfloat16 != nullptr && tensor_.dtype == DType::kUInt16) tensor_.dtype = DType::kBFloat16;
}

ArrayView ArrayView::optional(const char* name, nb::handle array, Access access) {
  return array.is_none() ? ArrayView() : ArrayView(name, array, access);
}

CUstream_st* ArrayView::current_stream(nb::handle stream) const {
  if (tensor_.device.type == DeviceType::kCpu) return nullptr;
  void* current = nullptr;
  if (api_ != nullptr) {
    if (api_->current_stream(dlpack::kCuda, tensor_.device.index, &current) != 0) throw nb::python_error();
  } else if (!stream.is_none()) {
    current = reinterpret_cast<void*>(nb::cast<std::uintptr_t>(stream));
  }
  return static_cast<CUstream_st*>(current);
}

Workspace::Workspace(const ArrayView& like, std::size_t num_bytes, nb::handle allocate) {
  if (num_bytes == 0) return;
  if (const dlpack::ExchangeApi* api = like.exchange_api(); api != nullptr) {
    auto extent = static_cast<std::int64_t>(num_bytes);
    dlpack::dltensor prototype;
    prototype.device = {dlpack::kCuda, like.tensor().device.index};
    prototype.ndim = 1;
    prototype.dtype = {static_cast<std::uint8_t>(dlpack::dtype_code::UInt), 8, 1};
    prototype.shape = &extent;
    std::string error;
    if (api->allocate(&prototype, &managed_, &error, set_allocation_error) != 0) {
      throw std::runtime_error("workspace: cannot allocate " + std::to_string(num_bytes) + " bytes: " + error);
    }
    data_ = static_cast<char*>(managed_->tensor.data) + managed_->tensor.byte_offset;
    return;
  }
  array_ = ArrayView("workspace", allocate(num_bytes), Access::kWrite);
  data_ = array_.tensor().data;
}

Workspace::~Workspace() {
  if (managed_ != nullptr && managed_->deleter != nullptr) managed_->deleter(managed_);
}

}  // namespace flash_mla::bindings

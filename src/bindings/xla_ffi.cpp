#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "bindings/register.h"
#include "bindings/xla_ffi_abi.h"
#include "flash_mla/dense_decode.h"
#include "flash_mla/error.h"
#include "flash_mla/merge_states.h"
#include "flash_mla/plan.h"

// The operations as XLA's custom calls. XLA calls the handlers on threads of its own, without the GIL.

namespace nb = nanobind;

namespace flash_mla::bindings {
namespace {

using namespace xla_ffi;

DType to_dtype(DataType dtype) {
  switch (dtype) {
    case DataType::kBool:
      return DType::kBool;
    case DataType::kInt8:
      return DType::kInt8;
    case DataType::kInt16:
      return DType::kInt16;
    case DataType::kInt32:
      return DType::kInt32;
    case DataType::kInt64:
      return DType::kInt64;
    case DataType::kUInt8:
      return DType::kUInt8;
    case DataType::kUInt16:
      return DType::kUInt16;
    case DataType::kUInt32:
      return DType::kUInt32;
    case DataType::kUInt64:
      return DType::kUInt64;
    case DataType::kFloat16:
      return DType::kFloat16;
    case DataType::kFloat32:
      return DType::kFloat32;
    case DataType::kFloat64:
      return DType::kFloat64;
    case DataType::kBFloat16:
      return DType::kBFloat16;
  }
  return DType::kOther;
}

/// One execution of a custom call. The methods throw InvalidArgument for what the Python package would not have asked
/// for, and Failure where XLA fails.
class Call {
 public:
  struct Failure {
    xla_ffi::Error* error;
  };

  Call(const CallFrame& frame, DeviceType platform) : frame_(frame) {
    device_.type = platform;
    if (platform == DeviceType::kCpu) return;
    if (frame.api->struct_size < sizeof(Api)) throw Unsupported("jaxlib: expected 0.6 or newer, got an older one");
    GetStreamArgs stream{sizeof(GetStreamArgs), nullptr, frame.context, nullptr};
    if (xla_ffi::Error* const error = frame.api->get_stream(&stream)) throw Failure{error};
    GetDeviceOrdinalArgs device{sizeof(GetDeviceOrdinalArgs), nullptr, frame.context, 0};
    if (xla_ffi::Error* const error = frame.api->get_device_ordinal(&device)) throw Failure{error};
    stream_ = static_cast<CUstream_st*>(stream.stream);
    device_.index = device.ordinal;
  }

  CUstream_st* stream() const { return stream_; }

  /// Throws unless there are `num_arguments` and `num_results`.
  void expect(std::int64_t num_arguments, std::int64_t num_results) const {
    if (frame_.arguments.size == num_arguments && frame_.results.size == num_results) return;
    throw InvalidArgument("custom call: expected " + std::to_string(num_arguments) + " arguments and " +
                          std::to_string(num_results) + " results, got " + std::to_string(frame_.arguments.size) +
                          " and " + std::to_string(frame_.results.size));
  }

  std::int64_t num_arguments() const { return frame_.arguments.size; }
  Tensor argument(const char* name, int index) const { return to_tensor(name, frame_.arguments, index); }
  Tensor result(const char* name, int index) const { return to_tensor(name, frame_.results, index); }

  template <class T>
  T attribute(std::string_view name, DataType dtype) const {
    const Attributes& attributes = frame_.attributes;
    for (std::int64_t i = 0; i < attributes.size; ++i) {
      if (std::string_view(attributes.names[i]->data, attributes.names[i]->size) != name) continue;
      const auto* const scalar = static_cast<const Scalar*>(attributes.values[i]);
      if (attributes.kinds[i] == kScalar && scalar->dtype == dtype) return *static_cast<const T*>(scalar->value);
    }
    throw InvalidArgument(std::string(name) + ": expected an attribute of type " + dtype_name(to_dtype(dtype)));
  }

 private:
  Tensor to_tensor(const char* name, const Buffers& buffers, int index) const {
    const auto* const buffer = static_cast<const Buffer*>(buffers.buffers[index]);
    if (buffers.kinds[index] != kBuffer || buffer->rank < 1 || buffer->rank > kMaxRank) {
      throw InvalidArgument(std::string(name) + ": expected an array of 1 to " + std::to_string(kMaxRank) +
                            " dimensions, got " + std::to_string(buffer->rank));
    }
    Tensor t;
    t.data = buffer->data;
    t.dtype = to_dtype(buffer->dtype);
    t.device = device_;
    t.rank = static_cast<int>(buffer->rank);
    std::copy_n(buffer->shape, t.rank, t.shape.begin());
    set_contiguous_strides(t);
    return t;
  }

  const CallFrame& frame_;
  Device device_;
  CUstream_st* stream_ = nullptr;
};

/// (q, k_cache, block_table, cache_seqlens[, tile_scheduler_metadata, num_splits]) -> (out, lse, workspace)
void decode(const Call& call) {
  const bool has_plan = call.num_arguments() > 4;
  call.expect(has_plan ? 6 : 4, 3);
  DenseDecodeArguments args;
  args.q = call.argument("q", 0);
  args.k_cache = call.argument("k_cache", 1);
  args.block_table = call.argument("block_table", 2);
  args.cache_seqlens = call.argument("cache_seqlens", 3);
  if (has_plan) {
    args.tile_scheduler_metadata = call.argument("tile_scheduler_metadata", 4);
    args.num_splits = call.argument("num_splits", 5);
  }
  args.out = call.result("out", 0);
  args.lse = call.result("lse", 1);
  args.softmax_scale = call.attribute<float>("softmax_scale", DataType::kFloat32);
  args.causal = call.attribute<bool>("causal", DataType::kBool);
  const Tensor workspace = call.result("workspace", 2);
  dense_decode(args, workspace.data, static_cast<std::size_t>(workspace.shape[0]), call.stream());
}

/// cache_seqlens -> (tile_scheduler_metadata, num_splits)
void plan(const Call& call) {
  call.expect(1, 2);
  const auto num_q_tokens_per_head_k = call.attribute<std::int64_t>("num_q_tokens_per_head_k", DataType::kInt64);
  plan_dense_decode(call.argument("cache_seqlens", 0), num_q_tokens_per_head_k,
                    call.result("tile_scheduler_metadata", 0), call.result("num_splits", 1), call.stream());
}

/// The arrays of `count` arguments from `first` on, or where it is one array that holds all states, those along its
/// first dimension.
std::vector<Tensor> states(const Call& call, const std::string& name, int first, int count, int rank) {
  std::vector<Tensor> tensors;
  for (int i = 0; i < count; ++i) {
    tensors.push_back(call.argument((name + "[" + std::to_string(i) + "]").c_str(), first + i));
  }
  const bool is_stacked = count == 1 && tensors[0].rank == rank + 1;
  return is_stacked ? unstack(tensors[0]) : tensors;
}

/// (outs..., lses...) -> (out, lse)
void merge(const Call& call) {
  constexpr int kOutRank = 4;
  constexpr int kLseRank = 3;
  const int num_arguments = static_cast<int>(call.num_arguments());
  const auto num_outs = call.attribute<std::int32_t>("num_outs", DataType::kInt32);
  if (num_outs < 1 || num_outs >= num_arguments) {
    throw InvalidArgument("num_outs: expected 1 to " + std::to_string(num_arguments - 1) + ", got " +
                          std::to_string(num_outs));
  }
  call.expect(num_arguments, 2);
  const std::vector<Tensor> outs = states(call, "outs", 0, num_outs, kOutRank);
  const std::vector<Tensor> lses = states(call, "lses", num_outs, num_arguments - num_outs, kLseRank);
  if (outs.size() != lses.size()) {
    throw InvalidArgument("lses: expected " + std::to_string(outs.size()) + " states as outs, got " +
                          std::to_string(lses.size()));
  }
  merge_states(
      {outs.data(), lses.data(), static_cast<std::int64_t>(outs.size()), call.result("out", 0), call.result("lse", 1)},
      call.stream());
}

xla_ffi::Error* make_error(const Api& api, ErrorCode code, const char* message) {
  CreateErrorArgs args{sizeof(CreateErrorArgs), nullptr, message, code};
  return api.create_error(&args);
}

/// Answers what XLA asks a handler at its registration. What is read here is the same in every minor version, so the
/// handler has the one that XLA has; old ones don't say, and take the oldest.
bool describe(const CallFrame& frame) {
  for (Extension* extension = frame.extensions; extension != nullptr; extension = extension->next) {
    if (extension->type != kMetadataExtension) continue;
    Metadata& metadata = *reinterpret_cast<MetadataExtension*>(extension)->metadata;
    metadata.version.major = kMajorVersion;
    metadata.version.minor = frame.api != nullptr ? frame.api->version.minor : kOldestMinorVersion;
    metadata.traits = kCommandBufferCompatible;
    return true;
  }
  return false;
}

template <void (*operation)(const Call&), DeviceType platform>
xla_ffi::Error* handle(CallFrame* frame) noexcept {
  if (describe(*frame) || frame->stage != kExecute) return nullptr;
  const Api& api = *frame->api;
  try {
    operation(Call(*frame, platform));
    return nullptr;
  } catch (const Call::Failure& failure) {
    return failure.error;
  } catch (const InvalidArgument& e) {
    return make_error(api, ErrorCode::kInvalidArgument, e.what());
  } catch (const Unsupported& e) {
    return make_error(api, ErrorCode::kUnimplemented, e.what());
  } catch (const std::exception& e) {
    return make_error(api, ErrorCode::kInternal, e.what());
  } catch (...) {
    return make_error(api, ErrorCode::kInternal, "an exception of unknown type");
  }
}

using Handler = xla_ffi::Error* (*)(CallFrame*);

nb::capsule to_capsule(Handler handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

template <DeviceType platform>
nb::dict handlers() {
  nb::dict by_name;
  by_name["flash_mla_dense_decode"] = to_capsule(handle<decode, platform>);
  by_name["flash_mla_plan_dense_decode"] = to_capsule(handle<plan, platform>);
  by_name["flash_mla_merge_states"] = to_capsule(handle<merge, platform>);
  return by_name;
}

nb::dict handlers_by_platform() {
  nb::dict by_platform;
  by_platform["cpu"] = handlers<DeviceType::kCpu>();
  by_platform["CUDA"] = handlers<DeviceType::kCuda>();
  return by_platform;
}

}  // namespace

void register_xla_ffi(nb::module_& m) {
  m.def("xla_ffi_handlers", handlers_by_platform,
        "The operations as handlers of XLA's FFI: by platform, by name, a capsule that jax.ffi.register_ffi_target "
        "takes.");
}

}  // namespace flash_mla::bindings

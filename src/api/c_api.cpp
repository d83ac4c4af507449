#include "flash_mla/c_api.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "api/argument.h"
#include "flash_mla/flash_mla.h"

namespace flash_mla {
namespace {

using checks::Argument;
using checks::check_rank;
using checks::fail;

static_assert(FLASH_MLA_BFLOAT16 == static_cast<int>(DType::kBFloat16));
static_assert(FLASH_MLA_FLOAT16 == static_cast<int>(DType::kFloat16));
static_assert(FLASH_MLA_FLOAT32 == static_cast<int>(DType::kFloat32));
static_assert(FLASH_MLA_FLOAT64 == static_cast<int>(DType::kFloat64));
static_assert(FLASH_MLA_FLOAT8_E4M3 == static_cast<int>(DType::kFloat8E4M3));
static_assert(FLASH_MLA_FLOAT8_E5M2 == static_cast<int>(DType::kFloat8E5M2));
static_assert(FLASH_MLA_INT8 == static_cast<int>(DType::kInt8));
static_assert(FLASH_MLA_INT16 == static_cast<int>(DType::kInt16));
static_assert(FLASH_MLA_INT32 == static_cast<int>(DType::kInt32));
static_assert(FLASH_MLA_INT64 == static_cast<int>(DType::kInt64));
static_assert(FLASH_MLA_UINT8 == static_cast<int>(DType::kUInt8));
static_assert(FLASH_MLA_UINT16 == static_cast<int>(DType::kUInt16));
static_assert(FLASH_MLA_UINT32 == static_cast<int>(DType::kUInt32));
static_assert(FLASH_MLA_UINT64 == static_cast<int>(DType::kUInt64));
static_assert(FLASH_MLA_BOOL == static_cast<int>(DType::kBool));
static_assert(FLASH_MLA_OTHER == static_cast<int>(DType::kOther));
static_assert(sizeof(flash_mla_tensor::shape) == sizeof(Tensor::shape));

/// Of fixed size, so that an error can be kept where memory has run out.
struct LastError {
  char message[1024];
  int cuda_error;
};
thread_local LastError last_error{};

flash_mla_status keep(flash_mla_status status, const char* message, int cuda_error = 0) noexcept {
  std::snprintf(last_error.message, sizeof(last_error.message), "%s", message);
  last_error.cuda_error = cuda_error;
  return status;
}

/// Runs `function`; an exception becomes a status, and the thread's last error.
template <class Function>
flash_mla_status guarded(const Function& function) noexcept {
  try {
    function();
    return FLASH_MLA_OK;
  } catch (const InvalidType& error) {
    return keep(FLASH_MLA_INVALID_TYPE, error.what());
  } catch (const InvalidArgument& error) {
    return keep(FLASH_MLA_INVALID_ARGUMENT, error.what());
  } catch (const Unsupported& error) {
    return keep(FLASH_MLA_UNSUPPORTED, error.what());
  } catch (const CudaError& error) {
    return keep(FLASH_MLA_CUDA_ERROR, error.what(), error.code());
  } catch (const std::bad_alloc&) {
    return keep(FLASH_MLA_OUT_OF_MEMORY, "out of host memory");
  } catch (const std::exception& error) {
    return keep(FLASH_MLA_INTERNAL_ERROR, error.what());
  } catch (...) {
    return keep(FLASH_MLA_INTERNAL_ERROR, "an exception of unknown type");
  }
}

template <class T>
T& require(const char* name, T* pointer) {
  if (pointer == nullptr) fail(name, "an address", "a null pointer");
  return *pointer;
}

Device to_device(Argument arg, std::int32_t type, std::int32_t index) {
  if (type != FLASH_MLA_CPU && type != FLASH_MLA_CUDA) {
    fail(arg, "device_type 0 (CPU) or 1 (CUDA)", std::to_string(type));
  }
  return {type == FLASH_MLA_CPU ? DeviceType::kCpu : DeviceType::kCuda, index};
}

/// @param index  where the tensor is one of a list
Tensor to_tensor(const char* name, const flash_mla_tensor& from, std::int64_t index = -1) {
  Tensor tensor;
  if (from.rank == 0) return tensor;
  const Argument arg{name, tensor, index};
  check_rank(arg, from.rank);
  tensor.data = from.data;
  const bool is_known = from.dtype >= 0 && from.dtype <= FLASH_MLA_OTHER;
  tensor.dtype = is_known ? static_cast<DType>(from.dtype) : DType::kOther;
  tensor.device = to_device(arg, from.device_type, from.device_index);
  tensor.rank = from.rank;
  std::copy_n(from.shape, kMaxRank, tensor.shape.begin());
  std::copy_n(from.strides, kMaxRank, tensor.strides.begin());
  return tensor;
}

/// A copy of the caller's struct, whose header may be older or newer than this library: fields that the caller does not
/// have yet are 0, and fields that the library does not know must be.
/// @param first_size  of the struct in the first version that had it
template <class Arguments>
Arguments read(const Arguments* arguments, std::size_t first_size) {
  const std::size_t size = require("arguments", arguments).struct_size;
  if (size < first_size) {
    fail("arguments", "struct_size of at least " + std::to_string(first_size), std::to_string(size));
  }
  Arguments known{};
  std::memcpy(&known, arguments, std::min(size, sizeof(known)));
  const auto* const bytes = reinterpret_cast<const unsigned char*>(arguments);
  if (size > sizeof(known) &&
      std::any_of(bytes + sizeof(known), bytes + size, [](unsigned char b) { return b != 0; })) {
    throw Unsupported("arguments: fields past the first " + std::to_string(sizeof(known)) +
                      " bytes are of a newer version than this library's, " FLASH_MLA_VERSION);
  }
  return known;
}

DenseDecodeArguments to_arguments(const flash_mla_dense_decode_arguments* arguments) {
  constexpr std::size_t kFirstSize = offsetof(flash_mla_dense_decode_arguments, causal) + sizeof(std::int32_t);
  const flash_mla_dense_decode_arguments from = read(arguments, kFirstSize);
  DenseDecodeArguments args;
  args.q = to_tensor("q", from.q);
  args.k_cache = to_tensor("k_cache", from.k_cache);
  args.block_table = to_tensor("block_table", from.block_table);
  args.cache_seqlens = to_tensor("cache_seqlens", from.cache_seqlens);
  args.out = to_tensor("out", from.out);
  args.lse = to_tensor("lse", from.lse);
  args.tile_scheduler_metadata = to_tensor("tile_scheduler_metadata", from.tile_scheduler_metadata);
  args.num_splits = to_tensor("num_splits", from.num_splits);
  args.softmax_scale = from.softmax_scale == 0.0F ? kDefaultSoftmaxScale : from.softmax_scale;
  args.causal = from.causal != 0;
  return args;
}

/// A list of tensors, on the stack: a call allocates nothing.
using States = std::array<Tensor, kMaxMergeStates>;

/// Reads a list into `to`, unless merge_states refuses it for its length.
/// @return what merge_states is to be given
const Tensor* to_tensors(const char* name, const flash_mla_tensor* from, std::int64_t num_states, States& to) {
  if (from == nullptr) return nullptr;
  const std::int64_t num_read = num_states <= kMaxMergeStates ? num_states : 0;
  for (std::int64_t i = 0; i < num_read; ++i) to[i] = to_tensor(name, from[i], i);
  return to.data();
}

void merge(const flash_mla_merge_states_arguments* arguments, CUstream_st* stream) {
  constexpr std::size_t kFirstSize = offsetof(flash_mla_merge_states_arguments, lse) + sizeof(flash_mla_tensor);
  const flash_mla_merge_states_arguments from = read(arguments, kFirstSize);
  States outs, lses;
  MergeStatesArguments args;
  args.outs = to_tensors("outs", from.outs, from.num_states, outs);
  args.lses = to_tensors("lses", from.lses, from.num_states, lses);
  args.num_states = from.num_states;
  args.out = to_tensor("out", from.out);
  args.lse = to_tensor("lse", from.lse);
  merge_states(args, stream);
}

}  // namespace
}  // namespace flash_mla

namespace fm = flash_mla;

const char* flash_mla_version() { return FLASH_MLA_VERSION; }

const char* flash_mla_last_error() { return fm::last_error.message; }

std::int32_t flash_mla_last_cuda_error() { return fm::last_error.cuda_error; }

flash_mla_status flash_mla_set_contiguous_strides(flash_mla_tensor* tensor) {
  return fm::guarded([&] {
    flash_mla_tensor& t = fm::require("tensor", tensor);
    fm::check_rank({"tensor", {}}, t.rank);
    std::array<std::int64_t, fm::kMaxRank> strides{};
    std::int64_t stride = 1;
    for (int i = t.rank - 1; i >= 0; --i) {
      strides[i] = stride;
      if (t.shape[i] < 0 || __builtin_mul_overflow(stride, t.shape[i], &stride)) {
        fm::fail("tensor", "extents of at least 0, and fewer than 2^63 elements",
                 std::to_string(t.shape[i]) + " as extent " + std::to_string(i));
      }
    }
    std::copy_n(strides.begin(), t.rank, t.strides);
  });
}

flash_mla_status flash_mla_dense_decode_num_sm_parts(std::int64_t num_q_tokens_per_head_k, std::int64_t num_heads_k,
                                                     std::int32_t device_type, std::int32_t device_index,
                                                     std::int64_t* num_sm_parts) {
  return fm::guarded([&] {
    std::int64_t& result = fm::require("num_sm_parts", num_sm_parts);
    result = fm::dense_decode_num_sm_parts(num_q_tokens_per_head_k, num_heads_k,
                                           fm::to_device({"device", {}}, device_type, device_index));
  });
}

flash_mla_status flash_mla_plan_dense_decode(const flash_mla_tensor* cache_seqlens,
                                             std::int64_t num_q_tokens_per_head_k,
                                             const flash_mla_tensor* tile_scheduler_metadata,
                                             const flash_mla_tensor* num_splits, CUstream_st* stream) {
  return fm::guarded([&] {
    const fm::Tensor lengths = fm::to_tensor("cache_seqlens", fm::require("cache_seqlens", cache_seqlens));
    const fm::Tensor metadata =
        fm::to_tensor("tile_scheduler_metadata", fm::require("tile_scheduler_metadata", tile_scheduler_metadata));
    const fm::Tensor splits = fm::to_tensor("num_splits", fm::require("num_splits", num_splits));
    fm::plan_dense_decode(lengths, num_q_tokens_per_head_k, metadata, splits, stream);
  });
}

flash_mla_status flash_mla_dense_decode_workspace_size(const flash_mla_dense_decode_arguments* arguments,
                                                       std::size_t* bytes) {
  return fm::guarded([&] {
    std::size_t& result = fm::require("bytes", bytes);
    result = fm::dense_decode_workspace_size(fm::to_arguments(arguments));
  });
}

flash_mla_status flash_mla_dense_decode_max_workspace_size(const flash_mla_dense_decode_arguments* arguments,
                                                           std::size_t* bytes) {
  return fm::guarded([&] {
    std::size_t& result = fm::require("bytes", bytes);
    result = fm::dense_decode_max_workspace_size(fm::to_arguments(arguments));
  });
}

flash_mla_status flash_mla_dense_decode(const flash_mla_dense_decode_arguments* arguments, void* workspace,
                                        std::size_t workspace_bytes, CUstream_st* stream) {
  return fm::guarded([&] { fm::dense_decode(fm::to_arguments(arguments), workspace, workspace_bytes, stream); });
}

flash_mla_status flash_mla_merge_states(const flash_mla_merge_states_arguments* arguments, CUstream_st* stream) {
  return fm::guarded([&] { fm::merge(arguments, stream); });
}

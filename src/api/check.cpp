#include "api/check.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>
#include <utility>

#include "flash_mla/error.h"
#include "flash_mla/plan.h"
#include "scheduler/split_plan.h"

namespace flash_mla {
namespace {

constexpr std::int64_t kMaxInt32 = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kVectorBytes = 16;       // alignment of bulk copies and vector loads on the GPU
constexpr std::int64_t kMaxGridExtent = 65535;  // of a kernel launch's second and third dimension
constexpr std::int64_t kMaxBulkStride = (std::int64_t{1} << 39) - 1;  // elements: what the copy engine can step
// No tensor spans more elements than this, so that byte offsets fit into int64.
constexpr std::int64_t kMaxElementOffset = std::int64_t{1} << 56;

/// An argument and the name that its errors carry.
struct Argument {
  const char* name;
  const Tensor& tensor;
};

/// One extent of an expected shape: a number, or a name where any number will do.
struct Extent {
  Extent(const char* any) : name(any), value(-1) {}            // NOLINT(google-explicit-constructor)
  Extent(std::int64_t exact) : name(nullptr), value(exact) {}  // NOLINT(google-explicit-constructor)
  const char* name;
  std::int64_t value;
};
using Extents = std::initializer_list<Extent>;

[[noreturn]] void fail(const char* name, const std::string& expected, const std::string& got) {
  throw InvalidArgument(std::string(name) + ": expected " + expected + ", got " + got);
}

std::string to_string(const std::array<std::int64_t, kMaxRank>& values, int rank) {
  std::string text = "(";
  for (int i = 0; i < rank; ++i) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
  return text + (rank == 1 ? ",)" : ")");
}

std::string to_string(Extents extents) {
  std::string text = "(";
  for (const Extent* e = extents.begin(); e != extents.end(); ++e) {
    text += (e != extents.begin() ? ", " : "") + (e->name != nullptr ? std::string(e->name) : std::to_string(e->value));
  }
  return text + (extents.size() == 1 ? ",)" : ")");
}

std::string to_string(Device device) {
  return device.type == DeviceType::kCpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

std::string to_string(const void* address) {
  std::ostringstream text;
  text << address;
  return text.str();
}

/// Divisions are most of what a check costs; these divisors are powers of two.
bool is_multiple(std::uint64_t value, std::int64_t power_of_two) {
  return (value & static_cast<std::uint64_t>(power_of_two - 1)) == 0;
}

bool is_empty(const Tensor& t) {
  for (int i = 0; i < t.rank; ++i) {
    if (t.shape[i] == 0) return true;
  }
  return false;
}

bool is_contiguous(const Tensor& t) {
  std::int64_t stride = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    if (t.shape[i] > 1 && t.strides[i] != stride) return false;
    stride *= t.shape[i];
  }
  return true;
}

std::int64_t element_size(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16 ? 2 : 4; }

/// The offset of a tensor's last element from its first: both ends of what it touches, as strides are not negative.
std::int64_t last_offset(const Tensor& t) {
  std::int64_t offset = 0;
  for (int i = 0; i < t.rank; ++i) offset += t.shape[i] > 1 ? (t.shape[i] - 1) * t.strides[i] : 0;
  return offset;
}

void check_shape(Argument arg, Extents expected) {
  const Tensor& t = arg.tensor;
  bool matches = t.rank == static_cast<int>(expected.size());
  for (int i = 0; matches && i < t.rank; ++i) {
    const Extent& extent = expected.begin()[i];
    matches = extent.name != nullptr ? t.shape[i] >= 0 : t.shape[i] == extent.value;
  }
  if (!matches) fail(arg.name, "shape " + to_string(expected), to_string(t.shape, t.rank));
}

/// `why` follows the dtype in the message.
void check_dtype(Argument arg, DType expected, const char* why = "") {
  if (arg.tensor.dtype == expected) return;
  throw InvalidType(std::string(arg.name) + ": expected dtype " + dtype_name(expected) + why + ", got " +
                    dtype_name(arg.tensor.dtype));
}

void check_device(Argument arg, Device expected, const char* owner) {
  if (arg.tensor.device == expected) return;
  fail(arg.name, "device " + to_string(expected) + " as " + owner, to_string(arg.tensor.device));
}

void check_range(Argument arg, const char* what, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value >= low && value <= high) return;
  fail(arg.name, std::string(what) + " from " + std::to_string(low) + " to " + std::to_string(high),
       std::to_string(value));
}

/// Strides that never run backwards nor beyond what can be addressed.
void check_strides(Argument arg) {
  const Tensor& t = arg.tensor;
  std::int64_t room = kMaxElementOffset;
  for (int i = 0; i < t.rank; ++i) {
    if (t.shape[i] <= 1) continue;
    if (t.strides[i] < 0) fail(arg.name, "strides of at least 0", to_string(t.strides, t.rank));
    std::int64_t span = 0;
    if (__builtin_mul_overflow(t.shape[i] - 1, t.strides[i], &span) || span > room) {
      fail(arg.name, "fewer than 2^56 elements from its first to its last", "strides " + to_string(t.strides, t.rank));
    }
    room -= span;
  }
}

void check_last_dim_contiguous(Argument arg) {
  const int last = arg.tensor.rank - 1;
  if (arg.tensor.shape[last] > 1 && arg.tensor.strides[last] != 1) {
    fail(arg.name, "a contiguous last dimension (stride 1)",
         "strides " + to_string(arg.tensor.strides, arg.tensor.rank));
  }
}

void check_contiguous(Argument arg) {
  if (is_contiguous(arg.tensor)) return;
  fail(arg.name, "a contiguous array", "strides " + to_string(arg.tensor.strides, arg.tensor.rank));
}

/// An output's elements must not share memory: taken from the smallest stride up, each dimension steps over all that
/// the dimensions before it span.
void check_no_self_overlap(Argument arg) {
  const Tensor& t = arg.tensor;
  if (is_contiguous(t)) return;
  std::array<int, kMaxRank> order{0, 1, 2, 3};
  for (int i = 0; i < t.rank; ++i) {
    for (int j = i + 1; j < t.rank; ++j) {
      if (t.strides[order[j]] < t.strides[order[i]]) std::swap(order[i], order[j]);
    }
  }
  std::int64_t span = 1;
  for (int i = 0; i < t.rank; ++i) {
    const int dim = order[i];
    if (t.shape[dim] <= 1) continue;
    if (t.strides[dim] < span) {
      fail(arg.name, "strides that keep its elements apart",
           "strides " + to_string(t.strides, t.rank) + " for shape " + to_string(t.shape, t.rank));
    }
    span += (t.shape[dim] - 1) * t.strides[dim];
  }
}

/// Strides that bulk copies and vector loads on the GPU can take.
void check_gpu_strides(Argument arg) {
  const Tensor& t = arg.tensor;
  const std::int64_t elements = element_size(t.dtype) == 2 ? kVectorBytes / 2 : kVectorBytes / 4;
  for (int i = 0; i + 1 < t.rank; ++i) {
    if (t.shape[i] <= 1) continue;
    if (!is_multiple(static_cast<std::uint64_t>(t.strides[i]), elements)) {
      fail(arg.name, "strides that are multiples of " + std::to_string(elements) + " elements, but for the last",
           to_string(t.strides, t.rank));
    }
    if (t.strides[i] > kMaxBulkStride) {
      fail(arg.name, "strides up to " + std::to_string(kMaxBulkStride) + " elements", to_string(t.strides, t.rank));
    }
  }
}

void check_address(Argument arg, std::int64_t alignment) {
  const void* data = arg.tensor.data;
  if (is_empty(arg.tensor)) return;
  if (data == nullptr) fail(arg.name, "data", "a null pointer");
  if (!is_multiple(reinterpret_cast<std::uintptr_t>(data), alignment)) {
    fail(arg.name, "an address that is a multiple of " + std::to_string(alignment), to_string(data));
  }
}

/// The memory between a tensor's first and last element; nothing where it has no elements.
struct Span {
  explicit Span(Argument arg) : name(arg.name) {
    if (is_empty(arg.tensor)) return;
    begin = reinterpret_cast<std::uintptr_t>(arg.tensor.data);
    end = begin + (last_offset(arg.tensor) + 1) * element_size(arg.tensor.dtype);
  }
  const char* name;
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
};

void check_apart(const Span& output, const Span& other) {
  if (output.begin >= other.end || other.begin >= output.end) return;
  fail(output.name, std::string("memory apart from ") + other.name,
       "bytes " + to_string(reinterpret_cast<const void*>(output.begin)) + " to " +
           to_string(reinterpret_cast<const void*>(output.end)) + " that overlap it");
}

/// A contiguous int32 array.
void check_int32_array(Argument arg, Extents shape) {
  check_shape(arg, shape);
  check_dtype(arg, DType::kInt32);
  if (!is_empty(arg.tensor)) check_contiguous(arg);
}

/// A tensor that the kernels copy in bulk, or write in vectors: rows of one head's values.
void check_rows(Argument arg) {
  if (is_empty(arg.tensor)) return;
  check_strides(arg);
  check_last_dim_contiguous(arg);
  if (arg.tensor.device.type == DeviceType::kCuda) check_gpu_strides(arg);
}

void check_q(Argument q) {
  check_shape(q, {"batch_size", "seqlen_q", "num_heads_q", kHeadDimQk});
  if (q.tensor.dtype != DType::kBFloat16 && q.tensor.dtype != DType::kFloat16) {
    throw InvalidType(std::string("q: expected dtype bfloat16 or float16, got ") + dtype_name(q.tensor.dtype));
  }
  const auto& shape = q.tensor.shape;
  check_range(q, "batch_size", shape[0], 0, kMaxInt32 - 1);  // num_splits has one more
  check_range(q, "num_heads_q", shape[2], 1, kMaxInt32);
  check_range(q, "seqlen_q", shape[1], 0, kMaxInt32 / shape[2]);
  check_rows(q);
}

void check_k_cache(Argument k_cache, const Tensor& q) {
  check_shape(k_cache, {"num_pages", "page_size", "num_heads_k", kHeadDimQk});
  check_dtype(k_cache, q.dtype, " as q");
  const auto& shape = k_cache.tensor.shape;
  check_range(k_cache, "num_pages", shape[0], 0, kMaxInt32);
  check_range(k_cache, "page_size", shape[1], 1, kMaxInt32);
  if ((shape[1] & (shape[1] - 1)) != 0) {
    fail(k_cache.name, "page_size that is a power of two", std::to_string(shape[1]));
  }
  check_range(k_cache, "num_heads_k", shape[2], 1, kMaxGridExtent);
  if (q.shape[2] % shape[2] != 0) {
    fail(k_cache.name, "num_heads_k that divides num_heads_q " + std::to_string(q.shape[2]), std::to_string(shape[2]));
  }
  check_rows(k_cache);
}

void check_block_table(Argument block_table, std::int64_t batch_size, std::int64_t page_size) {
  check_shape(block_table, {batch_size, "max_pages"});
  check_dtype(block_table, DType::kInt32);
  const std::int64_t max_pages = block_table.tensor.shape[1];
  if (max_pages > kMaxInt32 / page_size) {
    fail(block_table.name,
         "max_pages * page_size below 2^31, which is max_pages up to " + std::to_string(kMaxInt32 / page_size),
         std::to_string(max_pages));
  }
  if (is_empty(block_table.tensor)) return;
  check_strides(block_table);
  check_last_dim_contiguous(block_table);
}

void check_out(Argument out, const Tensor& q) {
  check_shape(out, {q.shape[0], q.shape[1], q.shape[2], kHeadDimV});
  check_dtype(out, q.dtype, " as q");
  check_rows(out);
  if (!is_empty(out.tensor)) check_no_self_overlap(out);
}

void check_lse(Argument lse, const Tensor& q) {
  check_shape(lse, {q.shape[0], q.shape[2], q.shape[1]});
  check_dtype(lse, DType::kFloat32);
  if (is_empty(lse.tensor)) return;
  check_strides(lse);
  check_no_self_overlap(lse);
}

void check_plan_arrays(Argument tile_scheduler_metadata, Argument num_splits, std::int64_t batch_size) {
  check_int32_array(tile_scheduler_metadata, {"num_sm_parts", kTileSchedulerMetadataSize});
  check_range(tile_scheduler_metadata, "num_sm_parts", tile_scheduler_metadata.tensor.shape[0], 1,
              scheduler::kMaxParts);
  check_int32_array(num_splits, {batch_size + 1});
}

void check_softmax_scale(float scale) {
  if (std::isfinite(scale) && scale > 0.0F) return;
  std::ostringstream got;
  got << scale;
  fail("softmax_scale", "a finite number above 0", got.str());
}

}  // namespace

DenseDecodeShape check_dense_decode(const DenseDecodeArguments& args, bool with_pointers) {
  const Argument q{"q", args.q};
  const Argument k_cache{"k_cache", args.k_cache};
  const Argument block_table{"block_table", args.block_table};
  const Argument cache_seqlens{"cache_seqlens", args.cache_seqlens};
  const Argument out{"out", args.out};
  const Argument lse{"lse", args.lse};
  const Argument tile_scheduler_metadata{"tile_scheduler_metadata", args.tile_scheduler_metadata};
  const Argument num_splits{"num_splits", args.num_splits};
  const bool has_plan = static_cast<bool>(args.tile_scheduler_metadata);

  check_q(q);
  check_k_cache(k_cache, args.q);
  const std::int64_t batch_size = args.q.shape[0];
  check_block_table(block_table, batch_size, args.k_cache.shape[1]);
  check_int32_array(cache_seqlens, {batch_size});
  check_out(out, args.q);
  check_lse(lse, args.q);
  if (has_plan != static_cast<bool>(args.num_splits)) {
    fail(has_plan ? "num_splits" : "tile_scheduler_metadata", "both parts of a plan or neither", "one alone");
  }
  if (has_plan) check_plan_arrays(tile_scheduler_metadata, num_splits, batch_size);
  check_softmax_scale(args.softmax_scale);

  for (const Argument arg : {k_cache, block_table, cache_seqlens, out, lse}) check_device(arg, args.q.device, "q");
  if (has_plan) {
    for (const Argument arg : {tile_scheduler_metadata, num_splits}) check_device(arg, args.q.device, "q");
  }
  if (with_pointers) {
    const std::int64_t row_alignment =
        args.q.device.type == DeviceType::kCuda ? kVectorBytes : element_size(args.q.dtype);
    for (const Argument arg : {q, k_cache, out}) check_address(arg, row_alignment);
    for (const Argument arg : {block_table, cache_seqlens, lse}) check_address(arg, sizeof(std::int32_t));
    const Span out_span(out);
    const Span lse_span(lse);
    const auto check_apart_from_outputs = [&](Argument input) {
      const Span span(input);
      check_apart(out_span, span);
      check_apart(lse_span, span);
    };
    check_apart(out_span, lse_span);
    for (const Argument input : {q, k_cache, block_table, cache_seqlens}) check_apart_from_outputs(input);
    if (has_plan) {
      check_address(tile_scheduler_metadata, kVectorBytes);
      check_address(num_splits, sizeof(std::int32_t));
      for (const Argument input : {tile_scheduler_metadata, num_splits}) check_apart_from_outputs(input);
    }
  }
  return {batch_size,
          args.q.shape[1],
          args.q.shape[2],
          args.k_cache.shape[2],
          args.k_cache.shape[0],
          args.k_cache.shape[1],
          args.block_table.shape[1],
          has_plan ? args.tile_scheduler_metadata.shape[0] : 0};
}

void check_plan(const Tensor& cache_seqlens_tensor, const Tensor& metadata_tensor, const Tensor& num_splits_tensor) {
  const Argument cache_seqlens{"cache_seqlens", cache_seqlens_tensor};
  const Argument metadata{"tile_scheduler_metadata", metadata_tensor};
  const Argument num_splits{"num_splits", num_splits_tensor};

  check_int32_array(cache_seqlens, {"batch_size"});
  check_range(cache_seqlens, "batch_size", cache_seqlens_tensor.shape[0], 0, kMaxInt32 - 1);
  check_plan_arrays(metadata, num_splits, cache_seqlens_tensor.shape[0]);
  for (const Argument arg : {metadata, num_splits}) check_device(arg, cache_seqlens_tensor.device, "cache_seqlens");

  check_address(cache_seqlens, sizeof(std::int32_t));
  check_address(metadata, kVectorBytes);
  check_address(num_splits, sizeof(std::int32_t));
  const Span metadata_span(metadata);
  const Span num_splits_span(num_splits);
  check_apart(metadata_span, num_splits_span);
  for (const Span& output : {metadata_span, num_splits_span}) check_apart(output, Span(cache_seqlens));
}

}  // namespace flash_mla

#include "api/check.h"

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>

#include "api/argument.h"
#include "cuda/device.h"
#include "flash_mla/plan.h"
#include "scheduler/split_plan.h"

namespace flash_mla {
namespace {

using namespace checks;

constexpr std::int64_t kMaxBatch = std::int64_t{1} << 30;  // so that plans of any lengths fit into their integers
constexpr std::int64_t kMaxBulkStride = (std::int64_t{1} << 39) - 1;  // elements: what the copy engine can step

/// A contiguous int32 array.
void check_int32_array(Argument arg, Extents shape) {
  check_shape(arg, shape);
  check_dtype(arg, DType::kInt32);
  if (!is_empty(arg.tensor)) check_contiguous(arg);
}

/// A tensor whose rows the kernels copy in bulk.
void check_bulk_rows(Argument arg) {
  check_rows(arg);
  const Tensor& t = arg.tensor;
  if (is_empty(t) || t.device.type != DeviceType::kCuda) return;
  for (int i = 0; i + 1 < t.rank; ++i) {
    if (t.shape[i] > 1 && t.strides[i] > kMaxBulkStride) {
      fail(arg, "strides up to " + std::to_string(kMaxBulkStride) + " elements", strides_of(arg));
    }
  }
}

void check_q(Argument q) {
  check_shape(q, {"batch_size", "seqlen_q", "num_heads_q", kHeadDimQk});
  if (q.tensor.dtype != DType::kBFloat16 && q.tensor.dtype != DType::kFloat16) {
    fail_dtype(q, "bfloat16 or float16");
  }
  const auto& shape = q.tensor.shape;
  check_range(q, "batch_size", shape[0], 0, kMaxBatch);
  check_range(q, "num_heads_q", shape[2], 1, kMaxInt32);
  check_range(q, "seqlen_q", shape[1], 0, kMaxInt32 / shape[2]);
  check_bulk_rows(q);
}

void check_k_cache(Argument k_cache, const Tensor& q) {
  check_shape(k_cache, {"num_pages", "page_size", "num_heads_k", kHeadDimQk});
  check_dtype(k_cache, q.dtype, " as q");
  const auto& shape = k_cache.tensor.shape;
  check_range(k_cache, "num_pages", shape[0], 0, kMaxInt32);
  check_range(k_cache, "page_size", shape[1], 1, kMaxInt32);
  if ((shape[1] & (shape[1] - 1)) != 0) {
    fail(k_cache, "page_size that is a power of two", std::to_string(shape[1]));
  }
  check_range(k_cache, "num_heads_k", shape[2], 1, cuda::kMaxGridExtent);
  if (q.shape[2] % shape[2] != 0) {
    fail(k_cache, "num_heads_k that divides num_heads_q " + std::to_string(q.shape[2]), std::to_string(shape[2]));
  }
  check_bulk_rows(k_cache);
}

void check_block_table(Argument block_table, std::int64_t batch_size, std::int64_t page_size) {
  check_shape(block_table, {batch_size, "max_pages"});
  check_dtype(block_table, DType::kInt32);
  const std::int64_t max_pages = block_table.tensor.shape[1];
  if (max_pages > kMaxInt32 / page_size) {
    fail(block_table,
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
  check_bulk_rows(out);
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
  char got[32];
  std::snprintf(got, sizeof(got), "%g", scale);
  fail("softmax_scale", "a finite number above 0", got);
}

constexpr std::size_t kNumArrays = 8;

/// Outputs first.
std::array<Argument, kNumArrays> arrays_of(const DenseDecodeArguments& args) {
  return {{{"out", args.out},
           {"lse", args.lse},
           {"q", args.q},
           {"k_cache", args.k_cache},
           {"block_table", args.block_table},
           {"cache_seqlens", args.cache_seqlens},
           {"tile_scheduler_metadata", args.tile_scheduler_metadata},
           {"num_splits", args.num_splits}}};
}

/// What follows from all but the addresses.
struct Layout {
  DenseDecodeShape shape;
  std::array<std::int64_t, kNumArrays> num_bytes;  // from each array's first element to its last
};

Layout check_layout(const DenseDecodeArguments& args) {
  const auto [out, lse, q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits] = arrays_of(args);
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
  Layout layout{
      {batch_size, args.q.shape[1], args.q.shape[2], args.k_cache.shape[2], args.k_cache.shape[0],
       args.k_cache.shape[1], args.block_table.shape[1], has_plan ? args.tile_scheduler_metadata.shape[0] : 0},
      {}};
  std::size_t i = 0;
  for (const Argument arg : arrays_of(args)) layout.num_bytes[i++] = num_bytes(arg.tensor);
  return layout;
}

bool have_same_layout(const Tensor& a, const Tensor& b) {
  std::int64_t difference = 0;
  for (int i = 0; i < kMaxRank; ++i) difference |= (a.shape[i] ^ b.shape[i]) | (a.strides[i] ^ b.strides[i]);
  return difference == 0 && a.dtype == b.dtype && a.device == b.device && a.rank == b.rank;
}

/// check_layout, remembered from the calling thread's last call: layers of a model differ in addresses only.
const Layout& remembered_layout(const DenseDecodeArguments& args) {
  static thread_local DenseDecodeArguments last_args;
  static thread_local Layout last{};
  const auto arrays = arrays_of(args);
  const auto last_arrays = arrays_of(last_args);
  bool is_same = static_cast<bool>(args.q) && args.softmax_scale == last_args.softmax_scale;
  for (std::size_t i = 0; i < kNumArrays; ++i) is_same &= have_same_layout(arrays[i].tensor, last_arrays[i].tensor);
  if (!is_same) {
    last = check_layout(args);
    last_args = args;
  }
  return last;
}

void check_addresses(const DenseDecodeArguments& args, const Layout& layout) {
  const auto arrays = arrays_of(args);
  const std::int64_t rows = row_alignment(args.q);
  const std::int64_t ints = sizeof(std::int32_t);
  const std::array<std::int64_t, kNumArrays> alignments{rows, ints, rows, rows, ints, ints, kVectorBytes, ints};
  for (std::size_t i = 0; i < kNumArrays; ++i) {
    if (layout.num_bytes[i] > 0) check_address_of_data(arrays[i], alignments[i]);
  }
  const Span out(arrays[0], layout.num_bytes[0]);
  const Span lse(arrays[1], layout.num_bytes[1]);
  check_apart(out, lse);
  for (std::size_t i = 2; i < kNumArrays; ++i) {
    const Span input(arrays[i], layout.num_bytes[i]);
    check_apart(out, input);
    check_apart(lse, input);
  }
}

}  // namespace

DenseDecodeShape check_dense_decode(const DenseDecodeArguments& args, bool with_pointers) {
  const Layout& layout = remembered_layout(args);
  if (with_pointers) check_addresses(args, layout);
  return layout.shape;
}

void check_plan(const Tensor& cache_seqlens_tensor, const Tensor& metadata_tensor, const Tensor& num_splits_tensor) {
  const Argument cache_seqlens{"cache_seqlens", cache_seqlens_tensor};
  const Argument metadata{"tile_scheduler_metadata", metadata_tensor};
  const Argument num_splits{"num_splits", num_splits_tensor};

  check_int32_array(cache_seqlens, {"batch_size"});
  check_range(cache_seqlens, "batch_size", cache_seqlens_tensor.shape[0], 0, kMaxBatch);
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

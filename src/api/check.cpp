#include "api/check.h"

#include <cmath>
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
  check_range(q, "batch_size", shape[0], 0, kMaxInt32 - 1);  // num_splits has one more
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
    for (const Argument arg : {q, k_cache, out}) check_address(arg, row_alignment(args.q));
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

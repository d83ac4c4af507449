#pragma once

#include <cstdint>

#include "flash_mla/dense_decode.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// Extents of a validated dense-decode call.
struct DenseDecodeShape {
  std::int64_t batch_size;
  std::int64_t seqlen_q;
  std::int64_t num_heads_q;
  std::int64_t num_heads_k;
  std::int64_t num_pages;
  std::int64_t page_size;
  std::int64_t max_pages;     // columns of block_table
  std::int64_t num_sm_parts;  // rows of tile_scheduler_metadata, 0 where it is left out
};

/// Checks everything about a call that can be known without reading its arrays. Batch, seqlen_q * num_heads_q,
/// num_pages and max_pages * page_size of the result fit into int32. Strides of extent-1 dimensions, and all strides
/// of empty tensors, are not looked at and may hold anything.
///
/// @param with_pointers  false where only shapes count: data pointers may then be null and are not checked
/// @throws InvalidArgument, InvalidType
DenseDecodeShape check_dense_decode(const DenseDecodeArguments& args, bool with_pointers);

/// Checks the arguments of plan_dense_decode.
/// @throws InvalidArgument, InvalidType
void check_plan(const Tensor& cache_seqlens, const Tensor& tile_scheduler_metadata, const Tensor& num_splits);

}  // namespace flash_mla

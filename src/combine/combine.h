#pragma once

#include <cstdint>

#include "flash_mla/tensor.h"
#include "scheduler/split_plan.h"

namespace flash_mla::combine {

/// Merges the pieces of split requests. Strides in elements.
struct CombineParams {
  const scheduler::Part* parts;  // (num_parts,)
  int num_parts;
  int batch_size;
  int seqlen_q;
  int num_heads_q;
  const float* out_accum;  // (2 * num_parts, seqlen_q, num_heads_q, 512): see sm90/dense_decode/params.h
  const float* lse_accum;  // (2 * num_parts, seqlen_q, num_heads_q), base 2
  void* out;               // (batch, seqlen_q, num_heads_q, 512)
  std::int64_t stride_out_batch, stride_out_query, stride_out_head;
  float* lse;  // (batch, num_heads_q, seqlen_q)
  std::int64_t stride_lse_batch, stride_lse_head, stride_lse_query;
};

/// Launches the merge on `stream`, overlapping the end of the kernel before it. Requests worked in one piece are left
/// alone. `dtype` is that of out.
void launch_combine(const CombineParams& params, DType dtype, CUstream_st* stream);

}  // namespace flash_mla::combine

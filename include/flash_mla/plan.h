#pragma once

#include <cstdint>

#include "flash_mla/export.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// int32 values of one row of tile_scheduler_metadata.
constexpr int kTileSchedulerMetadataSize = 8;

/// The number of parts that dense decode splits its work into: the first extent of tile_scheduler_metadata. One part
/// is one CTA for each KV head and each tile of 64 query rows, so that all SMs are busy once.
///
/// @param num_q_tokens_per_head_k  seqlen_q * num_heads_q / num_heads_k, at least 1
/// @param num_heads_k              KV heads, at least 1
/// @param device                   a Hopper GPU, whose SMs are counted, or the CPU, where the answer is 1
/// @throws InvalidArgument, Unsupported, CudaError
FLASH_MLA_API std::int64_t dense_decode_num_sm_parts(std::int64_t num_q_tokens_per_head_k, std::int64_t num_heads_k,
                                                     Device device);

/// Plans a step: which part works on which KV blocks of which requests. On a CUDA device it runs there, ordered on
/// `stream`; on the CPU it is done when the function returns (`stream` is ignored).
///
/// @param cache_seqlens            (batch,) int32, contiguous: tokens in each request's cache; negative counts as 0.
///                                 batch is at most 2^30
/// @param num_q_tokens_per_head_k  seqlen_q * num_heads_q / num_heads_k of the calls, at least 1: which requests are
///                                 worth splitting depends on it. A plan for others is right too, and may be slower
/// @param tile_scheduler_metadata  out: (num_sm_parts, 8) int32, contiguous, 1 to 160 rows, 16-byte aligned
/// @param num_splits               out: (batch + 1,) int32, contiguous: prefix sum of the number of splits per request.
///                                 The three arrays share no memory
/// @param stream                   a cudaStream_t of the arrays' device
/// @throws InvalidArgument, InvalidType, Unsupported, CudaError
FLASH_MLA_API void plan_dense_decode(const Tensor& cache_seqlens, std::int64_t num_q_tokens_per_head_k,
                                     const Tensor& tile_scheduler_metadata, const Tensor& num_splits,
                                     CUstream_st* stream);

}  // namespace flash_mla

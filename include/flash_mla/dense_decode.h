#pragma once

#include <cstddef>
#include <cstdint>

#include "flash_mla/export.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

constexpr int kHeadDimQk = 576;                       ///< values of a query head, and of a cached token: 512 + 64
constexpr int kHeadDimV = 512;                        ///< the first 512 of a token's values are its V
constexpr int kHeadDimRope = 64;                      ///< its last 64 values carry RoPE
constexpr float kDefaultSoftmaxScale = 1.0F / 24.0F;  ///< 576 ** -0.5

/// Dense MLA decode over a paged cache. All tensors lie on one device: a Hopper GPU (compute capability 9.0) or the
/// CPU. Every extent may be 0 except the head dimensions, the numbers of heads and the page size. seqlen_q *
/// num_heads_q, max_pages * page_size and num_pages are below 2^31, num_heads_k below 2^16, batch at most 2^30. The
/// memory that an output spans holds no part of another argument.
struct DenseDecodeArguments {
  /// (batch, seqlen_q, num_heads_q, 576), bfloat16 or float16. Last dimension contiguous; on the GPU the address and
  /// the other strides are multiples of 16 bytes, and strides below 2^39 elements.
  Tensor q;
  /// (num_pages, page_size, num_heads_k, 576), as q. page_size is a power of two; num_heads_k divides num_heads_q.
  /// Without pages lengths count as 0 on the GPU, and others are an error on the CPU.
  Tensor k_cache;
  /// (batch, max_pages), int32, last dimension contiguous: page numbers. Entries past a request's last page have no
  /// effect. A request's length is cut at max_pages * page_size.
  Tensor block_table;
  /// (batch,), int32, contiguous: tokens in each request's cache. 0 is legal; negative counts as 0.
  Tensor cache_seqlens;
  /// Out: (batch, seqlen_q, num_heads_q, 512), as q. Rows with no key to see get 0. Strides as q, and
  /// such that they keep its elements apart.
  Tensor out;
  /// Out: (batch, num_heads_q, seqlen_q), float32, strides that keep its elements apart: natural log of the sum of
  /// exp(softmax_scale * q.k); +inf for rows with no key to see.
  Tensor lse;
  /// What plan_dense_decode wrote for these cache_seqlens: (num_sm_parts, 8), of 1 to 160 rows, and (batch + 1,),
  /// int32, contiguous, the first at a multiple of 16 bytes. Leave both out, and the call plans by itself, on the
  /// device. Their contents are ignored on the CPU, and where there is one request.
  Tensor tile_scheduler_metadata;
  Tensor num_splits;
  /// Finite and above 0. On the GPU scores times it are float32: where they exceed 2^27, rows may be infinite or NaN,
  /// or count as having no key.
  float softmax_scale = kDefaultSoftmaxScale;
  /// Query i of seqlen_q sees keys up to cache_seqlens - seqlen_q + i (bottom-right).
  bool causal = false;
};

/// Bytes of device memory that dense_decode needs as workspace for these arguments: a function of shapes and of the
/// device only, never of values in device memory. 0 on the CPU. Pointers may be null here; where none is, they are
/// checked as dense_decode does.
/// @throws InvalidArgument, InvalidType, Unsupported, CudaError
FLASH_MLA_API std::size_t dense_decode_workspace_size(const DenseDecodeArguments& args);

/// The same for whoever lays out memory before there is a device to ask, as compilers do: bytes that suffice on every
/// GPU that the kernels run on, about a tenth more than on one of 132 SMs. No device is asked, nor need it exist.
/// @throws InvalidArgument, InvalidType
FLASH_MLA_API std::size_t dense_decode_max_workspace_size(const DenseDecodeArguments& args);

/// Runs dense decode. On a CUDA device: launches on `stream` and returns; allocates nothing, never synchronises, leaves
/// the calling thread's current device as it was, and can be captured in a CUDA graph, which on replay follows the
/// values in cache_seqlens, block_table and, if given, the plan. Two calls that may overlap need a workspace each.
/// On the CPU: threaded, done when the function returns; workspace and stream are ignored.
///
/// @param workspace        device memory, 16-byte aligned, contents arbitrary
/// @param workspace_bytes  at least dense_decode_workspace_size(args)
/// @throws InvalidArgument, InvalidType, Unsupported before anything is launched; CudaError
FLASH_MLA_API void dense_decode(const DenseDecodeArguments& args, void* workspace, std::size_t workspace_bytes,
                                CUstream_st* stream);

}  // namespace flash_mla

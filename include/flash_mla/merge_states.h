#pragma once

#include <cstdint>

#include "flash_mla/export.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// The most states that one call merges.
constexpr std::int64_t kMaxMergeStates = 128;

/// Merging of attention over parts of the keys: a state is what attention over one part gave, (out, lse), as dense
/// decode writes them. Merged, they are attention over all parts' keys: with weights w = exp(lse - lse'),
///
///     lse' = log(sum of exp(lse)),   out' = sum of w * out.
///
/// A row of a part without keys has lse +inf, as dense decode gives it, or -inf, as others do: it counts for nothing,
/// whatever its out holds. Where no part has a key, out' is 0 and lse' +inf. NaN in a row's lse makes the whole row
/// NaN, NaN in its out the value's sum.
///
/// All tensors lie on one device: a Hopper GPU (compute capability 9.0) or the CPU. Extents may be 0; batch * seqlen_q
/// * num_heads_q is below 2^31. The memory that an output spans holds no part of another argument.
struct MergeStatesArguments {
  /// num_states tensors, all of one shape and type: (batch, seqlen_q, num_heads_q, 512), bfloat16, float16 or float32.
  /// Last dimension contiguous; on the GPU the address and the other strides are multiples of 16 bytes. Each has
  /// strides of its own; where these differ, a GPU's driver is R530 or newer. unstack() makes them of a tensor that
  /// holds all states.
  const Tensor* outs = nullptr;
  /// num_states tensors: (batch, num_heads_q, seqlen_q), float32, natural logarithms, any strides.
  const Tensor* lses = nullptr;
  /// 1 to kMaxMergeStates.
  std::int64_t num_states = 0;
  /// Out: (batch, seqlen_q, num_heads_q, 512), as outs or float32. Strides as outs, and such that they keep its
  /// elements apart.
  Tensor out;
  /// Out: (batch, num_heads_q, seqlen_q), float32, strides that keep its elements apart.
  Tensor lse;
};

/// Merges states, in float32, in their order: the same bits for the same inputs. On a CUDA device: one launch on
/// `stream`, without workspace; never synchronises, leaves the calling thread's current device as it was, and can be
/// captured in a CUDA graph. On the CPU: threaded, done when the function returns; stream is ignored.
/// @throws InvalidArgument, InvalidType, Unsupported before anything is launched; CudaError
FLASH_MLA_API void merge_states(const MergeStatesArguments& args, CUstream_st* stream);

}  // namespace flash_mla

#pragma once

#include <cstdint>

#include "sm90/dense_decode/params.h"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/shared.cuh"

namespace flash_mla::sm90 {

/// A request whose pieces lie in consecutive parts.
struct SplitRequest {
  int request;
  int first_part;
  int num_pieces;  // 0: none

  __device__ int slot(int piece) const { return 2 * (first_part + piece) + (piece == 0 ? 1 : 0); }
};

/// A part has a piece of a request that it continues, and of one that it begins and does not end.
constexpr int kMaxSplitsPerPart = 2;

/// Split request number `i` of a part. By one warp. None, too, where the plan contradicts itself, so that not all
/// pieces would come.
__device__ inline SplitRequest find_split(const DenseDecodeParams& params, int part_idx, int i) {
  const scheduler::Part part = params.parts[part_idx];
  const bool continues = part.begin_block > 0 && part.first_part >= 0 && part.first_part < part_idx;
  const bool begins = part.num_pieces > 1 && (part.end_request > part.begin_request || part.begin_block == 0);
  if (part.begin_request > part.end_request || !(i == 0 ? continues : begins)) return {};

  const int first_part = i == 0 ? part.first_part : part_idx;
  const scheduler::Part first = params.parts[first_part];
  const SplitRequest split{first.end_request, first_part, first.num_pieces};
  bool is_good =
      split.request >= 0 && split.request < params.batch_size && part_idx < first_part + split.num_pieces &&
      split.num_pieces <= params.num_parts - first_part && first.end_block != scheduler::kToEnd &&
      (first.begin_request < split.request || (first.begin_request == split.request && first.begin_block == 0));
  for (int piece = 1 + threadIdx.x % 32; is_good && piece < split.num_pieces; piece += 32) {
    const scheduler::Part other = params.parts[first_part + piece];
    is_good = other.begin_request == split.request && other.end_request >= split.request && other.begin_block > 0;
  }
  return __all_sync(~0U, is_good) ? split : SplitRequest{};
}

/// Finds the part's split requests while the part is computed, and arrives at `ready`. By one warp.
__device__ inline void find_splits(const DenseDecodeParams& params, int part_idx,
                                   SplitRequest (&splits)[kMaxSplitsPerPart], std::uint64_t& ready) {
#pragma unroll 1
  for (int i = 0; i < kMaxSplitsPerPart; ++i) {
    const SplitRequest split = find_split(params, part_idx, i);
    if (threadIdx.x % 32 == 0) splits[i] = split;
  }
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ptx::shared_address(&ready));
}

}  // namespace flash_mla::sm90

#pragma once

#include <cstdint>

#include "scheduler/split_plan.h"
#include "sm90/ptx/math.cuh"

namespace flash_mla::scheduler {

/// The plan of a small batch within one warp, a request a lane, in as few instructions as will do: each runs once and
/// is fetched anew in each launch. What WarpPlan would give.
class SmallPlan {
 public:
  /// Larger lengths are WarpPlan's, and SplitPlan's for a request that is alone: with these, quotients of floats are
  /// off by one at most.
  static constexpr std::int32_t kMaxSeqlen = 1 << 20;

  /// Writes the row of a part, and if it continues a request, the number of that one's pieces. False where the batch is
  /// none that it plans, or its requests do not get parts of their own. By all lanes.
  __device__ static bool make(const std::int32_t* cache_seqlens, std::int32_t batch_size, std::int32_t max_parts,
                              QueryTiles tiles, std::int32_t part, Part& row, std::int32_t& continued_pieces) {
    if (batch_size > 32) return false;
    const std::int32_t lane = threadIdx.x % 32;
    const bool is_request = lane < batch_size;
    const std::int32_t seqlen = is_request ? cache_seqlens[lane] : 0;
    if (__any_sync(kAllLanes, seqlen > kMaxSeqlen)) return false;
    const std::int32_t blocks = (max(seqlen, 0) + kBlockN - 1) / kBlockN;
    const auto work = static_cast<std::int32_t>(__reduce_add_sync(kAllLanes, is_request ? max(blocks, 1) : 0));
    const std::int32_t num_nonempty = __popc(__ballot_sync(kAllLanes, seqlen > 0));

    const Divisor parts(min(work, max_parts));
    constexpr auto kPieceCost = static_cast<std::int32_t>(kMaxPieceCost);
    const std::int32_t cost = work + kPieceCost * num_nonempty;
    const std::int32_t share = parts.divide(cost);
    continued_pieces = 0;
    SplitPlan::write_empty(row, part, batch_size);
    const std::int32_t largest = parts.divide(cost - kPieceCost + parts.value - 1);
    std::int32_t quota = Divisor(max_parts).divide(work + max_parts - 1);
    std::int32_t count = 0;
    for (;; ++quota) {
      if (quota > largest) quota = 0;
      if (quota == 0) break;
      count = max(Divisor(quota).divide(blocks + quota - 1), is_request ? 1 : 0);
      if (static_cast<std::int32_t>(__reduce_add_sync(kAllLanes, count)) <= max_parts) break;
    }
    if (__all_sync(kAllLanes, blocks <= SplitPlan::longest_kept_whole(tiles, quota, share))) {
      if (part < batch_size) row = {part, 0, part, kToEnd, 1, part, {}};
      return true;
    }
    if (quota == 0) return false;
    std::int32_t first = count;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const std::int32_t below = __shfl_up_sync(kAllLanes, first, delta);
      if (lane >= delta) first += below;
    }
    first -= count;
    const unsigned found = __ballot_sync(kAllLanes, first <= part && part < first + count);
    if (found == 0) return true;
    const int request = __ffs(found) - 1;
    const Divisor pieces(__shfl_sync(kAllLanes, count, request));
    const std::int32_t its_blocks = __shfl_sync(kAllLanes, blocks, request);
    const std::int32_t first_part = __shfl_sync(kAllLanes, first, request);
    const std::int32_t idx = part - first_part;
    row.begin_request = row.end_request = request;
    row.begin_block = pieces.divide(its_blocks * idx);
    if (idx + 1 < pieces.value) row.end_block = pieces.divide(its_blocks * (idx + 1));
    row.num_pieces = pieces.value - idx;
    row.first_part = first_part;
    if (idx > 0) continued_pieces = pieces.value;
    return true;
  }

  /// The same for a request that is alone. Returns how many pieces it has.
  __device__ static std::int32_t make_alone(std::int32_t seqlen, std::int32_t max_parts, std::int32_t part, Part& row) {
    const std::int32_t blocks = max((seqlen + kBlockN - 1) / kBlockN, 1);
    const Divisor quota(Divisor(max_parts).divide(blocks + max_parts - 1));
    const Divisor pieces(quota.divide(blocks + quota.value - 1));
    SplitPlan::write_empty(row, part, 1);
    if (part < pieces.value) {
      row.begin_request = row.end_request = 0;
      row.begin_block = pieces.divide(blocks * part);
      if (part + 1 < pieces.value) row.end_block = pieces.divide(blocks * (part + 1));
      row.num_pieces = pieces.value - part;
      row.first_part = 0;
    }
    return pieces.value;
  }

 private:
  static constexpr unsigned kAllLanes = ~0U;

  /// Divides non-negative numbers below 2^22 whose quotient is below 2^20: a product of floats, put right by one.
  struct Divisor {
    std::int32_t value;
    float inverse;

    __device__ explicit Divisor(std::int32_t divisor)
        : value(divisor), inverse(ptx::reciprocal_approx(static_cast<float>(divisor))) {}
    __device__ std::int32_t divide(std::int32_t a) const {
      std::int32_t quotient = static_cast<std::int32_t>(static_cast<float>(a) * inverse);
      const std::int32_t rest = a - quotient * value;
      quotient += rest >= value ? 1 : 0;
      quotient -= rest < 0 ? 1 : 0;
      return quotient;
    }
  };
};

}  // namespace flash_mla::scheduler

#pragma once

#include <cstdint>

#include "scheduler/split_plan.h"

namespace flash_mla::scheduler {

/// Plans batches of at most as many requests as parts (plans_within_a_warp), within one warp: all lanes call everything
/// together. Each lane looks after the same number of requests in a row. Lengths are read anew each time: code and
/// registers are short in the kernels that plan.
class WarpPlan {
 public:
  __device__ WarpPlan(const std::int32_t* cache_seqlens, std::int32_t batch_size, std::int32_t num_parts,
                      QueryTiles tiles)
      : cache_seqlens_(cache_seqlens),
        batch_size_(batch_size),
        max_parts_(num_parts),
        requests_per_lane_((batch_size + 31) / 32),
        work_(read()),
        plan_(work_, num_parts) {
    // What is kept whole with the least quota, and with none, is with each: parts need not be counted for it.
    const std::int64_t least = plan_.least_quota(work_, num_parts);
    keeps_whole_ = keeps_whole(tiles, least) && keeps_whole(tiles, 0);
    if (!keeps_whole_) {
      quota_ = find_quota(least);
      keeps_whole_ = keeps_whole(tiles, quota_);
      if (keeps_whole_) quota_ = 0;
    }
    std::int64_t mine = 0;
#pragma unroll 1
    for (int i = 0; i < requests_per_lane_; ++i) mine += length(i);
    offset_ = sum_below(mine);
  }

  /// The row of a part. In `continued_pieces`, if it continues a request, the number of that one's pieces.
  __device__ Part row(std::int32_t part, std::int32_t& continued_pieces) const {
    continued_pieces = 0;
    if (keeps_whole_) {
      Part row{};
      plan_.write_whole(row, part, batch_size_);
      return row;
    }
    return quota_ > 0 ? own_row(part, continued_pieces) : cut_row(part, continued_pieces);
  }

  /// Writes num_splits, (batch_size + 1,).
  __device__ void write_num_splits(std::int32_t* num_splits) const {
    std::int64_t mine = 0;
    std::int64_t offset = offset_;
#pragma unroll 1
    for (int i = 0; i < requests_per_lane_; ++i) {
      mine += is_request(i) ? pieces(i, offset) : 0;
      offset += length(i);
    }
    std::int64_t splits = sum_below(mine);
    offset = offset_;
#pragma unroll 1
    for (int i = 0; i < requests_per_lane_; ++i) {
      if (is_request(i)) num_splits[request(i)] = static_cast<std::int32_t>(splits);
      splits += is_request(i) ? pieces(i, offset) : 0;
      offset += length(i);
      if (request(i) == batch_size_ - 1) num_splits[batch_size_] = static_cast<std::int32_t>(splits);
    }
  }

 private:
  static constexpr unsigned kAllLanes = ~0U;

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ std::int32_t request(int i) const { return lane() * requests_per_lane_ + i; }
  __device__ bool is_request(int i) const { return request(i) < batch_size_; }
  __device__ std::int32_t seqlen(int i) const { return cache_seqlens_[request(i)]; }

  __device__ Workload read() {
    Workload work;
    std::int32_t longest = 0;
#pragma unroll 1
    for (int i = 0; i < requests_per_lane_; ++i) {
      if (!is_request(i)) continue;
      work.add(seqlen(i));
      longest = max(longest, seqlen(i));
    }
    longest_ = num_blocks(__reduce_max_sync(kAllLanes, longest));
    work.num_blocks = sum(work.num_blocks);
    work.num_nonempty = sum(work.num_nonempty);
    return work;
  }

  /// How far a request reaches on the line on which parts are found: its cost, or its own parts.
  __device__ std::int64_t length(int i) const {
    if (!is_request(i)) return 0;
    return quota_ > 0 ? SplitPlan::own_parts(seqlen(i), quota_) : plan_.cost(seqlen(i));
  }
  __device__ std::int64_t pieces(int i, std::int64_t offset) const {
    return keeps_whole_ ? 1 : quota_ > 0 ? length(i) : plan_.num_pieces(offset, offset + length(i));
  }

  __device__ bool keeps_whole(QueryTiles tiles, std::int64_t quota) const {
    return may_keep_whole(batch_size_) && longest_ <= plan_.longest_kept_whole(tiles, quota);
  }

  /// The least quota of blocks with which parts suffice for each request to have its own, 0 if there is none. With less
  /// than `least` they cannot; with that or more, at most max_parts + batch_size are counted.
  __device__ std::int64_t find_quota(std::int64_t least) const {
    const std::int64_t largest = plan_.largest_quota();
#pragma unroll 1
    for (std::int64_t quota = least; quota <= largest; ++quota) {
      std::int32_t num_parts = 0;
#pragma unroll 1
      for (int i = 0; i < requests_per_lane_; ++i) {
        num_parts += is_request(i) ? SplitPlan::own_parts(seqlen(i), quota) : 0;
      }
      if (static_cast<std::int32_t>(__reduce_add_sync(kAllLanes, num_parts)) <= max_parts_) return quota;
    }
    return 0;
  }

  __device__ Part own_row(std::int32_t part, std::int32_t& continued_pieces) const {
    Part row;
    SplitPlan::write_empty(row, part, batch_size_);
    bool found = false;
    std::int32_t first = static_cast<std::int32_t>(offset_);
#pragma unroll 1
    for (int i = 0; i < requests_per_lane_; ++i) {
      const auto count = static_cast<std::int32_t>(length(i));
      if (first <= part && part < first + count) {
        SplitPlan::write_own(row, request(i), seqlen(i), first, part - first, count);
        continued_pieces = part > first ? count : 0;
        found = true;
      }
      first += count;
    }
    return from_lane(found, row, continued_pieces);
  }

  __device__ Part cut_row(std::int32_t part, std::int32_t& continued_pieces) const {
    Part begin{};
    Part end{};
    bool begins_here = false;
    bool ends_here = false;
    const std::int64_t cut = part < plan_.num_parts() ? plan_.cut(part) : -1;
    const std::int64_t next_cut = part + 1 < plan_.num_parts() ? plan_.cut(part + 1) : -1;
    std::int64_t offset = offset_;
#pragma unroll 1
    for (int i = 0; i < requests_per_lane_; ++i) {
      const std::int64_t end_offset = offset + length(i);
      if (offset <= cut && cut < end_offset) {
        plan_.write_cut(nullptr, &begin, part, request(i), offset, end_offset);
        if (begin.begin_block > 0) continued_pieces = plan_.num_pieces(offset, end_offset);
        begins_here = true;
      }
      if (offset <= next_cut && next_cut < end_offset) {
        plan_.write_cut(&end, nullptr, part + 1, request(i), offset, end_offset);
        ends_here = true;
      }
      offset = end_offset;
    }
    Part row = from_lane(begins_here, begin, continued_pieces);
    std::int32_t unused = 0;
    end = from_lane(ends_here, end, unused);
    row.end_request = end.end_request;
    row.end_block = end.end_block;
    row.num_pieces = end.num_pieces;
    plan_.write_rest(row, part, batch_size_);
    return row;
  }

  /// The value of the lane that has it, if one has.
  __device__ static Part from_lane(bool has_it, Part row, std::int32_t& also) {
    const unsigned lanes = __ballot_sync(kAllLanes, has_it);
    const int lane = lanes != 0 ? __ffs(lanes) - 1 : 0;
    row.begin_request = __shfl_sync(kAllLanes, row.begin_request, lane);
    row.begin_block = __shfl_sync(kAllLanes, row.begin_block, lane);
    row.end_request = __shfl_sync(kAllLanes, row.end_request, lane);
    row.end_block = __shfl_sync(kAllLanes, row.end_block, lane);
    row.num_pieces = __shfl_sync(kAllLanes, row.num_pieces, lane);
    row.first_part = __shfl_sync(kAllLanes, row.first_part, lane);
    also = __shfl_sync(kAllLanes, also, lane);
    return row;
  }

  __device__ static std::int64_t sum(std::int64_t value) {
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
    return value;
  }
  __device__ static std::int64_t sum_below(std::int64_t value) {
    std::int64_t inclusive = value;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const std::int64_t below = __shfl_up_sync(kAllLanes, inclusive, delta);
      if (lane() >= delta) inclusive += below;
    }
    return inclusive - value;
  }

  const std::int32_t* const cache_seqlens_;
  const std::int32_t batch_size_;
  const std::int32_t max_parts_;
  const std::int32_t requests_per_lane_;
  std::int64_t longest_ = 0;  // blocks
  const Workload work_;
  const SplitPlan plan_;
  bool keeps_whole_ = false;
  std::int64_t quota_ = 0;
  std::int64_t offset_ = 0;  // where the lane's first request begins
};

}  // namespace flash_mla::scheduler

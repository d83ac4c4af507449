#pragma once

#include <cstdint>

#include "flash_mla/plan.h"

// How a step's work is split over parts, in integer arithmetic that host and device share.
//
// A request of n KV blocks costs n plus a fixed cost for each piece it is worked in. Laid end to end, the requests'
// costs form a line of length total_cost, which is cut into num_parts intervals. Where each cut falls depends on the
// prefix sum of costs alone, so all parts are planned in parallel. A part whose interval begins inside a request pays
// that request's fixed cost once more; so the first interval is longer by one fixed cost than the others, which are
// equal, and no part costs more than (total_cost - piece_cost) / num_parts + piece_cost, rounded up.
//
// Splitting writes and reads partial results. Where there are as many parts as requests or more, each request gets
// parts of its own if that makes none longer than cuts would: a part then pays for one piece. And where every part can
// take the same number of whole requests, and none gets so much more than its share that merging would be sooner, no
// request is split. How much that is, depends on the query rows: merge_cost, longest_kept_whole.
//
// Where parts are short, intervals could not hold a piece's whole cost, and cuts count less. What is decided by costs
// counts all of it: with cuts some parts would have pieces of three requests.

#if defined(__CUDACC__)
#define FLASH_MLA_HOST_DEVICE __host__ __device__
#else
#define FLASH_MLA_HOST_DEVICE
#endif

namespace flash_mla::scheduler {

/// Tokens of a KV block: the unit in which requests are split.
constexpr int kBlockN = 64;

/// What a piece costs beside its blocks (load of Q, epilogue, combine), in blocks.
constexpr std::int64_t kMaxPieceCost = 2;

/// What the query rows of a KV head fill: a tile of 16, 32 or 64 rows, or several of 64. A block of few rows takes as
/// long as memory, on however many SMs the others are; one of 64 rows, as long as its CTA's tensor cores. So splitting
/// is worth most to few rows. CTAs of several tiles share KV.
enum class QueryTiles : std::int32_t { k16Rows, k32Rows, k64Rows, kSeveral };

/// Where requests could have parts of their own, of at most so many blocks, the quota: by how many more the longest may
/// have if all stay whole; and how many it may have, except with one tile of 64 rows. Measured:
/// docs/kernels/dense_decode.md, "What a plan decides for short requests".
constexpr std::int32_t kOwnMergeTime = 2;
constexpr std::int32_t kLongestShort = 4;

/// Parts of a plan: more than any Hopper GPU has SMs.
constexpr std::int32_t kMaxParts = 160;

/// Whether WarpPlan takes such a batch.
FLASH_MLA_HOST_DEVICE inline bool plans_within_a_warp(std::int32_t batch_size, std::int32_t num_parts) {
  return 0 < batch_size && batch_size <= num_parts && num_parts <= kMaxParts;
}

/// Other batches are not looked at for keeping requests whole. A request that is alone gets all parts that it can fill,
/// which needs no sums: SplitPlan::write_alone.
constexpr std::int32_t kMinBatchKeptWhole = 2;
constexpr std::int32_t kMaxBatchKeptWhole = 1024;
FLASH_MLA_HOST_DEVICE constexpr bool may_keep_whole(std::int32_t batch_size) {
  return kMinBatchKeptWhole <= batch_size && batch_size <= kMaxBatchKeptWhole;
}

/// end_block of a piece that reaches the end of its request, whatever its length is when the kernel runs.
constexpr std::int32_t kToEnd = INT32_MAX;

/// One row of tile_scheduler_metadata. The part works on requests begin_request to end_request, both included: from
/// begin_block of the first, up to end_block (excluded) of the last. An empty part has begin_request > end_request.
/// Every request belongs to a part, also one of length 0.
struct alignas(16) Part {
  std::int32_t begin_request;
  std::int32_t begin_block;
  std::int32_t end_request;
  std::int32_t end_block;
  /// Pieces of end_request from this part on. Above 1, the part's last piece is followed by one in each of the next
  /// num_pieces - 1 parts.
  std::int32_t num_pieces;
  /// The part that begins begin_request, where this one continues it.
  std::int32_t first_part;
  std::int32_t reserved[2];
};
static_assert(sizeof(Part) == kTileSchedulerMetadataSize * sizeof(std::int32_t), "one row of the metadata");

FLASH_MLA_HOST_DEVICE inline std::int64_t num_blocks(std::int32_t seqlen_k) {
  return seqlen_k > 0 ? (static_cast<std::int64_t>(seqlen_k) + kBlockN - 1) / kBlockN : 0;
}

/// a / b, not negative: in 32 bits where that is enough, which costs a GPU a third.
FLASH_MLA_HOST_DEVICE inline std::int64_t divide(std::int64_t a, std::int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
  return a / b;
}

/// What merging costs a part, in blocks, of `share` of the work: a time, and some of the work, as CTAs of long parts
/// end the further apart. Measured: docs/kernels/dense_decode.md, "Whole, or split".
template <class Int>
FLASH_MLA_HOST_DEVICE constexpr Int merge_cost(QueryTiles tiles, Int share) {
  constexpr Int kMostOfWork = 4;
  Int time = 4;
  Int of_work = share / 32;
  if (tiles == QueryTiles::k16Rows) {
    time = 1;
    of_work = share / 24;
  } else if (tiles != QueryTiles::kSeveral) {
    time = tiles == QueryTiles::k32Rows ? 2 : 3;
    of_work = share / 12;
  }
  return time + (of_work < kMostOfWork ? of_work : kMostOfWork);
}

/// Sums over all requests, from which the plan follows.
struct Workload {
  std::int64_t num_blocks = 0;    // a request of length 0 counts as one
  std::int64_t num_nonempty = 0;  // requests of length above 0

  FLASH_MLA_HOST_DEVICE void add(std::int32_t seqlen_k) {
    num_blocks += seqlen_k > 0 ? scheduler::num_blocks(seqlen_k) : 1;
    num_nonempty += seqlen_k > 0;
  }
};

/// Where cuts fall. "Offset" is a prefix sum of cost(): where a request begins on the line of costs.
class SplitPlan {
 public:
  FLASH_MLA_HOST_DEVICE SplitPlan(Workload work, std::int64_t max_parts) {
    num_parts_ = work.num_blocks < max_parts ? work.num_blocks : max_parts;
    // At most one cut may fall into a request's fixed cost: an interval is longer than that.
    const std::int64_t spare = num_parts_ > 0 ? divide(work.num_blocks, num_parts_) - 1 : 0;
    piece_cost_ = spare < kMaxPieceCost ? spare : kMaxPieceCost;
    total_cost_ = work.num_blocks + piece_cost_ * work.num_nonempty;
    full_cost_ = work.num_blocks + kMaxPieceCost * work.num_nonempty;
  }

  /// Parts with work: the first ones. The others stay empty.
  FLASH_MLA_HOST_DEVICE std::int64_t num_parts() const { return num_parts_; }
  FLASH_MLA_HOST_DEVICE std::int64_t total_cost() const { return total_cost_; }
  /// The same with the whole cost of pieces.
  FLASH_MLA_HOST_DEVICE std::int64_t full_cost() const { return full_cost_; }
  FLASH_MLA_HOST_DEVICE std::int64_t piece_cost() const { return piece_cost_; }

  FLASH_MLA_HOST_DEVICE std::int64_t cost(std::int32_t seqlen_k) const {
    return seqlen_k > 0 ? num_blocks(seqlen_k) + piece_cost_ : 1;
  }
  /// Where part `part` begins on the line of costs.
  FLASH_MLA_HOST_DEVICE std::int64_t cut(std::int64_t part) const {
    return part > 0 ? piece_cost_ + divide(part * (total_cost_ - piece_cost_), num_parts_) : 0;
  }
  /// The first part whose cut lies at or after `offset`.
  FLASH_MLA_HOST_DEVICE std::int64_t first_cut_from(std::int64_t offset) const {
    if (offset <= 0) return 0;
    if (offset <= piece_cost_) return 1;
    const std::int64_t length = total_cost_ - piece_cost_;
    return divide((offset - piece_cost_) * num_parts_ + length - 1, length);
  }
  /// The block at which `part`, whose cut lies inside the request at `offset`, begins.
  FLASH_MLA_HOST_DEVICE std::int32_t begin_block(std::int64_t part, std::int64_t offset) const {
    const std::int64_t block = cut(part) - offset - piece_cost_;
    return block > 0 ? static_cast<std::int32_t>(block) : 0;
  }
  /// The last part with a piece of the request that ends at `end_offset`.
  FLASH_MLA_HOST_DEVICE std::int64_t last_part(std::int64_t end_offset) const { return first_cut_from(end_offset) - 1; }
  /// The first part with a piece of the request that lies from `offset` to `end_offset`.
  FLASH_MLA_HOST_DEVICE std::int64_t first_part(std::int64_t offset, std::int64_t end_offset) const {
    const std::int64_t part = first_cut_from(offset);
    const bool begins_there = part < num_parts_ && cut(part) < end_offset && begin_block(part, offset) == 0;
    return begins_there ? part : part - 1;
  }
  /// In how many pieces the request from `offset` to `end_offset` is worked.
  FLASH_MLA_HOST_DEVICE std::int32_t num_pieces(std::int64_t offset, std::int64_t end_offset) const {
    return static_cast<std::int32_t>(last_part(end_offset) - first_part(offset, end_offset) + 1);
  }

  /// Requests of a part where none is split.
  FLASH_MLA_HOST_DEVICE std::int64_t whole_requests(std::int32_t batch_size) const {
    return divide(batch_size + num_parts_ - 1, num_parts_);
  }
  /// Whether a part may have so many whole requests of this cost(). For batches that WarpPlan does not take. An empty
  /// request counts as a piece here.
  FLASH_MLA_HOST_DEVICE bool allows_whole(QueryTiles tiles, std::int64_t cost, std::int64_t num_requests) const {
    const std::int64_t share = divide(full_cost_, num_parts_);
    return cost + (kMaxPieceCost - piece_cost_) * num_requests <= share + kMaxPieceCost + merge_cost(tiles, share);
  }
  /// Blocks that a part works at least and may work at most where requests have parts of their own.
  FLASH_MLA_HOST_DEVICE std::int64_t least_quota(const Workload& work, std::int64_t max_parts) const {
    return divide(work.num_blocks + max_parts - 1, max_parts);
  }
  FLASH_MLA_HOST_DEVICE std::int64_t largest_quota() const {
    const std::int64_t cost = full_cost_ > kMaxPieceCost ? full_cost_ - kMaxPieceCost : 0;
    return divide(cost + num_parts_ - 1, num_parts_);
  }
  /// Blocks of the longest request with which a batch of at most as many requests as parts is kept whole, a part for
  /// each. `quota`: the blocks that parts of their own have at most; 0 if there are none, and requests would be cut.
  /// Never less for a larger quota: WarpPlan counts on it.
  FLASH_MLA_HOST_DEVICE std::int64_t longest_kept_whole(QueryTiles tiles, std::int64_t quota) const {
    return longest_kept_whole(tiles, quota, divide(full_cost_, num_parts_));
  }
  /// `share`: of the full cost, a part's.
  template <class Int>
  FLASH_MLA_HOST_DEVICE static Int longest_kept_whole(QueryTiles tiles, Int quota, Int share) {
    if (quota == 0) {
      // Cuts give a part a second piece, which costs least at 16 rows.
      const Int of_piece = tiles == QueryTiles::k16Rows ? 0 : static_cast<Int>(kMaxPieceCost);
      return share + of_piece + merge_cost(tiles, share);
    }
    // Several tiles: requests of three blocks are sooner done in three parts, of two in one.
    const Int longest = tiles == QueryTiles::kSeveral && quota == 1 ? 2 : quota + kOwnMergeTime;
    return tiles != QueryTiles::k64Rows && longest > kLongestShort ? kLongestShort : longest;
  }
  /// Parts of a request of its own, of at most `quota` blocks.
  FLASH_MLA_HOST_DEVICE static std::int32_t own_parts(std::int32_t seqlen_k, std::int64_t quota) {
    if (seqlen_k <= 0) return 1;
    const auto blocks = static_cast<std::uint32_t>(num_blocks(seqlen_k));
    return static_cast<std::int32_t>((blocks + static_cast<std::uint32_t>(quota) - 1) /
                                     static_cast<std::uint32_t>(quota));
  }
  /// Writes the row of part `first_part + idx` of a request that has `count` parts of its own.
  FLASH_MLA_HOST_DEVICE static void write_own(Part& row, std::int32_t request, std::int32_t seqlen_k,
                                              std::int32_t first_part, std::int32_t idx, std::int32_t count) {
    const std::int64_t blocks = num_blocks(seqlen_k);
    const bool is_last = idx + 1 == count;
    row = {request,     static_cast<std::int32_t>(divide(blocks * idx, count)),
           request,     is_last ? kToEnd : static_cast<std::int32_t>(divide(blocks * (idx + 1), count)),
           count - idx, first_part,
           {}};
  }
  /// Writes a part's row where a request is alone, for which nothing need be summed. Returns how many parts it has.
  FLASH_MLA_HOST_DEVICE static std::int32_t write_alone(Part& row, std::int32_t seqlen_k, std::int32_t part,
                                                        std::int32_t num_parts) {
    const std::int64_t quota = divide(num_blocks(seqlen_k) + num_parts - 1, num_parts);
    const std::int32_t count = own_parts(seqlen_k, quota);
    if (part < count) {
      write_own(row, 0, seqlen_k, 0, part, count);
    } else {
      write_empty(row, part, 1);
    }
    return count;
  }
  /// Writes the row of a part without work.
  FLASH_MLA_HOST_DEVICE static void write_empty(Part& row, std::int32_t part, std::int32_t batch_size) {
    row = {batch_size, 0, batch_size - 1, kToEnd, 1, part, {}};
  }

  /// Writes a part's row where no request is split.
  FLASH_MLA_HOST_DEVICE void write_whole(Part& row, std::int64_t part, std::int32_t batch_size) const {
    const std::int64_t count = whole_requests(batch_size);
    const std::int64_t begin = part * count < batch_size ? part * count : batch_size;
    const std::int64_t end = begin + count < batch_size ? begin + count : batch_size;
    write_begin(row, static_cast<std::int32_t>(begin), 0, part);
    write_end(row, static_cast<std::int32_t>(end) - 1, kToEnd, 1);
  }

  /// Writes what the cut of `part` decides: where it begins, in `row`, and where the part before it ends, in `before`.
  /// The cut lies inside `request`, which spans `offset` to `end_offset`.
  FLASH_MLA_HOST_DEVICE void write_cut(Part* before, Part* row, std::int64_t part, std::int32_t request,
                                       std::int64_t offset, std::int64_t end_offset) const {
    const std::int32_t block = begin_block(part, offset);
    if (row != nullptr) write_begin(*row, request, block, block > 0 ? first_part(offset, end_offset) : part);
    if (before != nullptr) {
      write_end(*before, block > 0 ? request : request - 1, block > 0 ? block : kToEnd,
                block > 0 ? static_cast<std::int32_t>(last_part(end_offset) - part + 2) : 1);
    }
  }
  /// Writes what no cut decides: the end of the last part, and the empty parts behind it.
  FLASH_MLA_HOST_DEVICE void write_rest(Part& row, std::int64_t part, std::int32_t batch_size) const {
    if (part == num_parts_ - 1) write_end(row, batch_size - 1, kToEnd, 1);
    if (part >= num_parts_) write_empty(row, static_cast<std::int32_t>(part), batch_size);
  }

 private:
  FLASH_MLA_HOST_DEVICE static void write_begin(Part& row, std::int32_t request, std::int32_t block,
                                                std::int64_t first_part) {
    row.begin_request = request;
    row.begin_block = block;
    row.first_part = static_cast<std::int32_t>(first_part);
  }
  FLASH_MLA_HOST_DEVICE static void write_end(Part& row, std::int32_t request, std::int32_t block,
                                              std::int32_t num_pieces) {
    row.end_request = request;
    row.end_block = block;
    row.num_pieces = num_pieces;
    for (std::int32_t& value : row.reserved) value = 0;
  }

  std::int64_t num_parts_;
  std::int64_t piece_cost_;
  std::int64_t total_cost_;
  std::int64_t full_cost_;
};

}  // namespace flash_mla::scheduler

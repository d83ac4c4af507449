#pragma once

#include <cstdint>

#include "sm90/dense_decode/epilogue.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/part_plan.cuh"
#include "sm90/dense_decode/plan_source.h"
#include "sm90/dense_decode/slice_memory.cuh"
#include "sm90/dense_decode/slice_sums.cuh"
#include "sm90/dense_decode/slot.cuh"
#include "sm90/dense_decode/split_group.cuh"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/primitives/arrive.cuh"
#include "sm90/primitives/softmax.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/bulk.cuh"
#include "sm90/ptx/math.cuh"
#include "sm90/ptx/memory.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/warp.cuh"

// Merging the pieces of a split request, within the decode kernel. Parts merge a slice of the tile each: see
// SplitRequest. Who may wait for whom: see split_group.cuh.

namespace flash_mla::sm90 {

/// Merges one slice of a split request's tile. By all consumer threads. Half of their warps take the totals of the
/// slice's rows, as these announce themselves, and find weights, before the values are there. The other half's lanes
/// bring values into shared memory by bulk copies, which they issue as they see the pieces' flags. Then all add.
///
/// All of this runs once, so what counts is how many instructions follow on one another.
template <class Traits>
class Combine {
  using Element = typename Traits::Element;
  using Slot = SlotTile<Traits>;
  using Memory = SliceMemory<Traits>;
  using Result = typename Memory::Result;
  using Sums = SliceSums<Traits>;
  static constexpr int kWarps = Traits::kConsumerWarps;
  static constexpr int kLastWarp = kWarps - 1;
  static constexpr int kWeighingWarps = kWarps / 2;
  static constexpr int kLoadingWarps = kWarps - kWeighingWarps;
  static_assert(kWeighingWarps == kLoadingWarps && kWarps == MergeBarriers::kNumShares, "what MergeBarriers counts");

  /// Whether there is a lane for each total of any slice that is not added in shares, and for each row one of a warp
  /// that is left over.
  static constexpr bool has_lane_for_each_total() {
    for (int n = 2; n <= scheduler::kMaxParts; ++n) {
      const int units = Memory::max_units(n);
      if (units == 1 && n >= Sums::kMinPiecesInShares) continue;
      const int rows = units * Slot::kRowsOfUnit;
      int lanes = 2;
      while (lanes < n) lanes *= 2;
      if (rows > 32 || lanes > 32 || rows * lanes > 32 * (kWeighingWarps - 1)) return false;
    }
    return true;
  }
  static constexpr bool kHasLaneForEachTotal = has_lane_for_each_total();
  static_assert(!kHasLaneForEachTotal || !Traits::kKeepsTotals, "all totals are taken from the workspace");

 public:
  /// `rows`: of the tile, outside of `shared`: shared memory that nothing else uses any more once all consumers are
  /// here, aligned to 16 bytes. `barriers`: not used before; clear_flags waits for `seen`.
  __device__ Combine(const DenseDecodeParams& params, const QueryTile& tile, int head_k, const RowCoordinate* rows,
                     unsigned char* shared, MergeBarriers& barriers)
      : params_(params),
        rows_(rows),
        tile_(tile),
        head_k_(head_k),
        memory_(shared),
        met_(ptx::shared_address(&barriers.met)),
        gathered_(ptx::shared_address(&barriers.gathered)),
        rows_known_(ptx::shared_address(&barriers.rows_known)),
        share_loaded_(ptx::shared_address(&barriers.share_loaded)) {}

  /// `is_last`: of the slices of this request that the CTA merges, after which it looks at no flag any more. `keeps`:
  /// the first of two pieces is in shared memory, and the other is fetched by another warp. `ends`: nothing is left to
  /// do, so the threads end, which is sooner than by way of what calls this.
  __device__ __forceinline__ void run(const SplitRequest& split, int slice_idx, bool is_last, std::uint64_t& seen,
                                      bool keeps, bool ends) {
    const Slice slice = Slice::of_tile(Slot::kNumUnits, slice_idx, split.num_slices);
    const int n = split.num_pieces;
    memory_.lay_out(n, slice.count);

    ptx::fence_proxy_async();
    sync();  // shared memory is free
    if (slice.count == 1 && n >= Sums::kMinPiecesInShares) {
      merge<true>(split, Slice{slice.first, 1}, is_last, seen, false, ends);
    } else {
      merge<false>(split, slice, is_last, seen, keeps, ends);
    }
  }

 private:
  __device__ TileFlags flags() const { return {params_, tile_.index(params_.tiling, head_k_)}; }

  __device__ std::uint32_t share_loaded(int share) const {
    return share_loaded_ + share * static_cast<int>(sizeof(std::uint64_t));
  }

  /// A loading warp brings two shares of the pieces. If the slice, of one unit, is added in shares, it adds one of them
  /// itself, and a weighing warp the one before. A slice whose size is known has code of its own, which is shorter.
  template <bool kInShares>
  __device__ __forceinline__ void merge(const SplitRequest& split, const Slice& slice, bool is_last,
                                        std::uint64_t& seen, bool keeps, bool ends) {
    int n = split.num_pieces;
    ptx::launder(n);  // what is computed from it, is here, and takes no registers before
    const int num_rows = slice.count * Slot::kRowsOfUnit;
    const int share = warp() % kLoadingWarps * 2 + warp() / kWeighingWarps;
    constexpr bool kAtOnce = !kInShares && kHasLaneForEachTotal;
    if (warp() < kWeighingWarps) {
      if constexpr (!kAtOnce) {
        gather(split, slice, num_rows, keeps);
        weigh(num_rows, n);
      } else {
        if (warp() < kWeighingWarps - 1) {
          weigh_at_once(split, slice, num_rows, n);
        } else if (lane() < num_rows) {
          place(split.request, slice, lane());
        }
        ptx::mbarrier_arrive(gathered_);
      }
      ptx::mbarrier_arrive(rows_known_);
    } else {
      if (warp() == kWeighingWarps && lane() < MergeBarriers::kNumShares) {
        const int of_share = Sums::begin_of_share(lane() + 1, n) - Sums::begin_of_share(lane(), n);
        const int pieces = kInShares ? of_share : lane() == 0 ? n : 0;
        const bool is_fetched = keeps && lane() == 0;
        if (!is_fetched) {
          ptx::mbarrier_arrive_expect(share_loaded(lane()), pieces * slice.count * Slot::kUnitBytes);
        }
      }
      if constexpr (!kAtOnce) place_rows(split.request, slice, num_rows);
      ptx::mbarrier_arrive(rows_known_);
      if (!keeps) load<kInShares>(split, slice, n, share);
      if (is_last) arrive_of_warp(seen);
    }
    ptx::mbarrier_wait(rows_known_, phase_);
    __syncwarp();
    if (warp() == kLastWarp) write_lse(num_rows);
    const Sums sums(memory_);
    if constexpr (kInShares) {
      const typename Sums::Output output(memory_.results);
      ptx::mbarrier_wait(share_loaded(share), phase_);
      sums.add_share(share, n);
      sync();
      if (threadIdx.x < Sums::kSumThreads) sums.add_sums(n, output);
    } else {
      ptx::mbarrier_wait(share_loaded(0), phase_);
      if (Sums::kAddsTwo && n == 2 && slice.count >= Slot::kNumUnits / 2) {
        sums.add_two(slice.count);
      } else if (num_rows > 4) {
        sums.template add<8>(slice.count, n);
      } else if (num_rows > 2) {
        sums.template add<4>(slice.count, n);
      } else {
        sums.template add<2>(slice.count, n);
      }
    }
    if (ends) ptx::exit_thread();
    phase_ ^= 1;
  }

  /// Finds where the slice's rows go. By the threads that load.
  __device__ __forceinline__ void place_rows(int request, const Slice& slice, int num_rows) const {
    for (int row = threadIdx.x - 32 * kWeighingWarps; row < num_rows; row += 32 * kLoadingWarps) {
      place(request, slice, row);
    }
  }

  /// Where row `row` of the slice goes.
  __device__ __forceinline__ void place(int request, const Slice& slice, int row) const {
    const int unit = slice.first + row / Slot::kRowsOfUnit;
    const int consumer = unit % Traits::kNumConsumers;
    const int row_of_tile = unit / Traits::kNumConsumers * Slot::kRowsOfUnit + row % Slot::kRowsOfUnit;
    const RowCoordinate& at = rows_[row_of_tile];
    const FinalOutput<Element> output{params_, request};
    memory_.results[row].out = at.is_valid() ? output.row(at) + consumer * Traits::kColumnsPerConsumer : nullptr;
    memory_.results[row].lse = at.is_valid() && consumer == 0 ? output.lse(at) : nullptr;
  }

  /// Waits for the pieces of share `share` and of the one before, a lane for each, and brings what they have of the
  /// slice. A warp's pieces follow one another, so that it asks for one line for eight flags and not for one each: all
  /// CTAs of a tile ask for the same.
  template <bool kInShares>
  __device__ __forceinline__ void load(const SplitRequest& split, const Slice& slice, int n, int share) const {
    const int begin = Sums::begin_of_share(share - 1, n);
    const int middle = Sums::begin_of_share(share, n);
    const int end = Sums::begin_of_share(share + 1, n);
    const int bytes = slice.count * Slot::kUnitBytes;
#pragma unroll 1
    for (int first = begin; first < end; first += 32) {
      const int piece = first + lane();
      const Slot slot(params_, split.slot(piece), tile_.index(params_.tiling, head_k_));
      const unsigned char* const from = slot.values(slice.first);
      const std::uint32_t to = ptx::shared_address(memory_.values) + piece * bytes;
      const std::uint32_t loaded = share_loaded(!kInShares ? 0 : piece < middle ? share - 1 : share);
      const std::uint64_t* const flag = flags().written(split.slot(piece));
      // All lanes together: those that wait must not hold back the copies of the others.
      for (bool waits = piece < end; __any_sync(~0U, waits);) {
        if (!waits || ptx::load_acquire(flag) != params_.token) continue;
        waits = false;
        ptx::fence_proxy_async_global();
        if (bytes > 0) ptx::bulk_load(to, from, bytes, loaded);
      }
    }
    __syncwarp();
  }

  /// Brings the totals of the slice's rows, as they come, into shared memory, where those of a piece that is kept may
  /// be already. By the threads that weigh.
  __device__ __forceinline__ void gather(const SplitRequest& split, const Slice& slice, int num_rows, bool keeps) {
    const int n = split.num_pieces;
    const int tile = tile_.index(params_.tiling, head_k_);
    const int num_kept = Traits::kKeepsTotals && keeps ? num_rows : 0;
#pragma unroll 1
    for (int i = num_kept + threadIdx.x; i < n * num_rows; i += 32 * kWeighingWarps) {
      const int piece = i / num_rows;
      const int row = i % num_rows;
      const Slot slot(params_, split.slot(piece), tile);
      const Total total = Total::take(slot.totals(slice.first) + row, params_.token);
      memory_.totals[row * n + piece] = make_float4(total.max, total.sum, total.scale, 0.0F);
    }
    ptx::mbarrier_arrive(gathered_);
    ptx::mbarrier_wait(gathered_, phase_);
    __syncwarp();
  }

  /// Finds the weights of each row's pieces.
  __device__ __forceinline__ void weigh(int num_rows, int n) const {
    const int lanes_log2 = log2_lanes_of_row(n);
    const int lanes = 1 << lanes_log2;
#pragma unroll 1
    for (int first = warp() * 32 >> lanes_log2; first < num_rows; first += kWeighingWarps * 32 >> lanes_log2) {
      const int row = first + (lane() >> lanes_log2);
      const int begin = row * n + (lane() & (lanes - 1));
      const int end = row < num_rows ? (row + 1) * n : 0;
      float max = kNoMax;
#pragma unroll 1
      for (int i = begin; i < end; i += lanes) max = fmaxf(max, memory_.totals[i].x);
      max = max_of_row(max, lanes);
      float sum = 0.0F;
#pragma unroll 1
      for (int i = begin; i < end; i += lanes) {
        const float4 of_piece = memory_.totals[i];
        const float weight = ptx::exp2_approx(of_piece.x - max);
        sum = fmaf(weight, of_piece.y, sum);
        memory_.weights[i + row * (Memory::weights_of_row(n) - n)] = weight * of_piece.z;
      }
      sum = sum_of_row(sum, lanes);
      if (begin == row * n && end > 0) put_sums(row, max, sum);
    }
  }

  /// The same, a lane for each total, which it takes itself: nobody waits for all of them.
  __device__ __forceinline__ void weigh_at_once(const SplitRequest& split, const Slice& slice, int num_rows,
                                                int n) const {
    const int lanes_log2 = log2_lanes_of_row(n);
    const int lanes = 1 << lanes_log2;
    const int row = static_cast<int>(threadIdx.x) >> lanes_log2;
    const int piece = lane() & (lanes - 1);
    if (warp() * 32 >= num_rows << lanes_log2) return;
    Total total{kNoMax, 0.0F, 0.0F};
    const bool has_total = piece < n && row < num_rows;
    if (has_total) {
      const Slot slot(params_, split.slot(piece), tile_.index(params_.tiling, head_k_));
      total = Total::take(slot.totals(slice.first) + row, params_.token);
    }
    __syncwarp();
    const float max = max_of_row(fmaxf(total.max, kNoMax), lanes);
    const float weight = ptx::exp2_approx(total.max - max);
    if (has_total) memory_.weights[row * Memory::weights_of_row(n) + piece] = weight * total.scale;
    const float sum = sum_of_row(weight * total.sum, lanes);
    if (piece == 0 && row < num_rows) put_sums(row, max, sum);
  }

  /// Lanes that look after a row: one for each piece, if there are enough.
  __device__ static int log2_lanes_of_row(int n) { return min(32 - __clz(n - 1), 5); }
  __device__ __forceinline__ static float max_of_row(float value, int lanes) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
      const float its = __shfl_xor_sync(~0U, value, other);
      if (other < lanes) value = fmaxf(value, its);
    }
    return value;
  }
  __device__ __forceinline__ static float sum_of_row(float value, int lanes) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
      const float its = __shfl_xor_sync(~0U, value, other);
      if (other < lanes) value += its;
    }
    return value;
  }
  __device__ __forceinline__ void put_sums(int row, float max, float sum) const {
    memory_.results[row].max = max;
    memory_.results[row].sum = sum;
    memory_.results[row].inverse_sum = inverse_sum(sum);
  }

  __device__ __forceinline__ void write_lse(int num_rows) const {
#pragma unroll 1
    for (int row = lane(); row < num_rows; row += 32) {
      const Result& result = memory_.results[row];
      if (result.lse != nullptr) *result.lse = log_sum_exp(result.max, result.sum);
    }
  }

  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int lane() { return threadIdx.x % 32; }

  /// Waits for all consumer threads. A named barrier would do; racecheck of compute-sanitizer does not follow one.
  __device__ __forceinline__ void sync() {
    ptx::mbarrier_arrive(met_);
    ptx::mbarrier_wait(met_, met_phase_);
    met_phase_ ^= 1;
    __syncwarp();
  }

  const DenseDecodeParams& params_;
  const RowCoordinate* const rows_;  // of the tile
  const QueryTile& tile_;
  const int head_k_;
  Memory memory_;
  const std::uint32_t met_;
  const std::uint32_t gathered_;
  const std::uint32_t rows_known_;
  const std::uint32_t share_loaded_;
  std::uint32_t met_phase_ = 0;
  std::uint32_t phase_ = 0;  // of the others
};

/// Where the part keeps a piece, brings the other one behind it, as soon as consumers leave the memory. By one warp.
template <class Traits, class Storage>
__device__ __forceinline__ void fetch_rest(const DenseDecodeParams& params, const TileFlags& flags, Storage& shared,
                                           int tile) {
  constexpr int kCopies = 4;
  constexpr int kNanosecondsBetweenLooks = 500;
  constexpr int kBytes = SlotTile<Traits>::kNumUnits * SlotTile<Traits>::kUnitBytes;
  if (threadIdx.x % 32 == 0 && shared.plan.keeps_piece != 0) {
    const int slot = shared.plan.splits[1].slot(1);
    while (!flags.is_up(flags.written(slot))) __nanosleep(kNanosecondsBetweenLooks);
    ptx::load_acquire(flags.written(slot));
    ptx::fence_proxy_async_global();
    ptx::mbarrier_wait(ptx::shared_address(&shared.plan.memory_free), 0);
    const std::uint32_t loaded = ptx::shared_address(&shared.merge_barriers.share_loaded[0]);
    ptx::mbarrier_arrive_expect(loaded, kBytes);
    const unsigned char* from = SlotTile<Traits>(params, slot, tile).values(0);
    std::uint32_t to = ptx::shared_address(&shared) + kBytes;
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i, from += kBytes / kCopies, to += kBytes / kCopies) {
      ptx::bulk_load(to, from, kBytes / kCopies, loaded);
    }
  }
  __syncwarp();
}

/// Merges the part's slices of split requests, which a warp has found meanwhile. By all consumer threads, when the
/// part's pieces are done.
template <class Traits, PlanSource kPlanSource, class Storage>
__device__ __forceinline__ void merge_splits(const DenseDecodeParams& params, Storage& shared, const QueryTile& tile,
                                             int head_k) {
  Combine<Traits> combine(params, tile, head_k, shared.rows, reinterpret_cast<unsigned char*>(&shared),
                          shared.merge_barriers);
  ptx::mbarrier_wait(ptx::shared_address(&shared.plan.splits_ready), 0);
#pragma unroll 1
  for (int i = 1; i >= 0; --i) {  // the second first: its piece may be kept in memory that merging uses
    const SplitRequest split = shared.plan.splits[i];
    if (split.num_pieces == 0) continue;
    ptx::mbarrier_wait(ptx::shared_address(&shared.plan.slices_known[i]), 0);
    const SliceRange slices = shared.plan.slices[i];
#pragma unroll 1
    for (int slice = slices.begin; slice < slices.end; ++slice) {
      const bool is_last = slice == slices.end - 1;
      const bool ends = is_last && (i == 0 || shared.plan.splits[0].num_pieces == 0);
      const bool keeps = kMayKeepPiece<kPlanSource> && i == 1 && shared.plan.keeps_piece != 0;
      combine.run(split, slice, is_last, shared.merge_barriers.seen[i], keeps, ends);
    }
  }
}

}  // namespace flash_mla::sm90

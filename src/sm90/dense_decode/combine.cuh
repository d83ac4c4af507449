#pragma once

#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "sm90/dense_decode/epilogue.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/part_plan.cuh"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/slot.cuh"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/primitives/fragment.cuh"
#include "sm90/primitives/softmax.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/bulk.cuh"
#include "sm90/ptx/math.cuh"
#include "sm90/ptx/memory.cuh"
#include "sm90/ptx/shared.cuh"

// Merging the pieces of a split request, within the decode kernel. Parts merge a slice of the tile each: see
// SplitRequest. Who may wait for whom: see launch.cuh.

namespace flash_mla::sm90 {

/// The flags of one tile of one KV head. A flag holds the launch's token once its piece is in the workspace. Tokens are
/// unique among launches, but a replayed graph launches with the same one again: so the last reader of a request's
/// flags clears them.
struct TileFlags {
  std::uint64_t* flags;    // (2 * num_parts,): one for each slot
  std::uint64_t* readers;  // (num_parts,): CTAs that have all pieces of the request that the part begins

  __device__ TileFlags(const DenseDecodeParams& params, int tile) {
    flags = params.flags + static_cast<std::int64_t>(tile) * kFlagsPerPart * params.num_parts;
    readers = flags + 2 * params.num_parts;
  }
  /// By one thread, after all threads of the piece have written and synchronised, and with the splits found. Only where
  /// somebody reads the flag, and so clears it: one that stays up would tell a replayed graph that the piece is there.
  __device__ void publish(const DenseDecodeParams& params, const PartPlan& plan, int slot) const {
    const SplitRequest& split = plan.splits[slot % 2];
    if (split.num_pieces == 0 || !split.has_piece(slot / 2)) return;
    if (slot % 2 == 1) readers[slot / 2] = 0;  // a slot of a first piece
    ptx::store_release(&flags[slot], params.token);
  }
};

/// Tells the others which pieces of split requests are in the workspace. By one thread, while the consumers go on.
template <class Traits>
__device__ inline void publish_pieces(const DenseDecodeParams& params, const TileFlags& flags, PartPlan& plan,
                                      int part_idx) {
  PieceWalk walk(params, plan.part, part_idx);
  Piece piece;
  while (walk.next(piece)) {
    if (piece.is_whole) continue;
    ptx::mbarrier_wait(ptx::shared_address(&plan.piece_written[piece.slot % 2]), 0);
    flags.publish(params, plan, piece.slot);
  }
}

/// Merges one slice of a split request's tile. By all consumer threads. The slice of all pieces comes into shared
/// memory by bulk copies, which lanes issue as they see the pieces' flags. A unit is an octet of each lane of a warp.
/// Each row's weights are computed once; then each unit has a warp, or several that share its pieces where the slice
/// has few units.
///
/// All of this runs once, so what counts is how many instructions follow on one another.
template <class Traits>
class Combine {
  using Element = typename Traits::Element;
  using Slot = SlotTile<Traits>;
  static constexpr int kWarps = Traits::kConsumerWarps;
  static constexpr int kNumUnits = kWarps * Traits::kOctetsPerThread;
  static constexpr int kUnitBytes = 32 * sizeof(uint4);
  static constexpr int kWarpRowBytes = Slot::kRows * sizeof(float);
  static constexpr int kSumBytes = 32 * 8 * sizeof(float);  // a warp's sum of its pieces, on its way to another

  /// A slice of a tile: units, and the writing warps whose rows they lie in.
  struct Slice {
    int first;
    int count;
    int first_writer;
    int num_writers;

    __device__ __forceinline__ Slice(int slice, int num_slices)
        : first(kNumUnits * slice / num_slices), count(kNumUnits * (slice + 1) / num_slices - first) {
      first_writer = first / Traits::kOctetsPerThread;
      num_writers = count > 0 ? (first + count - 1) / Traits::kOctetsPerThread - first_writer + 1 : 1;
    }
    __device__ int piece_bytes() const { return count * kUnitBytes + num_writers * Slot::kRowsBytes; }
    /// From the begin of a piece on.
    __device__ int rows_of_writer(int writer) const { return count * kUnitBytes + writer * Slot::kRowsBytes; }
    __device__ int writer_of(int unit) const { return (first + unit) / Traits::kOctetsPerThread - first_writer; }
  };

  static constexpr int shared_bytes(int num_pieces) {
    const int count = (kNumUnits + num_pieces - 1) / num_pieces;
    const int writers = count > 1 ? (count - 2) / Traits::kOctetsPerThread + 2 : 1;
    return num_pieces * (count * kUnitBytes + (writers < kWarps ? writers : kWarps) * Slot::kRowsBytes) +
           kWarps * (2 * kWarpRowBytes + kSumBytes);
  }
  static constexpr int max_shared_bytes() {
    int most = 0;
    for (int pieces = 2; pieces <= scheduler::kMaxParts; ++pieces) {
      if (shared_bytes(pieces) > most) most = shared_bytes(pieces);
    }
    return most;
  }

 public:
  /// Shared memory that is enough for any number of pieces.
  static constexpr int kMinSharedBytes = max_shared_bytes();

  /// `shared`: shared memory that nothing else uses any more once all consumers are here, aligned to 16 bytes.
  /// `barriers`: what nothing else uses.
  __device__ Combine(const DenseDecodeParams& params, const QueryTile& tile, int head_k, std::uint32_t shared,
                     MergeBarriers& barriers)
      : params_(params),
        tile_(tile),
        head_k_(head_k),
        shared_(shared),
        met_(ptx::shared_address(&barriers.met)),
        loaded_(ptx::shared_address(&barriers.loaded)) {}

  __device__ __forceinline__ void run(const SplitRequest& split, int slice_idx) {
    const Slice slice(slice_idx, split.num_slices);
    const int n = split.num_pieces;
    int sharers = 1;
    while (sharers < kWarps && 2 * sharers * slice.count <= kWarps) sharers *= 2;
    const int sharer = warp() % sharers;
    int unit = sharers > 1 ? warp() / sharers : slice.count * warp() / kWarps;
    const int end = sharers > 1 ? unit + 1 : slice.count * (warp() + 1) / kWarps;
    int row = octet_of(slice.first + unit).row;
    Result result(*this, split, row);

    static_assert(scheduler::kMaxParts <= 32 * kWarps, "a lane for each piece");
    ptx::fence_proxy_async();
    sync();  // shared memory is free
    if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(loaded_, n * slice.piece_bytes());
    if (const int piece = warp() + lane() * kWarps; piece < n) load(split, piece, slice);
    ptx::mbarrier_wait(loaded_, loaded_phase_);
    loaded_phase_ ^= 1;
    // All pieces are here, so this CTA has seen all flags: loads that this depends on, so nothing need be released.
    // And this thread has seen the first piece's, before which the count was reset. Not waited for before it is
    // needed.
    const std::uint64_t readers = threadIdx.x == 0 ? ptx::atomic_add(reader_count(split), 1) : 0;
    const int parts_of_total = weigh(slice, n);
    sync();
#pragma unroll 1
    for (; unit < end; ++unit) {
      const bool is_unit = unit < slice.count;
      float value[8] = {};
      add(value, slice, unit, sharer, sharers, is_unit ? n : 0);
      if (sharers > 1) {
        if (sharer > 0) give(value, n * slice.piece_bytes());
        sync();
        if (sharer > 0 || !is_unit) break;
#pragma unroll 1
        for (int other = 1; other < sharers; ++other) take(value, n * slice.piece_bytes(), other);
      }
      const Octet octet = octet_of(slice.first + unit);
      if (octet.row != row) {
        row = octet.row;
        result = Result(*this, split, row);
      }
      write(result, value, octet, n * slice.piece_bytes(), slice.writer_of(unit), parts_of_total);
    }
    clear_flags(split, readers);
  }

 private:
  /// Where a thread's two rows of a unit go.
  struct Result {
    Element* out[2];  // null where the row is padding
    float* lse[2];

    __device__ __forceinline__ Result(const Combine& combine, const SplitRequest& split, int row) {
      const FinalOutput<Element> output{combine.params_, split.request};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const RowCoordinate at(combine.params_, combine.tile_, combine.head_k_, row + r * Traits::kOctetRowStep);
        out[r] = at.is_valid ? output.row(at) : nullptr;
        lse[r] = output.lse(at);
      }
    }
  };

  /// This lane's octet of a unit of the tile.
  __device__ static Octet octet_of(int unit) {
    return Traits::octet(unit / Traits::kOctetsPerThread, lane(), unit % Traits::kOctetsPerThread);
  }

  __device__ TileFlags flags() const { return {params_, tile_.index(params_.tiling, head_k_)}; }
  __device__ std::uint64_t* reader_count(const SplitRequest& split) const { return &flags().readers[split.first_part]; }
  __device__ __forceinline__ void clear_flags(const SplitRequest& split, std::uint64_t readers) const {
    if (warp() != 0 || static_cast<int>(__shfl_sync(~0U, readers, 0)) + 1 < split.num_slices) return;
    for (int piece = lane(); piece < split.num_pieces; piece += 32) flags().flags[split.slot(piece)] = 0;
  }

  /// Waits for a piece, and brings its share of the slice: units, then rows. By one thread.
  __device__ __forceinline__ void load(const SplitRequest& split, int piece, const Slice& slice) const {
    const Slot slot(params_, split.slot(piece), tile_.index(params_.tiling, head_k_));
    const std::uint32_t to = shared_ + piece * slice.piece_bytes();
    const std::uint64_t* const flag = &flags().flags[split.slot(piece)];
    while (ptx::load_acquire(flag) != params_.token) {
    }
    ptx::fence_proxy_async_global();
    if (slice.count > 0) ptx::bulk_load(to, slot.octets + slice.first * 32, slice.count * kUnitBytes, loaded_);
    ptx::bulk_load(to + slice.rows_of_writer(0), slot.rows + slice.first_writer * Slot::kRowsBytes,
                   slice.num_writers * Slot::kRowsBytes, loaded_);
  }

  /// Turns scales into weights, and writes each row's maximum and total. The warps divide the writers among them, or
  /// several share the pieces of one; returns how many, each of which has a part of the total.
  __device__ __forceinline__ int weigh(const Slice& slice, int n) const {
    constexpr int kSubs = 32 / Slot::kRows;  // pieces that a warp looks at at once
    int sharers = kWarps;
    while (sharers * slice.num_writers > kWarps) sharers /= 2;
    const int writer = warp() / sharers;
    if (writer >= slice.num_writers) return sharers;
    const int step = slice.piece_bytes();
    const int sub = lane() / Slot::kRows;
    const std::uint32_t rows = shared_ + slice.rows_of_writer(writer) + lane() % Slot::kRows * sizeof(float);
    float max = kNoMax;
#pragma unroll 4
    for (int piece = sub; piece < n; piece += kSubs) max = fmaxf(max, ptx::load_shared_f32(rows + piece * step));
    if constexpr (kSubs == 2) max = fmaxf(max, __shfl_xor_sync(~0U, max, Slot::kRows));
    float total = 0.0F;
#pragma unroll 2
    for (int piece = warp() % sharers * kSubs + sub; piece < n; piece += sharers * kSubs) {
      const std::uint32_t at = rows + piece * step;
      const float weight = ptx::exp2_approx(ptx::load_shared_f32(at) - max);
      total = fmaf(weight, ptx::load_shared_f32(at + kWarpRowBytes), total);
      ptx::store_shared_f32(at + 2 * kWarpRowBytes, weight * ptx::load_shared_f32(at + 2 * kWarpRowBytes));
    }
    if constexpr (kSubs == 2) total += __shfl_xor_sync(~0U, total, Slot::kRows);
    if (sub == 0) {
      const std::uint32_t at = merged_rows(n * step, warp()) + lane() * sizeof(float);
      ptx::store_shared_f32(at, max);
      ptx::store_shared_f32(at + kWarpRowBytes, total);
    }
    return sharers;
  }

  /// Adds every `sharers`-th of `n` pieces of a unit.
  __device__ __forceinline__ void add(float (&value)[8], const Slice& slice, int unit, int sharer, int sharers,
                                      int n) const {
    const int step = slice.piece_bytes();
    const int pair = octet_of(slice.first + unit).pair;
    const std::uint32_t octets = shared_ + unit * kUnitBytes + lane() * sizeof(uint4);
    const std::uint32_t weights = shared_ + slice.rows_of_writer(slice.writer_of(unit)) + 2 * kWarpRowBytes +
                                  pair * static_cast<int>(sizeof(float2));
#pragma unroll 4
    for (int piece = sharer; piece < n; piece += sharers) {
      std::uint32_t halves[4];
      ptx::load_shared_v4(octets + piece * step, halves[0], halves[1], halves[2], halves[3]);
      const float2 of_rows = ptx::load_shared_v2(weights + piece * step);
      const float weight[2] = {of_rows.x, of_rows.y};
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const float2 two = __half22float2(reinterpret_cast<const __half2&>(halves[i / 2]));
        value[i] = fmaf(weight[Traits::octet_row(i)], two.x, value[i]);
        value[i + 1] = fmaf(weight[Traits::octet_row(i + 1)], two.y, value[i + 1]);
      }
    }
  }

  /// `used`: the bytes of all pieces, behind which each warp has some memory.
  __device__ __forceinline__ void write(const Result& result, const float (&value)[8], const Octet& octet, int used,
                                        int writer, int parts_of_total) const {
    float2 total = {0.0F, 0.0F};
    const std::uint32_t rows =
        merged_rows(used, writer * parts_of_total) + octet.pair * static_cast<int>(sizeof(float2));
#pragma unroll 1
    for (int i = 0; i < parts_of_total; ++i) {
      const float2 part = ptx::load_shared_v2(rows + 2 * i * kWarpRowBytes + kWarpRowBytes);
      total.x += part.x;
      total.y += part.y;
    }
    const float inverse[2] = {inverse_sum(total.x), inverse_sum(total.y)};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = Traits::octet_row(i);
      Element* const out = result.out[r];
      const int column = octet.column + Traits::octet_column(i);
      if constexpr (Traits::octet_column(1) == 1) {
        if (i % 2 == 0 && out != nullptr) {
          *reinterpret_cast<std::uint32_t*>(out + column) =
              pack<Element>(value[i] * inverse[r], value[i + 1] * inverse[r]);
        }
      } else if (out != nullptr) {
        out[column] = convert<Element>(value[i] * inverse[r]);
      }
    }
    if (octet.column == 0) {
      const float2 max = ptx::load_shared_v2(rows);
      if (result.out[0] != nullptr) *result.lse[0] = log_sum_exp(max.x, total.x);
      if (result.out[1] != nullptr) *result.lse[1] = log_sum_exp(max.y, total.y);
    }
  }

  /// A warp's rows as weigh() writes them: maxima, then parts of totals.
  __device__ std::uint32_t merged_rows(int used, int warp) const { return shared_ + used + warp * 2 * kWarpRowBytes; }
  __device__ std::uint32_t shared_sum(int used, int warp) const {
    return merged_rows(used, kWarps) + warp * kSumBytes + lane() * static_cast<int>(sizeof(float4));
  }
  __device__ __forceinline__ void give(const float (&v)[8], int used) const {
    ptx::store_shared_v4(shared_sum(used, warp()), {v[0], v[1], v[2], v[3]});
    ptx::store_shared_v4(shared_sum(used, warp()) + kSumBytes / 2, {v[4], v[5], v[6], v[7]});
  }
  __device__ __forceinline__ void take(float (&v)[8], int used, int other) const {
    const float4 low = ptx::load_shared_v4(shared_sum(used, warp() + other));
    const float4 high = ptx::load_shared_v4(shared_sum(used, warp() + other) + kSumBytes / 2);
    v[0] += low.x;
    v[1] += low.y;
    v[2] += low.z;
    v[3] += low.w;
    v[4] += high.x;
    v[5] += high.y;
    v[6] += high.z;
    v[7] += high.w;
  }

  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int lane() { return threadIdx.x % 32; }

  /// Waits for all consumer threads. A named barrier would do; racecheck of compute-sanitizer does not follow one.
  __device__ __forceinline__ void sync() {
    ptx::mbarrier_arrive(met_);
    ptx::mbarrier_wait(met_, met_phase_);
    met_phase_ ^= 1;
  }

  const DenseDecodeParams& params_;
  const QueryTile& tile_;
  const int head_k_;
  const std::uint32_t shared_;
  const std::uint32_t met_;
  const std::uint32_t loaded_;
  std::uint32_t met_phase_ = 0;
  std::uint32_t loaded_phase_ = 0;
};

/// Merges the part's slices of split requests, which find_splits has found meanwhile. By all consumer threads, when the
/// part's pieces are done.
template <class Traits, class Storage>
__device__ __forceinline__ void merge_splits(const DenseDecodeParams& params, Storage& shared, const QueryTile& tile,
                                             int head_k, int part_idx) {
  Combine<Traits> combine(params, tile, head_k, ptx::shared_address(&shared), shared.merge_barriers);
  ptx::mbarrier_wait(ptx::shared_address(&shared.plan.splits_ready), 0);
#pragma unroll 1
  for (const SplitRequest& found : shared.plan.splits) {
    const SplitRequest split = found;
    if (split.num_pieces > 0) combine.run(split, part_idx - split.first_part);
  }
}

}  // namespace flash_mla::sm90

#pragma once

#include <cmath>
#include <cstdint>

#include "sm90/dense_decode/epilogue.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/part_plan.cuh"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/primitives/fragment.cuh"
#include "sm90/primitives/softmax.cuh"
#include "sm90/ptx/async_copy.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/math.cuh"
#include "sm90/ptx/memory.cuh"
#include "sm90/ptx/shared.cuh"

// Merging the pieces of a split request, within the decode kernel. Each part that has a piece of it merges a slice,
// once it has seen the flags of all pieces. Who may wait for whom: see launch.cuh.

namespace flash_mla::sm90 {

/// The flags of one tile of one KV head. A flag holds the launch's token once its piece is in the workspace. Tokens are
/// unique among launches, but a replayed graph launches with the same one again: so the last reader of a request's
/// flags clears them.
struct TileFlags {
  std::uint64_t* flags;    // (2 * num_parts,): one for each slot
  std::uint64_t* readers;  // (num_parts,): CTAs that have seen all flags of the request that the part begins

  __device__ TileFlags(const DenseDecodeParams& params, int tile) {
    flags = params.flags + static_cast<std::int64_t>(tile) * kFlagsPerPart * params.num_parts;
    readers = flags + 2 * params.num_parts;
  }
  /// By one thread, after all threads of the piece have written and synchronised, and with the splits found. Only where
  /// somebody reads the flag, and so clears it: one that stays up would tell a replayed graph that the piece is there.
  __device__ void publish(const DenseDecodeParams& params, const PartPlan& plan, int slot) const {
    if (plan.splits[slot % 2].num_pieces == 0) return;
    if (slot % 2 == 1) readers[slot / 2] = 0;  // a slot of a first piece
    ptx::store_release(&flags[slot], params.token);
  }
};

/// Merges one slice of a split request. By all consumer threads. A unit is a quad of each lane of a warp: 512 bytes.
/// The slice of all pieces comes into shared memory, and beside it their weights.
template <class Traits>
class Combine {
  using Element = typename Traits::Element;
  static constexpr int kNumUnits = Traits::kConsumerWarps * Traits::kQuadsPerThread;
  static constexpr int kUnitBytes = 32 * sizeof(float4);
  static constexpr int kRowsBytes = Traits::kRows * sizeof(RowSum);

 public:
  /// Shared memory that is enough for any number of pieces.
  static constexpr int kMinSharedBytes = scheduler::kMaxParts * (kUnitBytes + kRowsBytes) + 2 * kRowsBytes;

  /// `shared`: `num_bytes` of shared memory that nothing else uses any more, aligned to 16 bytes.
  /// `met`: an mbarrier for an arrival by each consumer thread, which nothing else uses.
  __device__ Combine(const DenseDecodeParams& params, const QueryTile& tile, int head_k, std::uint32_t shared,
                     int num_bytes, std::uint32_t met)
      : params_(params), tile_(tile), head_k_(head_k), shared_(shared), num_bytes_(num_bytes), met_(met) {}

  __device__ __forceinline__ void run(const SplitRequest& split, int slice) {
    wait_for_pieces(split);
    const int n = split.num_pieces;
    const int end = kNumUnits * (slice + 1) / n;
    const int max_count = (num_bytes_ - (n + 2) * kRowsBytes) / (n * kUnitBytes);
    int first = kNumUnits * slice / n;
#pragma unroll 1
    for (; first < end; first += max_count) {
      const Load load(first, min(max_count, end - first));
      load_sums(split, load);
      ptx::async_copy_commit();
      load_values(split, load);
      ptx::async_copy_commit();
      ptx::async_copy_wait<1>();
      sync();
      weigh(split, load);  // while the values are on their way
      ptx::async_copy_wait<0>();
      sync();
#pragma unroll 1
      for (int i = warp(); i < load.count; i += Traits::kConsumerWarps) merge_unit(split, load, i);
      sync();  // before shared memory is filled again
    }
  }

 private:
  /// What shared memory holds of a slice at a time: `count` units of each piece, and all that belongs to the rows that
  /// they lie in.
  struct Load {
    int first;
    int count;
    int first_row;
    int num_rows;  // a power of two

    __device__ Load(int first_unit, int num_units) : first(first_unit), count(num_units) {
      const int row = Traits::first_row(first / Traits::kQuadsPerThread);
      const bool is_one_warp = first / Traits::kQuadsPerThread == (first + count - 1) / Traits::kQuadsPerThread;
      first_row = is_one_warp ? row : 0;
      num_rows = is_one_warp ? Traits::kWarpRows : Traits::kRows;
    }
    /// Whether this is the load that writes the row's log-sum-exp: the one with its first column.
    __device__ bool writes_lse_of(int row) const {
      const int unit = row / Traits::kWarpRows * Traits::kQuadsPerThread;
      return first <= unit && unit < first + count;
    }
  };

  // In shared memory: for each row where its result goes and what its values are multiplied with; sums of each row of
  // each piece, whose x becomes the piece's weight; units of each piece.
  __device__ std::uint32_t result_at(int row) const { return shared_ + row * static_cast<int>(sizeof(float4)); }
  __device__ std::uint32_t sum_at(const Load& load, int piece, int row) const {
    return result_at(Traits::kRows) + (piece * load.num_rows + row - load.first_row) * static_cast<int>(sizeof(RowSum));
  }
  __device__ std::uint32_t values(const SplitRequest& split, const Load& load) const {
    return sum_at(load, split.num_pieces, load.first_row);
  }

  __device__ __forceinline__ void wait_for_pieces(const SplitRequest& split) {
    const TileFlags flags(params_, tile_.index(params_.tiling, head_k_));
    static_assert(Traits::kConsumerThreads >= scheduler::kMaxParts, "a thread for each flag");
    if (static_cast<int>(threadIdx.x) < split.num_pieces) {
      while (ptx::load_acquire(&flags.flags[split.slot(threadIdx.x)]) != params_.token) {
      }
    }
    sync();
    if (threadIdx.x == 0 && ptx::atomic_add(&flags.readers[split.first_part], 1) + 1 == split.num_pieces) {
      for (int i = 0; i < split.num_pieces; ++i) flags.flags[split.slot(i)] = 0;
    }
  }

  /// A thread for each 16 bytes.
  __device__ __forceinline__ void load_sums(const SplitRequest& split, const Load& load) const {
    constexpr int kSumsPerVector = sizeof(float4) / sizeof(RowSum);
    const int vectors_log2 = 31 - __clz(load.num_rows / kSumsPerVector);
#pragma unroll 1
    for (int i = threadIdx.x; i < split.num_pieces << vectors_log2; i += Traits::kConsumerThreads) {
      const int piece = i >> vectors_log2;
      const int row = load.first_row + (i & ((1 << vectors_log2) - 1)) * kSumsPerVector;
      ptx::async_copy_16(sum_at(load, piece, row), slot(split, piece).sums + row);
    }
  }
  /// A warp for each piece.
  __device__ __forceinline__ void load_values(const SplitRequest& split, const Load& load) const {
    const std::uint32_t to = values(split, load) + lane() * static_cast<int>(sizeof(float4));
    const int piece_bytes = load.count * kUnitBytes;
#pragma unroll 1
    for (int piece = warp(); piece < split.num_pieces; piece += Traits::kConsumerWarps) {
      const float4* const from = slot(split, piece).quads + load.first * 32 + lane();
#pragma unroll 4
      for (int i = 0; i < load.count; ++i) {
        ptx::async_copy_16(to + piece * piece_bytes + i * kUnitBytes, from + i * 32);
      }
    }
  }
  __device__ SlotTile<Traits> slot(const SplitRequest& split, int piece) const {
    return {params_, split.slot(piece), tile_.index(params_.tiling, head_k_)};
  }

  /// Weights of the pieces in each row. The threads of a row lie side by side in a warp.
  __device__ __forceinline__ void weigh(const SplitRequest& split, const Load& load) const {
    const int threads_per_row = Traits::kConsumerThreads / load.num_rows;
    const int row = load.first_row + static_cast<int>(threadIdx.x) / threads_per_row;
    const int begin = threadIdx.x % threads_per_row;
    float max = kNoMax;
#pragma unroll 1
    for (int i = begin; i < split.num_pieces; i += threads_per_row) {
      max = fmaxf(max, ptx::load_shared_v2(sum_at(load, i, row)).x);
    }
#pragma unroll 1
    for (int lanes = 1; lanes < threads_per_row; lanes *= 2) max = fmaxf(max, __shfl_xor_sync(~0U, max, lanes));
    float total = 0.0F;
#pragma unroll 1
    for (int i = begin; i < split.num_pieces; i += threads_per_row) {
      const RowSum sum = ptx::load_shared_v2(sum_at(load, i, row));
      const float weight = ptx::exp2_approx(sum.x - max);
      total = fmaf(weight, sum.y, total);
      ptx::store_shared(sum_at(load, i, row), weight);
    }
#pragma unroll 1
    for (int lanes = 1; lanes < threads_per_row; lanes *= 2) total += __shfl_xor_sync(~0U, total, lanes);
    if (begin != 0) return;
    const RowCoordinate at(params_, tile_, head_k_, row);
    const FinalOutput<Element> output{params_, split.request};
    ptx::store_shared_v4(result_at(row), at.is_valid ? output.row(at) : nullptr, inverse_sum(total));
    if (at.is_valid && load.writes_lse_of(row)) output.write_lse(at, max, total);
  }

  /// Unit `i` of the load. By one warp.
  __device__ __forceinline__ void merge_unit(const SplitRequest& split, const Load& load, int i) const {
    const int unit = load.first + i;
    const Quad quad = Traits::quad(unit / Traits::kQuadsPerThread, lane(), unit % Traits::kQuadsPerThread);
    const int value_step = load.count * kUnitBytes;
    const int weight_step = load.num_rows * static_cast<int>(sizeof(RowSum));
    std::uint32_t from = values(split, load) + i * kUnitBytes + lane() * static_cast<int>(sizeof(float4));
    std::uint32_t weights = sum_at(load, 0, quad.row);
    float merged[4] = {};
#pragma unroll 8
    for (int piece = 0; piece < split.num_pieces; ++piece) {
      const float4 value = ptx::load_shared_v4(from);
      const float weight[2] = {ptx::load_shared(weights),
                               ptx::load_shared(weights + Traits::kQuadRowStep * static_cast<int>(sizeof(RowSum)))};
      merged[0] = fmaf(weight[Traits::quad_row(0)], value.x, merged[0]);
      merged[1] = fmaf(weight[Traits::quad_row(1)], value.y, merged[1]);
      merged[2] = fmaf(weight[Traits::quad_row(2)], value.z, merged[2]);
      merged[3] = fmaf(weight[Traits::quad_row(3)], value.w, merged[3]);
      from += value_step;
      weights += weight_step;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      Element* row;
      float inverse;
      ptx::load_shared_v4(result_at(quad.row + r * Traits::kQuadRowStep), row, inverse);
      if (row != nullptr) write(row + quad.column, merged, r, inverse);
    }
  }

  __device__ __forceinline__ static void write(Element* to, const float (&merged)[4], int r, float inverse) {
    if constexpr (Traits::kQuadColumnStep == 1) {
      *reinterpret_cast<std::uint32_t*>(to) = pack<Element>(merged[2 * r] * inverse, merged[2 * r + 1] * inverse);
    } else {
      to[0] = convert<Element>(merged[r] * inverse);
      to[Traits::kQuadColumnStep] = convert<Element>(merged[r + 2] * inverse);
    }
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
  const int num_bytes_;
  const std::uint32_t met_;
  std::uint32_t met_phase_ = 0;
};

/// Merges the part's slices of split requests, which find_splits has found meanwhile. By all consumer threads, when the
/// part's pieces are done.
template <class Traits, class Storage>
__device__ __forceinline__ void merge_splits(const DenseDecodeParams& params, Storage& shared, const QueryTile& tile,
                                             int head_k, int part_idx) {
  Combine<Traits> combine(params, tile, head_k, ptx::shared_address(&shared), Storage::kMergeBytes,
                          ptx::shared_address(&shared.merge_met));
  ptx::mbarrier_wait(ptx::shared_address(&shared.plan.splits_ready), 0);
#pragma unroll 1
  for (const SplitRequest& found : shared.plan.splits) {
    const SplitRequest split = found;
    if (split.num_pieces > 0) combine.run(split, part_idx - split.first_part);
  }
}

}  // namespace flash_mla::sm90

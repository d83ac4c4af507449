#pragma once

#include <cstdint>

#include "sm90/dense_decode/epilogue.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/query_load.cuh"
#include "sm90/dense_decode/slot.cuh"
#include "sm90/dense_decode_narrow/mainloop.cuh"
#include "sm90/dense_decode_narrow/traits.cuh"
#include "sm90/primitives/fragment.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/math.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/shared.cuh"

namespace flash_mla::sm90 {

/// Merges what the two consumers have of a piece, and writes it: consumer w the chunks 4 w to 4 w + 3 of O, its own
/// ones. The other's part of them comes through the memory of Q, kStagedChunks at a time.
template <class Traits>
class NarrowEpilogue {
  using Element = typename Traits::Element;
  using Consumer = NarrowConsumer<Traits>;

 public:
  __device__ NarrowEpilogue(const DenseDecodeParams& params, NarrowStorage<Traits>& shared, const Piece& piece,
                            const QueryTile& tile, int head_k, int warpgroup)
      : params_(params),
        shared_(shared),
        piece_(piece),
        tile_(tile),
        head_k_(head_k),
        warpgroup_(warpgroup),
        staging_(ptx::shared_address(shared.q)) {}

  __device__ __forceinline__ void write(Consumer& consumer) const {
    merge(consumer);
    if (piece_.is_whole) {
      write_final(consumer);
      return;
    }
    ptx::mbarrier_wait(ptx::shared_address(&shared_.plan.splits_ready), 0);
    if (shared_.plan.is_read(piece_.slot)) write_partial(consumer);
  }

  /// Brings both consumers' part of the own chunks together in registers, and the rows into shared memory.
  __device__ __forceinline__ void merge(Consumer& consumer) const {
    if (!has_blocks()) return;
    if (warpgroup_ == 1) swap_halves(consumer.o);
    give_rows(consumer);
    consumer.wait_for_qk();  // so that nobody reads Q
    give(consumer, 0);
    consumer.meet_other();
    float own[Traits::kRowsPerThread];    // what this consumer's O is multiplied with
    float other[Traits::kRowsPerThread];  // and the other's
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) {
      const float other_max = shared_.row_max[1 - warpgroup_][Consumer::row_at(k)];
      const float max = fmaxf(consumer.row_max[k], other_max);
      own[k] = ptx::exp2_approx((consumer.row_max[k] - max) * params_.softmax_scale_log2);
      other[k] = ptx::exp2_approx((other_max - max) * params_.softmax_scale_log2);
    }
    take(consumer, 0, own, other);
#pragma unroll
    for (int first = kStagedChunks; first < Traits::kOwnChunks; first += kStagedChunks) {
      consumer.meet_other();  // read, before it is written again
      give(consumer, first);
      consumer.meet_other();
      take(consumer, first, own, other);
    }
  }

  /// A row's maximum, times softmax_scale_log2, and sum over both consumers, once these are merged.
  __device__ __forceinline__ float2 total(int row) const {
    float max = kNoMax;
    float sum = 0.0F;
    if (has_blocks()) {
      max = fmaxf(shared_.row_max[0][row], shared_.row_max[1][row]);
#pragma unroll
      for (int w = 0; w < Traits::kNumConsumers; ++w) {
        const float4 part = shared_.warp_sums[w][row];
        const float factor = ptx::exp2_approx((shared_.row_max[w][row] - max) * params_.softmax_scale_log2);
        sum += (part.x + part.y + part.z + part.w) * factor;
      }
    }
    return {max * params_.softmax_scale_log2, sum};
  }

  /// Before another piece: what consumers exchanged is read, and the memory of Q is Q's again.
  __device__ __forceinline__ void give_back_query(Consumer& consumer) const {
    consumer.meet_other();
    if (!has_blocks()) return;
    clear_query_padding<Traits>(params_, ptx::shared_address(shared_.q), threadIdx.x, Traits::kConsumerThreads);
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(ptx::shared_address(&shared_.q_empty));
  }

 private:
  static constexpr int kStagedChunks = Traits::kStagedChunks;
  static constexpr int kVectorsPerChunk = Traits::kAccumulators / 4;
  /// A thread stores to one of each 8 rows, that of its lane / 4: 8 columns and 8 rows at a time are transposed, so
  /// that it stores two columns of a row.
  __device__ __forceinline__ void write_final(const Consumer& consumer) const {
    const FinalOutput<Element> output{params_, piece_.request};
    if (const int row = static_cast<int>(threadIdx.x); row < Traits::kRows) {
      const float2 its = total(row);
      const RowCoordinate at = coordinate(row);
      if (at.is_valid()) output.write_lse(at, its.x, its.y);
    }
    __syncwarp();
    float inverse[Traits::kRowsPerThread];
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) inverse[k] = inverse_sum(total(Consumer::row_at(k)).y);
    const int first_column = warpgroup_ * Traits::kOwnChunks * Traits::kChunkColumns +
                             static_cast<int>(threadIdx.x) % Traits::kWarpgroupThreads / 32 * 16 + threadIdx.x % 4 * 2;
#pragma unroll
    for (int group = 0; group < Traits::kRows / 8; ++group) {
      const RowCoordinate at = coordinate(8 * group + threadIdx.x % 32 / 4);
      Element* const row = output.row(at) + first_column;
#pragma unroll
      for (int chunk = 0; chunk < Traits::kOwnChunks; ++chunk) {
#pragma unroll
        for (int i = 4 * group; i < 4 * group + 4; i += 2) {
          const auto& o = consumer.o[chunk];
          const std::uint32_t values =
              ptx::transpose_matrix(pack<Element>(o[i] * inverse[2 * group], o[i + 1] * inverse[2 * group + 1]));
          Element* const to = row + chunk * Traits::kChunkColumns + i / 2 % 2 * 8;
          if (at.is_valid()) *reinterpret_cast<std::uint32_t*>(to) = values;
        }
      }
    }
  }

  __device__ __forceinline__ void write_partial(const Consumer& consumer) const {
    const SlotTile<Traits> slot(params_, piece_.slot, tile_.index(params_.tiling, head_k_));
    if (const int unit = static_cast<int>(threadIdx.x); unit < slot.kNumUnits) {
      const float2 its = total(unit / Traits::kNumConsumers);
      Total{its.x, its.y, 1.0F}.announce(slot.totals(unit), params_.token);
    }
    __syncwarp();
    const int thread = threadIdx.x % Traits::kWarpgroupThreads;
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) {
      const int i = k / 2 * 4 + k % 2;
      auto* const to = reinterpret_cast<float4*>(slot.values(slot.unit(Consumer::row_at(k), warpgroup_))) + thread / 4;
#pragma unroll
      for (int chunk = 0; chunk < Traits::kOwnChunks; chunk += 2) {
        const float* const v = &consumer.o[chunk][i];
        const float* const w = &consumer.o[chunk + 1][i];
        to[chunk / 2 * Traits::kWarpgroupThreads / 4] = make_float4(v[0], v[2], w[0], w[2]);
      }
    }
  }

  __device__ RowCoordinate coordinate(int row) const { return {params_, tile_, head_k_, row}; }
  __device__ bool has_blocks() const { return piece_.begin_block < piece_.end_block; }

  /// Brings this consumer's maxima and sums into shared memory.
  __device__ __forceinline__ void give_rows(const Consumer& consumer) const {
    const int warp = threadIdx.x % Traits::kWarpgroupThreads / 32;
    const bool has_rows = threadIdx.x % 32 < 4;  // the lanes of the warp that write
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) {
      const float sum = column_reduce_sum(consumer.row_sum[k]);
      const int row = Consumer::row_at(k);
      if (has_rows) reinterpret_cast<float*>(&shared_.warp_sums[warpgroup_][row])[warp] = sum;
      if (has_rows && warp == 0) shared_.row_max[warpgroup_][row] = consumer.row_max[k];
    }
  }

  /// So that o[0] to o[3] are the chunks that this consumer writes.
  __device__ __forceinline__ static void swap_halves(float (&o)[Traits::kNumVChunks][Traits::kAccumulators]) {
#pragma unroll
    for (int chunk = 0; chunk < Traits::kOwnChunks; ++chunk) {
#pragma unroll
      for (int i = 0; i < Traits::kAccumulators; ++i) {
        const float kept = o[chunk][i];
        o[chunk][i] = o[chunk + Traits::kOwnChunks][i];
        o[chunk + Traits::kOwnChunks][i] = kept;
      }
    }
  }

  /// Gives the other consumer kStagedChunks of its chunks of O, from its `first` on.
  __device__ __forceinline__ void give(const Consumer& consumer, int first) const {
#pragma unroll
    for (int j = 0; j < kStagedChunks; ++j) {
      const auto& given = consumer.o[Traits::kOwnChunks + first + j];
#pragma unroll
      for (int v = 0; v < kVectorsPerChunk; ++v) {
        ptx::store_shared_v4(staged(1 - warpgroup_, j, v),
                             {given[4 * v], given[4 * v + 1], given[4 * v + 2], given[4 * v + 3]});
      }
    }
  }
  /// Adds what the other has given.
  __device__ __forceinline__ void take(Consumer& consumer, int first, const float (&own)[Traits::kRowsPerThread],
                                       const float (&other)[Traits::kRowsPerThread]) const {
#pragma unroll
    for (int j = 0; j < kStagedChunks; ++j) {
      auto& o = consumer.o[first + j];
#pragma unroll
      for (int v = 0; v < kVectorsPerChunk; ++v) {
        const float4 taken = ptx::load_shared_v4(staged(warpgroup_, j, v));
        const float part[4] = {taken.x, taken.y, taken.z, taken.w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int k = Consumer::index_of(4 * v + c);
          o[4 * v + c] = fmaf(o[4 * v + c], own[k], part[c] * other[k]);
        }
      }
    }
  }
  /// Where a thread's vector of a chunk that `warpgroup` takes lies.
  __device__ std::uint32_t staged(int warpgroup, int chunk, int vector) const {
    const int idx = (warpgroup * kStagedChunks + chunk) * kVectorsPerChunk + vector;
    return staging_ + (idx * Traits::kWarpgroupThreads + threadIdx.x % Traits::kWarpgroupThreads) *
                          static_cast<int>(sizeof(float4));
  }

  const DenseDecodeParams& params_;
  NarrowStorage<Traits>& shared_;
  const Piece& piece_;
  const QueryTile& tile_;
  const int head_k_;
  const int warpgroup_;
  const std::uint32_t staging_;
};

}  // namespace flash_mla::sm90

#pragma once

#include <cstdint>

#include "sm90/dense_decode/epilogue.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/row_coordinate.cuh"
#include "sm90/dense_decode/slot.cuh"
#include "sm90/dense_decode_narrow/accumulator.cuh"
#include "sm90/dense_decode_narrow/mainloop.cuh"
#include "sm90/dense_decode_narrow/traits.cuh"
#include "sm90/primitives/arrive.cuh"
#include "sm90/primitives/fragment.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/shared.cuh"

namespace flash_mla::sm90 {

/// What becomes of a piece's rows, whose totals the scorer has.
template <class Traits>
class NarrowRowEpilogue {
 public:
  __device__ NarrowRowEpilogue(const DenseDecodeParams& params, NarrowStorage<Traits>& shared, int tile)
      : params_(params), shared_(shared), tile_(tile) {}

  /// By a thread for each row, with its maximum, times softmax_scale_log2, and sum. Log-sum-exp of a whole request,
  /// whose sum the consumers get; and what others are told of a part of one.
  __device__ __forceinline__ void write(const Piece& piece, int row, float2 total) {
    if (piece.is_whole) {
      if (piece.begin_block < piece.end_block) {
        ptx::mbarrier_wait(ptx::shared_address(&shared_.sums_empty), phase_ ^ 1);
        phase_ ^= 1;
        shared_.row_sum[row] = total.y;
        ptx::mbarrier_arrive(ptx::shared_address(&shared_.sums_full));
      }
      const RowCoordinate& at = shared_.rows[row];
      const FinalOutput<typename Traits::Element> output{params_, piece.request};
      if (at.is_valid()) output.write_lse(at, total.x, total.y);
      return;
    }
    ptx::mbarrier_wait(ptx::shared_address(&shared_.plan.splits_ready), 0);
    if (!shared_.plan.is_read(piece.slot)) return;
    const SlotTile<Traits> slot(params_, piece.slot, tile_);
    for (int consumer = 0; consumer < Traits::kNumConsumers; ++consumer) {
      Total{total.x, total.y, 1.0F}.announce(slot.totals(slot.unit(row, consumer)), params_.token);
    }
  }

 private:
  const DenseDecodeParams& params_;
  NarrowStorage<Traits>& shared_;
  const int tile_;  // of those of all KV heads
  std::uint32_t phase_ = 0;
};

/// Writes a consumer's half of the columns of O.
template <class Traits>
class NarrowEpilogue {
  using Element = typename Traits::Element;
  using Consumer = NarrowConsumer<Traits>;
  using Accumulator = NarrowAccumulator<Traits>;

 public:
  __device__ NarrowEpilogue(const DenseDecodeParams& params, NarrowStorage<Traits>& shared, int warpgroup)
      : params_(params), shared_(shared), warpgroup_(warpgroup) {}

  /// A thread stores to one of each 8 rows, that of its lane / 4: 8 columns and 8 rows at a time are transposed, so
  /// that it has two columns of a row, then neighbours exchange theirs of the next 8 columns, so that each has four in
  /// a row and a row's four threads write 32 bytes.
  __device__ __forceinline__ void write_final(const Consumer& consumer, const Piece& piece) {
    float inverse[Traits::kRowsPerThread];
    take_sums(piece, inverse);
    const FinalOutput<Element> output{params_, piece.request};
    const int in_quad = static_cast<int>(threadIdx.x) % 4;
    const bool is_odd = in_quad % 2 != 0;
    const int first_column = warpgroup_ * Traits::kOwnChunks * Traits::kChunkColumns +
                             static_cast<int>(threadIdx.x) % Traits::kWarpgroupThreads / 32 * 16 + in_quad % 2 * 8 +
                             in_quad / 2 * 4;
#pragma unroll
    for (int group = 0; group < Traits::kRows / 8; ++group) {
      const RowCoordinate& at = shared_.rows[8 * group + threadIdx.x % 32 / 4];
      Element* const row = output.row(at) + first_column;
#pragma unroll
      for (int chunk = 0; chunk < Traits::kOwnChunks; ++chunk) {
        std::uint32_t values[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float* const o = &consumer.o[chunk][4 * group + 2 * j];
          values[j] = ptx::transpose_matrix(pack<Element>(o[0] * inverse[2 * group], o[1] * inverse[2 * group + 1]));
        }
        const std::uint32_t others = __shfl_xor_sync(~0U, is_odd ? values[0] : values[1], 1);
        const uint2 four = is_odd ? make_uint2(others, values[1]) : make_uint2(values[0], others);
        if (at.is_valid()) *reinterpret_cast<uint2*>(row + chunk * Traits::kChunkColumns) = four;
      }
    }
  }

  /// The piece stays in this memory, which is shared, where merging reads it. Before write_partial.
  __device__ __forceinline__ void keep(unsigned char* memory) { kept_ = memory; }

  /// Half `half` of the consumer's columns. `tile` counts those of all KV heads.
  __device__ __forceinline__ void write_partial(const Consumer& consumer, const Piece& piece, int tile,
                                                int half) const {
    static_assert(Traits::kOwnChunks == 4);
    const SlotTile<Traits> slot(params_, piece.slot, tile);
    const int thread = threadIdx.x % Traits::kWarpgroupThreads;
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) {
      const int i = k / 2 * 4 + k % 2;
      const int unit = slot.unit(Accumulator::row_at(k), warpgroup_);
      unsigned char* const values = kept_ != nullptr ? kept_ + unit * slot.kUnitBytes : slot.values(unit);
      auto* const to = reinterpret_cast<float4*>(values) + thread / 4;
      const float* const v = &consumer.o[2 * half][i];
      const float* const w = &consumer.o[2 * half + 1][i];
      to[half * Traits::kWarpgroupThreads / 4] = make_float4(v[0], v[2], w[0], w[2]);
    }
  }

 private:
  /// Inverse sums of the thread's rows.
  __device__ __forceinline__ void take_sums(const Piece& piece, float (&inverse)[Traits::kRowsPerThread]) {
    const bool has_blocks = piece.begin_block < piece.end_block;
    if (has_blocks) {
      ptx::mbarrier_wait(ptx::shared_address(&shared_.sums_full), phase_);
      phase_ ^= 1;
    }
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) {
      inverse[k] = has_blocks ? inverse_sum(shared_.row_sum[Accumulator::row_at(k)]) : 0.0F;
    }
    __syncwarp();
    if (has_blocks) arrive_of_warp(shared_.sums_empty);
  }

  const DenseDecodeParams& params_;
  NarrowStorage<Traits>& shared_;
  const int warpgroup_;
  unsigned char* kept_ = nullptr;
  std::uint32_t phase_ = 0;
};

}  // namespace flash_mla::sm90

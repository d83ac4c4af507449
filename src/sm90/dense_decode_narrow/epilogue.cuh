#pragma once

#include <cstdint>

#include "sm90/dense_decode/epilogue.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/query_load.cuh"
#include "sm90/dense_decode_narrow/mainloop.cuh"
#include "sm90/dense_decode_narrow/traits.cuh"
#include "sm90/primitives/fragment.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/math.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/shared.cuh"

namespace flash_mla::sm90 {

/// Merges what the two consumers have of a piece, and writes it: consumer w the chunks 4 w to 4 w + 3 of O. The other's
/// part of them comes through the memory of Q, two chunks at a time.
template <class Traits>
class NarrowEpilogue {
  using Element = typename Traits::Element;
  using Consumer = NarrowConsumer<Traits>;

 public:
  __device__ NarrowEpilogue(const DenseDecodeParams& params, NarrowStorage<Traits>& shared, const Piece& piece,
                            const QueryTile& tile, int head_k, int warpgroup)
      : params_(params), shared_(shared), output_{params, piece}, tile_(tile), head_k_(head_k), warpgroup_(warpgroup) {}

  __device__ __forceinline__ void write(Consumer& consumer) const {
    float scale[Traits::kRowsPerThread] = {};
    const bool has_blocks = output_.piece.begin_block < output_.piece.end_block;
    merge_sums(consumer, has_blocks, scale);
    if (warpgroup_ == 1) swap_halves(consumer.o);
    if (output_.piece.is_whole) {
      merge_and_write<OutRows>(consumer, has_blocks, scale);
    } else {
      merge_and_write<AccumRows>(consumer, has_blocks, scale);
    }
    if (has_blocks) give_back_query(consumer);
  }

 private:
  static constexpr int kStagedChunks = 2;
  static constexpr int kVectorsPerChunk = Traits::kAccumulators / 4;
  static_assert(Traits::kNumConsumers * kStagedChunks * Traits::kBlockN * Traits::kRows * sizeof(float) <=
                    Traits::kNumChunks * Traits::kQChunkBytes,
                "Q's memory holds what is staged");

  /// The rows of out that a thread writes to, null where they are none: of each 8 rows the one of its lane / 4. 8
  /// columns and 8 rows at a time are transposed, so that a thread stores two columns of a row.
  struct OutRows {
    Element* rows[Traits::kRows / 8];

    __device__ explicit OutRows(const NarrowEpilogue& epilogue) {
#pragma unroll
      for (int group = 0; group < Traits::kRows / 8; ++group) {
        const RowCoordinate at = epilogue.coordinate(8 * group + threadIdx.x % 32 / 4);
        rows[group] = at.is_valid ? epilogue.output_.out_row(at) + threadIdx.x % 4 * 2 : nullptr;
      }
    }
    __device__ __forceinline__ void write(const float (&o)[Traits::kAccumulators], int column) const {
#pragma unroll
      for (int i = 0; i < Traits::kAccumulators; i += 2) {
        const std::uint32_t values = ptx::transpose_matrix(pack<Element>(o[i], o[i + 1]));
        Element* const row = rows[i / 4];
        if (row != nullptr) *reinterpret_cast<std::uint32_t*>(row + column + i / 2 % 2 * 8) = values;
      }
    }
  };

  /// The rows of out_accum that a thread writes to, null where they are none.
  struct AccumRows {
    float* rows[Traits::kRowsPerThread];

    __device__ explicit AccumRows(const NarrowEpilogue& epilogue) {
#pragma unroll
      for (int k = 0; k < Traits::kRowsPerThread; ++k) {
        const RowCoordinate at = epilogue.coordinate(Consumer::row_at(k));
        rows[k] = at.is_valid ? epilogue.output_.accum_row(at) + threadIdx.x % 32 / 4 : nullptr;
      }
    }
    __device__ __forceinline__ void write(const float (&o)[Traits::kAccumulators], int column) const {
#pragma unroll
      for (int i = 0; i < Traits::kAccumulators; ++i) {
        float* const row = rows[Consumer::index_of(i)];
        if (row != nullptr) row[column + i / 2 % 2 * 8] = o[i];
      }
    }
  };

  template <class Rows>
  __device__ __forceinline__ void merge_and_write(Consumer& consumer, bool has_blocks,
                                                  const float (&scale)[Traits::kRowsPerThread]) const {
    const Rows rows(*this);
    const int first_column = warpgroup_ * Traits::kOwnChunks * Traits::kChunkColumns +
                             static_cast<int>(threadIdx.x) % Traits::kWarpgroupThreads / 32 * 16;
#pragma unroll
    for (int first = 0; first < Traits::kOwnChunks; first += kStagedChunks) {
      if (has_blocks) exchange(consumer, first, scale);
#pragma unroll
      for (int j = first; j < first + kStagedChunks; ++j) {
        rows.write(consumer.o[j], first_column + j * Traits::kChunkColumns);
      }
    }
  }

  __device__ RowCoordinate coordinate(int row) const { return {params_, tile_, head_k_, row}; }

  /// The sums over both consumers, their log-sum-exp, and in `scale` what this consumer's O is multiplied with.
  __device__ __forceinline__ void merge_sums(Consumer& consumer, bool has_blocks,
                                             float (&scale)[Traits::kRowsPerThread]) const {
    const int warp = threadIdx.x % Traits::kWarpgroupThreads / 32;
    const bool has_rows = threadIdx.x % 32 < 4;  // the lanes of the warp that write
    if (has_blocks) {
#pragma unroll
      for (int k = 0; k < Traits::kRowsPerThread; ++k) {
        const float sum = column_reduce_sum(consumer.row_sum[k]);
        const int row = Consumer::row_at(k);
        if (has_rows) shared_.warp_sum[warpgroup_][warp][row] = sum;
        if (has_rows && warp == 0) shared_.row_max[warpgroup_][row] = consumer.row_max[k];
      }
      consumer.meet_other();
    }
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) {
      const int row = Consumer::row_at(k);
      float max = kNoMax;
      float sum = 0.0F;
      if (has_blocks) {
        max = fmaxf(shared_.row_max[0][row], shared_.row_max[1][row]);
        float factor[Traits::kNumConsumers];
#pragma unroll
        for (int w = 0; w < Traits::kNumConsumers; ++w) {
          factor[w] = ptx::exp2_approx((shared_.row_max[w][row] - max) * params_.softmax_scale_log2);
          float part = 0.0F;
#pragma unroll
          for (int i = 0; i < Traits::kWarpgroupWarps; ++i) part += shared_.warp_sum[w][i][row];
          sum += part * factor[w];
        }
        scale[k] = (warpgroup_ == 0 ? factor[0] : factor[1]) * inverse_sum(sum);
      }
      if (warpgroup_ == 0 && warp == 0 && has_rows) {
        const RowCoordinate at = coordinate(row);
        if (at.is_valid) output_.write_lse(at, max, sum);
      }
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

  /// Normalises kStagedChunks own chunks of O from `first` on, gives the other consumer its ones, and adds what it
  /// gives.
  __device__ __forceinline__ void exchange(Consumer& consumer, int first,
                                           const float (&scale)[Traits::kRowsPerThread]) const {
    auto& o = consumer.o;
    const std::uint32_t staged =
        ptx::shared_address(shared_.q) + threadIdx.x % Traits::kWarpgroupThreads * static_cast<int>(sizeof(float4));
    constexpr int kVectorStep = Traits::kWarpgroupThreads * sizeof(float4);
    constexpr int kHalf = kStagedChunks * kVectorsPerChunk * kVectorStep;
#pragma unroll
    for (int j = 0; j < kStagedChunks; ++j) {
      const auto& given = o[Traits::kOwnChunks + first + j];
#pragma unroll
      for (int v = 0; v < kVectorsPerChunk; ++v) {
        std::uint32_t word[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) word[c] = __float_as_uint(given[4 * v + c] * scale[Consumer::index_of(4 * v + c)]);
        ptx::store_shared_v4(staged + (1 - warpgroup_) * kHalf + (j * kVectorsPerChunk + v) * kVectorStep, word[0],
                             word[1], word[2], word[3]);
      }
    }
    consumer.meet_other();
#pragma unroll
    for (int j = 0; j < kStagedChunks; ++j) {
      auto& own = o[first + j];
#pragma unroll
      for (int v = 0; v < kVectorsPerChunk; ++v) {
        std::uint32_t word[4];
        ptx::load_shared_v4(staged + warpgroup_ * kHalf + (j * kVectorsPerChunk + v) * kVectorStep, word[0], word[1],
                            word[2], word[3]);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          own[4 * v + c] = fmaf(own[4 * v + c], scale[Consumer::index_of(4 * v + c)], __uint_as_float(word[c]));
        }
      }
    }
    if (first + kStagedChunks < Traits::kOwnChunks) {
      consumer.meet_other();  // read, before it is written again
    }
  }

  /// The memory of Q is Q's again.
  __device__ __forceinline__ void give_back_query(Consumer& consumer) const {
    consumer.meet_other();
    clear_query_padding<Traits>(params_, ptx::shared_address(shared_.q), threadIdx.x, Traits::kConsumerThreads);
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(ptx::shared_address(&shared_.q_empty));
  }

  const DenseDecodeParams& params_;
  NarrowStorage<Traits>& shared_;
  const PieceOutput<Element> output_;
  const QueryTile& tile_;
  const int head_k_;
  const int warpgroup_;
};

}  // namespace flash_mla::sm90

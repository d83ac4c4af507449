#pragma once

#include <cmath>
#include <cstdint>

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/row_coordinate.cuh"
#include "sm90/dense_decode_narrow/accumulator.cuh"
#include "sm90/dense_decode_narrow/traits.cuh"
#include "sm90/primitives/arrive.cuh"
#include "sm90/primitives/fragment.cuh"
#include "sm90/primitives/ring.cuh"
#include "sm90/primitives/softmax.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/math.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flash_mla::sm90 {

/// The warpgroup that scores: S^T = K Q^T and P = softmax(S) of each block.
template <class Traits>
class NarrowScorer {
  using Element = typename Traits::Element;
  using Accumulator = NarrowAccumulator<Traits>;

 public:
  __device__ __forceinline__ NarrowScorer(const DenseDecodeParams& params, NarrowStorage<Traits>& shared)
      : params_(params), shared_(shared) {}

  /// The maximum and the sum of a row that has seen no key.
  __device__ float2 no_keys() const { return {kNoMax * params_.softmax_scale_log2, 0.0F}; }

  /// P of a piece's blocks, of which there is at least one. Returns, for the thread's number as the row, if it is one,
  /// the maximum, times softmax_scale_log2, and the sum.
  __device__ __forceinline__ float2 run(const Piece& piece) {
    ptx::mbarrier_wait(ptx::shared_address(&shared_.q_full[q_.slot]), q_.phase);
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) {
      row_max_[k] = kNoMax;
      row_sum_[k] = 0.0F;
    }
    const int first_masked_block = max(shared_.rows[0].limit(params_, piece.seqlen_k), 0) / Traits::kBlockN;
#pragma unroll 1
    for (int block = piece.begin_block; block < piece.end_block; ++block) {
      ptx::wgmma_fence();
      issue_qk();
      ptx::wgmma_wait<0>();
      if (block == piece.end_block - 1) arrive_of_warp(shared_.q_empty[q_.slot]);
      if (block >= first_masked_block) mask(piece.seqlen_k, block * Traits::kBlockN);
      soften(block == piece.begin_block);
      ptx::mbarrier_arrive(ptx::shared_address(&shared_.p_full[at_.slot]));
      at_ = at_ + 1;
      __syncwarp();
    }
    q_ = q_ + 1;
    return total();
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x % Traits::kWarpgroupThreads / 32; }

  __device__ __forceinline__ void sync() const { ptx::named_barrier_sync(kScorerBarrier, Traits::kWarpgroupThreads); }

  /// Waits for all threads of the scorer, too. The second vote tells ptxas that lanes agree: it serialises wgmma else.
  __device__ __forceinline__ bool any(bool value) const {
    return __any_sync(~0U, ptx::named_barrier_any(kScorerBarrier, Traits::kWarpgroupThreads, value));
  }

  /// S^T = K Q^T, chunk by chunk as they come. Whether one is there is looked up before the wgmmas of the chunk
  /// before it are issued: the answer takes as long as a wgmma does.
  __device__ __forceinline__ void issue_qk() {
    const ptx::SwizzledOperand<16> q(ptx::shared_address(shared_.q[q_.slot]));
    const ptx::SwizzledOperand<16> k(ptx::shared_address(shared_.kv[at_.slot]));
    bool has_chunk = false;
#pragma unroll
    for (int i = 0; i < Traits::kNumChunks; ++i) {
      ptx::mbarrier_wait_unless(has_chunk, ptx::shared_address(&shared_.kv_full[at_.slot][i]), at_.phase);
      if (i + 1 < Traits::kNumChunks) {
        has_chunk = ptx::mbarrier_test(ptx::shared_address(&shared_.kv_full[at_.slot][i + 1]), at_.phase);
      }
#pragma unroll
      for (int step = 0; step < Traits::kRowBytes / Traits::kStepBytes; ++step) {
        ptx::wgmma_m64k16<Element, false>(
            s_, k.at(i * Traits::kChunkBytes + step * Traits::kStepBytes),
            q.at(Traits::chunk_in_slot(i) * Traits::kQChunkBytes + step * Traits::kStepBytes), i + step != 0);
      }
    }
    ptx::wgmma_commit();
  }

  /// P of the block into shared memory, and its sums. While no P is large the maxima are kept, so that the usual block,
  /// if it is not the first of a piece, needs no reduction over tokens but the vote.
  __device__ __forceinline__ void soften(bool is_first) {
    const float scale_log2 = params_.softmax_scale_log2;
    float sum[Traits::kRowsPerThread];
    bool looks = is_first;
#pragma unroll 1
    for (;; looks = true) {
      if (looks) raise_maxima(scale_log2);
      const bool is_large = exponentiate(scale_log2, sum);
      if (looks || !any(is_large)) break;
    }
    ptx::fence_proxy_async();
    if (threadIdx.x % Traits::kWarpgroupThreads == 0) shared_.must_rescale[at_.slot] = looks;
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) row_sum_[k] += sum[k];
  }

  /// P^T = exp2(scale_log2 * (S^T - max)), stored with tokens contiguous; whether a sum of two tokens is large.
  __device__ __forceinline__ bool exponentiate(float scale_log2, float (&sum)[Traits::kRowsPerThread]) {
    float offset[Traits::kRowsPerThread];
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) {
      offset[k] = fmaxf(row_max_[k] * scale_log2, kNoMax);  // finite, however large the scale
      sum[k] = 0.0F;
    }
    std::uint32_t packed[Traits::kAccumulators / 2];
#pragma unroll
    for (int i = 0; i < Traits::kAccumulators; i += 2) {
      const int k = Accumulator::index_of(i);
      const float low = ptx::exp2_approx(fmaf(s_[i], scale_log2, -offset[k]));
      const float high = ptx::exp2_approx(fmaf(s_[i + 1], scale_log2, -offset[k + 1]));
      sum[k] += low;
      sum[k + 1] += high;
      packed[i / 2] = pack<Element>(low, high);
    }
    // Matrix m of a store: tokens 8 * (m % 2) of the warp's 16, query rows 8 * (m / 2) of the pair's 16.
    const int row = lane() / 16 * 8 + lane() % 8;
    const int unit = (2 * warp() + lane() / 8 % 2) ^ lane() % 8;
    const std::uint32_t to = ptx::shared_address(shared_.p[at_.slot]) + row * Traits::kRowBytes + unit * 16;
#pragma unroll
    for (int pair = 0; pair < Traits::kRows / 16; ++pair) {
      ptx::store_matrix_x4_transposed(to + 16 * pair * Traits::kRowBytes, packed[4 * pair], packed[4 * pair + 1],
                                      packed[4 * pair + 2], packed[4 * pair + 3]);
    }
    bool is_large = false;
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) is_large |= sum[k] > kMaxLazySum;
    return is_large;
  }

  /// Raises the maxima to those of the block, brings the sums to them, and writes what O must be multiplied with.
  __device__ __forceinline__ void raise_maxima(float scale_log2) {
    auto& warp_max = shared_.warp_max[at_.slot];
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) {
      const int i = k / 2 * 4 + k % 2;
      const float max = column_reduce_max(fmaxf(s_[i], s_[i + 2]));
      if (lane() < 4) warp_max[warp()][Accumulator::row_at(k)] = max;
    }
    sync();
    // All loads before the first store: they would wait for it.
    float of_warp[Traits::kWarpgroupWarps][Traits::kRowsPerThread];
#pragma unroll
    for (int w = 0; w < Traits::kWarpgroupWarps; ++w) {
#pragma unroll
      for (int k = 0; k < Traits::kRowsPerThread; k += 2) {
        const float2 two = *reinterpret_cast<const float2*>(&warp_max[w][Accumulator::row_at(k)]);
        of_warp[w][k] = two.x;
        of_warp[w][k + 1] = two.y;
      }
    }
    float factor[Traits::kRowsPerThread];
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) {
      float max = row_max_[k];
#pragma unroll
      for (int w = 0; w < Traits::kWarpgroupWarps; ++w) max = fmaxf(max, of_warp[w][k]);
      factor[k] = ptx::exp2_approx((row_max_[k] - max) * scale_log2);
      row_sum_[k] *= factor[k];
      row_max_[k] = max;
    }
    if (warp() == 0 && lane() < 4) {
#pragma unroll
      for (int k = 0; k < Traits::kRowsPerThread; ++k) shared_.rescale[at_.slot][Accumulator::row_at(k)] = factor[k];
    }
  }

  /// Scores that a row must not see become -inf, NaN included. V of tokens past the request's end becomes 0: 0 * NaN
  /// must not reach O. (Some warp may still be at QK, but the scores of such tokens do not count.)
  __device__ __forceinline__ void mask(int seqlen_k, int begin_token) {
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) {
      const int visible = shared_.rows[Accumulator::row_at(k)].limit(params_, seqlen_k) - begin_token;
      const int i = k / 2 * 4 + k % 2;
      if (fragment_row() >= visible) s_[i] = -INFINITY;
      if (fragment_row() + 8 >= visible) s_[i + 2] = -INFINITY;
    }
    const int live = seqlen_k - begin_token;
    constexpr int kVectorsPerRow = Traits::kRowBytes / sizeof(uint4);
    constexpr int kThreadsPerRow = kVectorsPerRow * Traits::kNumVChunks;
    const int thread = threadIdx.x % Traits::kWarpgroupThreads;
    const int chunk = 1 + thread % kThreadsPerRow / kVectorsPerRow;
    const std::uint32_t column =
        ptx::shared_address(shared_.kv[at_.slot][chunk]) + thread % kVectorsPerRow * static_cast<int>(sizeof(uint4));
    for (int row = live + thread / kThreadsPerRow; row < Traits::kBlockN;
         row += Traits::kWarpgroupThreads / kThreadsPerRow) {
      ptx::store_shared_v4(column + row * Traits::kRowBytes, 0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ float2 total() const {
    // All shuffles before the branch, so that those of a row need not wait for those of another.
    float sums[Traits::kRowsPerThread];
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) sums[k] = column_reduce_sum(row_sum_[k]);
    if (lane() < 4) {
#pragma unroll
      for (int k = 0; k < Traits::kRowsPerThread; ++k) {
        const int row = Accumulator::row_at(k);
        reinterpret_cast<float*>(&shared_.warp_sums[row])[warp()] = sums[k];
        if (warp() == 0) shared_.row_max[row] = row_max_[k];
      }
    }
    sync();
    const int row = threadIdx.x % Traits::kWarpgroupThreads;
    if (row >= Traits::kRows) return {};
    const float4 sum = shared_.warp_sums[row];
    return {shared_.row_max[row] * params_.softmax_scale_log2, sum.x + sum.y + sum.z + sum.w};
  }

  const DenseDecodeParams& params_;
  NarrowStorage<Traits>& shared_;
  RingPosition<Traits::kQuerySlots> q_;  // the piece
  RingPosition<Traits::kNumSlots> at_;   // the block
  float s_[Traits::kAccumulators];
  float row_max_[Traits::kRowsPerThread];
  float row_sum_[Traits::kRowsPerThread];  // over this thread's tokens only
};

}  // namespace flash_mla::sm90

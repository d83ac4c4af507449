#pragma once

#include <cmath>
#include <cstdint>

#include "sm90/dense_decode/epilogue.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode_narrow/traits.cuh"
#include "sm90/primitives/fragment.cuh"
#include "sm90/primitives/softmax.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/math.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flash_mla::sm90 {

/// One of the two consumer warpgroups. Each works every second block of a piece alone, QK, softmax and PV, on sums and
/// maxima of its own; the two meet at the end of a piece (epilogue.cuh).
///
/// S and O are transposed: S^T = K Q^T has tokens as rows and query rows as columns, O^T = V^T P^T has V's columns as
/// rows. Register i of an accumulator belongs to the thread's query row index_of(i).
template <class Traits>
class NarrowConsumer {
  using Element = typename Traits::Element;

 public:
  __device__ __forceinline__ NarrowConsumer(const DenseDecodeParams& params, NarrowStorage<Traits>& shared,
                                            int warpgroup)
      : params_(params),
        shared_(shared),
        warpgroup_(warpgroup),
        q_(ptx::shared_address(shared.q)),
        p_(ptx::shared_address(shared.p[warpgroup])),
        kv_(ptx::shared_address(shared.kv)),
        kv_full_(ptx::shared_address(shared.kv_full)),
        kv_empty_(ptx::shared_address(shared.kv_empty)) {}

  /// Which of the thread's query rows register `i` belongs to, and the tile's row of such an index.
  __device__ static constexpr int index_of(int i) { return i / 4 * 2 + i % 2; }
  __device__ static int row_at(int index) { return index / 2 * 8 + threadIdx.x % 4 * 2 + index % 2; }

  /// Before each piece.
  __device__ __forceinline__ void reset() {
#pragma unroll
    for (auto& chunk : o) {
#pragma unroll
      for (float& value : chunk) value = 0.0F;
    }
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) {
      row_max[k] = kNoMax;
      row_sum[k] = 0.0F;
    }
  }

  /// O, row maxima and row sums over this warpgroup's blocks of a piece that has blocks. `min_limit`: the least number
  /// of tokens that a row of the tile sees.
  __device__ __forceinline__ void run(const Piece& piece, const QueryTile& tile, int min_limit) {
    ptx::mbarrier_wait(ptx::shared_address(&shared_.q_full), q_phase_);
    q_phase_ ^= 1;
    const int num_blocks = piece.end_block - piece.begin_block;
    if (warpgroup_ >= num_blocks) ptx::mbarrier_arrive(ptx::shared_address(&shared_.qk_over));
#pragma unroll 1
    for (int own = warpgroup_; own < num_blocks; own += Traits::kNumConsumers) {
      at_ = ring_position_of_block<Traits>(first_block_ + own);
      ptx::wgmma_fence();
      issue_qk();
      ptx::wgmma_wait<0>();
      if (own + Traits::kNumConsumers >= num_blocks) ptx::mbarrier_arrive(ptx::shared_address(&shared_.qk_over));
      // A warp may be ahead of the others by now, and they may still multiply with the block's P before.
      ptx::named_barrier_sync(kWarpgroupReady + warpgroup_, Traits::kWarpgroupThreads);
      const int begin_token = (piece.begin_block + own) * Traits::kBlockN;
      if (begin_token + Traits::kBlockN > min_limit) mask(piece, tile, begin_token);
      soften(own < Traits::kNumConsumers);
      ptx::wgmma_fence();
      issue_pv();
      ptx::wgmma_wait<0>();
      release();
    }
    first_block_ += num_blocks;
  }

  /// Waits until both consumers are done with the piece's last QK, and so with the memory of Q.
  __device__ __forceinline__ void wait_for_qk() {
    ptx::mbarrier_wait(ptx::shared_address(&shared_.qk_over), qk_phase_);
    qk_phase_ ^= 1;
  }

  /// Waits until the other consumer has come here too.
  __device__ __forceinline__ void meet_other() {
    const std::uint32_t barrier = ptx::shared_address(&shared_.consumers_met);
    ptx::mbarrier_arrive(barrier);
    ptx::mbarrier_wait(barrier, met_phase_);
    met_phase_ ^= 1;
  }

  float o[Traits::kNumVChunks][Traits::kAccumulators];
  float row_max[Traits::kRowsPerThread];
  float row_sum[Traits::kRowsPerThread];  // over this thread's tokens only

 private:
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x % Traits::kWarpgroupThreads / 32; }

  /// Address of the own block's chunk number `i` in its slot, in shared memory.
  __device__ std::uint32_t chunk_address(int i) const {
    return kv_ + at_.slot * Traits::kBlockBytes + i * Traits::kChunkBytes;
  }

  __device__ __forceinline__ void issue_qk() {
    const ptx::SwizzledOperand<16> q(q_);
#pragma unroll
    for (int i = 0; i < Traits::kNumChunks; ++i) {
      const int chunk = Traits::chunk_in_slot(i);
      ptx::mbarrier_wait(kv_full_ + (at_.slot * Traits::kNumChunks + i) * sizeof(std::uint64_t), at_.phase);
      const ptx::SwizzledOperand<16> k(chunk_address(i));
#pragma unroll
      for (int step = 0; step < Traits::kRowBytes / Traits::kStepBytes; ++step) {
        ptx::wgmma_m64k16<Element, false>(s_, k.at(step * Traits::kStepBytes),
                                          q.at(chunk * Traits::kQChunkBytes + step * Traits::kStepBytes),
                                          i + step != 0);
      }
    }
    ptx::wgmma_commit();
  }

  /// O^T += V^T P^T.
  __device__ __forceinline__ void issue_pv() {
    const ptx::SwizzledOperand<16> p(p_);
#pragma unroll
    for (int chunk = 0; chunk < Traits::kNumVChunks; ++chunk) {
      const ptx::SwizzledOperand<Traits::kChunkBytes> v(chunk_address(1 + chunk));
#pragma unroll
      for (int step = 0; step < Traits::kBlockN / 16; ++step) {
        ptx::wgmma_m64k16<Element, true>(o[chunk], v.at(step * 16 * Traits::kRowBytes), p.at(step * Traits::kStepBytes),
                                         true);
      }
    }
    ptx::wgmma_commit();
  }

  /// P of the own block into shared memory, and its sums. While no P is large the maxima are kept, so that the usual
  /// block, if it is not this consumer's first of a piece, needs no reduction over tokens but the barrier that P needs
  /// anyway.
  __device__ __forceinline__ void soften(bool is_first) {
    const float scale_log2 = params_.softmax_scale_log2;
    float sum[Traits::kRowsPerThread];
#pragma unroll 1
    for (bool looks = is_first;; looks = true) {
      if (looks) raise_maxima(scale_log2);
      const bool is_large = exponentiate(scale_log2, sum);
      ptx::fence_proxy_async();
      const bool any_large = ptx::named_barrier_any(kWarpgroupReady + warpgroup_, Traits::kWarpgroupThreads, is_large);
      if (looks || !any_large) break;
    }
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) row_sum[k] += sum[k];
  }

  /// P^T = exp2(scale_log2 * (S^T - max)), stored with tokens contiguous; whether a sum of two tokens is large.
  __device__ __forceinline__ bool exponentiate(float scale_log2, float (&sum)[Traits::kRowsPerThread]) {
    float offset[Traits::kRowsPerThread];
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) {
      offset[k] = row_max[k] * scale_log2;
      sum[k] = 0.0F;
    }
    std::uint32_t packed[Traits::kAccumulators / 2];
#pragma unroll
    for (int i = 0; i < Traits::kAccumulators; i += 2) {
      const int k = index_of(i);
      const float low = ptx::exp2_approx(fmaf(s_[i], scale_log2, -offset[k]));
      const float high = ptx::exp2_approx(fmaf(s_[i + 1], scale_log2, -offset[k + 1]));
      sum[k] += low;
      sum[k + 1] += high;
      packed[i / 2] = pack<Element>(low, high);
    }
    // Matrix m of a store: tokens 8 * (m % 2) of the warp's 16, query rows 8 * (m / 2) of the pair's 16.
    const int row = lane() / 16 * 8 + lane() % 8;
    const int unit = (2 * warp() + lane() / 8 % 2) ^ lane() % 8;
#pragma unroll
    for (int pair = 0; pair < Traits::kRows / 16; ++pair) {
      ptx::store_matrix_x4_transposed(p_ + (16 * pair + row) * Traits::kRowBytes + unit * 16, packed[4 * pair],
                                      packed[4 * pair + 1], packed[4 * pair + 2], packed[4 * pair + 3]);
    }
    bool is_large = false;
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) is_large |= sum[k] > kMaxLazySum;
    return is_large;
  }

  /// Raises the maxima to those of the block, and rescales O and the sums.
  __device__ __forceinline__ void raise_maxima(float scale_log2) {
    auto& warp_max = shared_.warp_max[warpgroup_];
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) {
      const int i = k / 2 * 4 + k % 2;
      const float max = column_reduce_max(fmaxf(s_[i], s_[i + 2]));
      if (lane() < 4) warp_max[warp()][row_at(k)] = max;
    }
    ptx::named_barrier_sync(kWarpgroupReady + warpgroup_, Traits::kWarpgroupThreads);
    float rescale[Traits::kRowsPerThread];
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) {
      float max = row_max[k];
#pragma unroll
      for (int w = 0; w < Traits::kWarpgroupWarps; ++w) max = fmaxf(max, warp_max[w][row_at(k)]);
      rescale[k] = ptx::exp2_approx((row_max[k] - max) * scale_log2);
      row_sum[k] *= rescale[k];
      row_max[k] = max;
    }
#pragma unroll
    for (auto& chunk : o) {
#pragma unroll
      for (int i = 0; i < Traits::kAccumulators; ++i) chunk[i] *= rescale[index_of(i)];
    }
  }

  /// Scores that a row must not see become -inf, NaN included. V of tokens past the request's end becomes 0: 0 * NaN
  /// must not reach O.
  __device__ __forceinline__ void mask(const Piece& piece, const QueryTile& tile, int begin_token) {
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) {
      int visible = piece.seqlen_k - begin_token;
      if (params_.causal) {
        const int query = tile.query + row_at(k) / params_.tiling.heads_per_tile;
        visible = min(visible, visible - params_.seqlen_q + query + 1);
      }
      const int i = k / 2 * 4 + k % 2;
      if (fragment_row() >= visible) s_[i] = -INFINITY;
      if (fragment_row() + 8 >= visible) s_[i + 2] = -INFINITY;
    }
    if (begin_token + Traits::kBlockN > piece.seqlen_k) clear_dead_values(piece.seqlen_k - begin_token);
  }

  /// The barrier before PV orders these writes.
  __device__ __forceinline__ void clear_dead_values(int live) {
    constexpr int kVectorsPerRow = Traits::kRowBytes / sizeof(uint4);
    constexpr int kThreadsPerRow = kVectorsPerRow * Traits::kNumVChunks;
    const int thread = threadIdx.x % Traits::kWarpgroupThreads;
    const std::uint32_t column = chunk_address(1 + thread % kThreadsPerRow / kVectorsPerRow) +
                                 thread % kVectorsPerRow * static_cast<int>(sizeof(uint4));
    for (int row = live + thread / kThreadsPerRow; row < Traits::kBlockN;
         row += Traits::kWarpgroupThreads / kThreadsPerRow) {
      ptx::store_shared_v4(column + row * Traits::kRowBytes, 0, 0, 0, 0);
    }
  }

  /// This warp is done with the own block.
  __device__ __forceinline__ void release() {
    if (lane() == 0) ptx::mbarrier_arrive(kv_empty_ + at_.slot * sizeof(std::uint64_t));
  }

  const DenseDecodeParams& params_;
  NarrowStorage<Traits>& shared_;
  const int warpgroup_;
  const std::uint32_t q_, p_, kv_, kv_full_, kv_empty_;
  std::uint32_t q_phase_ = 0;
  std::uint32_t qk_phase_ = 0;
  std::uint32_t met_phase_ = 0;
  unsigned first_block_ = 0;            // blocks of the pieces before, by both warpgroups
  RingPosition<Traits::kNumSlots> at_;  // the own block
  float s_[Traits::kAccumulators];
};

}  // namespace flash_mla::sm90

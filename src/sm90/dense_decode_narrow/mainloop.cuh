#pragma once

#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode_narrow/accumulator.cuh"
#include "sm90/dense_decode_narrow/traits.cuh"
#include "sm90/primitives/arrive.cuh"
#include "sm90/primitives/ring.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flash_mla::sm90 {

/// One of the two consumer warpgroups: O^T += V^T P^T, for one half of V's columns.
template <class Traits>
class NarrowConsumer {
  using Element = typename Traits::Element;
  using Accumulator = NarrowAccumulator<Traits>;

 public:
  __device__ __forceinline__ NarrowConsumer(NarrowStorage<Traits>& shared, int warpgroup)
      : shared_(shared), warpgroup_(warpgroup) {}

  /// Before each piece.
  __device__ __forceinline__ void reset() {
#pragma unroll
    for (auto& chunk : o) {
#pragma unroll
      for (float& value : chunk) value = 0.0F;
    }
  }

  /// O (this warpgroup's columns) of a piece with at least one block, but for the second half of these columns, which
  /// `finish` waits for: the first half can be stored meanwhile.
  __device__ __forceinline__ void run(const Piece& piece) {
#pragma unroll 1
    for (int block = piece.begin_block;; ++block) {
      ptx::mbarrier_wait(ptx::shared_address(&shared_.p_full[at_.slot]), at_.phase);
      if (__any_sync(~0U, block > piece.begin_block && shared_.must_rescale[at_.slot] != 0)) rescale_o();
      ptx::wgmma_fence();
      issue_pv();
      if (block == piece.end_block - 1) break;
      finish(true);
    }
    ptx::wgmma_wait<1>();
  }
  /// Waits for all of PV, and gives the block back, if there is one.
  __device__ __forceinline__ void finish(bool has_block) {
    ptx::wgmma_wait<0>();  // in any case, or ptxas inserts waits of its own
    if (!has_block) return;
    arrive_of_warp(shared_.kv_empty[at_.slot]);
    at_ = at_ + 1;
  }

  float o[Traits::kOwnChunks][Traits::kAccumulators];

 private:
  /// Brings O to the maximum of the block.
  __device__ __forceinline__ void rescale_o() {
    float factor[Traits::kRowsPerThread];
#pragma unroll
    for (int k = 0; k < Traits::kRowsPerThread; ++k) factor[k] = shared_.rescale[at_.slot][Accumulator::row_at(k)];
#pragma unroll
    for (auto& chunk : o) {
#pragma unroll
      for (int i = 0; i < Traits::kAccumulators; ++i) chunk[i] *= factor[Accumulator::index_of(i)];
    }
  }

  /// In two groups, a half of the columns each.
  __device__ __forceinline__ void issue_pv() {
    const ptx::SwizzledOperand<16> p(ptx::shared_address(shared_.p[at_.slot]));
    const ptx::SwizzledOperand<Traits::kChunkBytes> v(
        ptx::shared_address(shared_.kv[at_.slot][1 + warpgroup_ * Traits::kOwnChunks]));
#pragma unroll
    for (int j = 0; j < Traits::kOwnChunks; ++j) {
#pragma unroll
      for (int step = 0; step < Traits::kBlockN / 16; ++step) {
        ptx::wgmma_m64k16<Element, true>(o[j], v.at(j * Traits::kChunkBytes + step * 16 * Traits::kRowBytes),
                                         p.at(step * Traits::kStepBytes), true);
      }
      if (j % (Traits::kOwnChunks / 2) == Traits::kOwnChunks / 2 - 1) ptx::wgmma_commit();
    }
  }

  NarrowStorage<Traits>& shared_;
  const int warpgroup_;
  RingPosition<Traits::kNumSlots> at_;
};

}  // namespace flash_mla::sm90

#pragma once

#include <cstdint>

#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/primitives/arrive.cuh"
#include "sm90/primitives/fragment.cuh"
#include "sm90/primitives/ring.cuh"
#include "sm90/primitives/softmax.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flash_mla::sm90 {

/// One of the two consumer warpgroups: O += P V, for one half of O's columns.
template <class Traits>
class Consumer {
  using Element = typename Traits::Element;

 public:
  __device__ __forceinline__ Consumer(SharedStorage<Traits>& shared, int warpgroup)
      : shared_(shared), warpgroup_(warpgroup), row_(threadIdx.x) {
    ptx::launder(row_);  // so that it is kept, and threadIdx.x not read anew for each block
    row_ = fragment_row(row_);
  }

  /// Before each piece.
  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int i = 0; i < 64; ++i) o[0][i] = o[1][i] = 0.0F;
    row_max[0] = row_max[1] = kNoMax;
    row_sum[0] = row_sum[1] = 0.0F;
  }

  /// O (this warpgroup's columns), row maxima and row sums of a piece with at least one block. PV of the last one goes
  /// on: what comes before finish_first_half and finish costs no time, and the first half of the columns can be stored
  /// between these.
  __device__ __forceinline__ void run(const Piece& piece) {
    pair_ = pair_ + Traits::kNumRegisterPairs;  // those of Q
#pragma unroll 1
    for (int block = piece.begin_block;; ++block) {
      ptx::mbarrier_wait(ptx::shared_address(&shared_.rescale_full[p_.slot]), p_.phase);
      if (block > piece.begin_block) rescale_o();
      ptx::mbarrier_wait(ptx::shared_address(&shared_.p_full[p_.slot]), p_.phase);
      ptx::wgmma_fence();
      const int first = (pair_ + Traits::kPairsPerConsumer * warpgroup_).slot;
      const int second = (pair_ + (Traits::kPairsPerConsumer * warpgroup_ + 1)).slot;
      issue_pv(o[0], first);
      issue_pv(o[1], second);
      if (block == piece.end_block - 1) break;
      ptx::wgmma_wait<1>();
      arrive_of_warp(shared_.pair_empty[first]);
      ptx::wgmma_wait<0>();
      release_rest(second);
    }
    take_rows();
  }
  /// Waits for half of PV, and gives back its memory.
  __device__ __forceinline__ void finish_first_half(bool has_block) {
    ptx::wgmma_wait<1>();
    if (has_block) arrive_of_warp(shared_.pair_empty[(pair_ + Traits::kPairsPerConsumer * warpgroup_).slot]);
  }
  /// Waits for all of PV, and gives back the last block, if there is one.
  __device__ __forceinline__ void finish(bool has_block) {
    ptx::wgmma_wait<0>();  // in any case, or ptxas inserts waits of its own
    if (!has_block) return;
    release_rest((pair_ + (Traits::kPairsPerConsumer * warpgroup_ + 1)).slot);
    arrive_of_warp(shared_.rows_taken);
  }

  /// This warpgroup's columns of O, 128 and 128.
  float o[2][64];
  float row_max[kRowsPerThread];  // times softmax_scale_log2
  float row_sum[kRowsPerThread];

 private:
  static_assert(Traits::kPairsPerConsumer == 2);

  /// All that the block is in, but for its first pair.
  __device__ __forceinline__ void release_rest(int second) {
    arrive_of_warp(shared_.pair_empty[second]);
    arrive_of_warp(shared_.rope_empty[p_.slot]);
    pair_ = pair_ + Traits::kPairsPerBlock;
    p_ = p_ + 1;
  }

  /// Adds P V to 128 columns of O.
  __device__ __forceinline__ void issue_pv(float (&o)[64], int pair) const {
    const ptx::SwizzledOperand<16> p(ptx::shared_address(shared_.ropes[p_.slot]));
    const ptx::SwizzledOperand<Traits::kTileBytes> v(ptx::shared_address(shared_.pairs[pair]));
#pragma unroll
    for (int step = 0; step < Traits::kBlockN / 16; ++step) {
      ptx::wgmma_m64n128k16_tb<Element>(o, p.at(step * Traits::kStepBytes), v.at(step * 16 * Traits::kRowBytes));
    }
    ptx::wgmma_commit();
  }

  /// Brings O to the maximum of the block, which is known some time before its P is handed over.
  __device__ __forceinline__ void rescale_o() {
    const float scale0 = shared_.rescale[p_.slot][row_];
    const float scale1 = shared_.rescale[p_.slot][row_ + 8];
    if (!__any_sync(~0U, scale0 != 1.0F || scale1 != 1.0F)) return;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      o[0][i] *= row_of(i) == 0 ? scale0 : scale1;
      o[1][i] *= row_of(i) == 0 ? scale0 : scale1;
    }
  }

  __device__ __forceinline__ void take_rows() {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      row_max[r] = shared_.row_max[row_ + 8 * r];
      row_sum[r] = shared_.row_sum[row_ + 8 * r];
    }
  }

  SharedStorage<Traits>& shared_;
  const int warpgroup_;
  std::uint32_t row_;                      // the thread's first
  RingPosition<Traits::kPairSlots> pair_;  // of the block
  RingPosition<Traits::kRopeSlots> p_;
};

}  // namespace flash_mla::sm90

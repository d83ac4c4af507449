#pragma once

#include <cstdint>

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/row_coordinate.cuh"
#include "sm90/dense_decode/traits.cuh"
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

/// The warpgroup that scores: S = Q K^T and P = softmax(S) of each block. Two thirds of Q are in its registers, which
/// saves wgmma a third of what QK reads from shared memory, and leaves that memory to KV. README.md beside this file
/// draws the schedule.
template <class Traits>
class Scorer {
  using Element = typename Traits::Element;

 public:
  __device__ __forceinline__ Scorer(const DenseDecodeParams& params, SharedStorage<Traits>& shared)
      : params_(params), num_rows_(params.tiling.rows_per_tile()), shared_(shared) {}

  /// P of a piece's blocks, of which there is at least one, then its rows' maxima and sums.
  __device__ __forceinline__ void run(const Piece& piece) {
    // By a shuffle, which tells ptxas that it is the same for a warp: it then needs no register of each thread.
    const int first_masked_block =
        __shfl_sync(~0U, max(shared_.rows[0].limit(params_, piece.seqlen_k), 0) / Traits::kBlockN, 0);
    take_query();
    row_max_[0] = row_max_[1] = kNoMax;
    row_sum_[0] = row_sum_[1] = 0.0F;
    ptx::mbarrier_wait(ptx::shared_address(&shared_.q_full), piece_);
    piece_ ^= 1;
    bool has_rope = false;  // of the block, seen while the one before was scored
#pragma unroll 1
    for (int block = piece.begin_block; block < piece.end_block; ++block) {
      const bool is_first = block == piece.begin_block;
      const bool is_last = block == piece.end_block - 1;
      ptx::wgmma_fence();
      issue_qk(is_first, has_rope);
      if (threadIdx.x % 4 == 0) {
        float* const rescale = &shared_.rescale[rope_.slot][fresh_fragment_row()];
        rescale[0] = rescale[8] = 1.0F;
      }
      __syncwarp();
      // The rings go on while QK runs, and not between it and the next one, where each instruction takes time.
      const int slot = rope_.slot;  // of P
      pair_ = pair_ + Traits::kPairsPerBlock;
      rope_ = rope_ + 1;
      has_rope = ptx::mbarrier_test(ptx::shared_address(&shared_.rope_full[rope_.slot]), rope_.phase);
      ptx::wgmma_wait<0>();
      arrive_of_warp(shared_.qk_done);
      if (is_first || is_last || block >= first_masked_block) {  // one branch for the usual block
        if (is_first) give_back_query();
        if (is_last) arrive_of_warp(shared_.q_empty);
        if (block >= first_masked_block) mask(block * Traits::kBlockN, piece.seqlen_k);
        __syncwarp();
      }
      soften(is_first, slot);
      if (is_last) {
        give_rows();
        hand_over(slot);
      }
    }
  }

 private:
  /// Where this lane points ldmatrix or stmatrix for the first 16 columns of its warp's 16 rows of a swizzled tile; for
  /// columns 16 `step` to 16 `step` + 15, at(step) of that. Made anew where it is used: registers are too few.
  __device__ __forceinline__ static std::uint32_t first_matrix(const unsigned char* tile) {
    std::uint32_t thread = threadIdx.x % Traits::kWarpgroupThreads;
    ptx::launder(thread);
    const std::uint32_t row = thread / 32 * 16 + thread % 16;
    return ptx::shared_address(tile) + row * Traits::kRowBytes + ((thread % 32 / 16 ^ row % 8) << 4);
  }
  __device__ __forceinline__ static std::uint32_t matrix_at(std::uint32_t first, int step) { return first ^ step << 5; }

  /// Q's pairs that go to registers, from the ring.
  __device__ __forceinline__ void take_query() {
    const int first_row = fresh_fragment_row();
#pragma unroll
    for (int i = 0; i < Traits::kNumRegisterPairs; ++i) {
      ptx::mbarrier_wait(ptx::shared_address(&shared_.pair_full[pair_.slot]), pair_.phase);
      const std::uint32_t first = first_matrix(shared_.pairs[pair_.slot]);
#pragma unroll
      for (int step = 0; step < 2 * kSteps; ++step) {
        std::uint32_t(&q)[4] = q_[2 * kSteps * i + step];
        ptx::load_matrix_x4(matrix_at(first, step % kSteps) + step / kSteps * Traits::kTileBytes, q);
        if (first_row >= num_rows_) q[0] = q[2] = 0;  // padding
        if (first_row + 8 >= num_rows_) q[1] = q[3] = 0;
      }
      pair_ = pair_ + 1;
    }
  }
  /// When the first QK is done, and so these loads are: an arrival does not wait for ldmatrix, and copies that follow
  /// it have overtaken some.
  __device__ __forceinline__ void give_back_query() {
    ptx::fence_proxy_async();
    __syncwarp();
#pragma unroll
    for (int i = 1; i <= Traits::kNumRegisterPairs; ++i) {
      arrive_of_warp(shared_.pair_empty[pair_.slot_before(Traits::kPairsPerBlock + i)]);
    }
  }

  /// S = Q K^T, in the order in which the chunks come. Those that meet Q in shared memory come first: the last ones
  /// then leave shared memory to PV. P of the block before, if there is one, is handed over when almost all is issued,
  /// so that PV runs during this block's softmax, and not beside QK; and earlier where the last pair is late and memory
  /// is the limit, as PV gives slots back. Whether a pair is there is looked up before the chunk ahead of it is issued:
  /// the answer takes as long as a wgmma does.
  __device__ __forceinline__ void issue_qk(bool is_first, bool has_rope) {
    bool owes_p = !is_first;
    ptx::mbarrier_wait_unless(has_rope, ptx::shared_address(&shared_.rope_full[rope_.slot]), rope_.phase);
    bool has_pair = ptx::mbarrier_test(ptx::shared_address(&shared_.pair_full[pair_.slot]), pair_.phase);
    issue_shared_chunk(0, ptx::shared_address(shared_.ropes[rope_.slot]), false);
#pragma unroll
    for (int i = 0; i < Traits::kPairsPerBlock; ++i) {
      const RingPosition<Traits::kPairSlots> at = pair_ + i;
      const std::uint32_t full = ptx::shared_address(&shared_.pair_full[at.slot]);
      const bool is_last_pair = i == Traits::kPairsPerBlock - 1;
      if (is_last_pair && owes_p && params_.waits_for_memory &&
          !__shfl_sync(~0U, ptx::mbarrier_test(full, at.phase), 0)) {
        hand_over(rope_.slot_before(1));
        owes_p = false;
      }
      ptx::mbarrier_wait_unless(has_pair, full, at.phase);
      const std::uint32_t pair = ptx::shared_address(shared_.pairs[at.slot]);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (i < Traits::kFirstRegisterPair) {
          issue_shared_chunk(1 + 2 * i + c, pair + c * Traits::kTileBytes, true);
        } else {
          const ptx::SwizzledOperand<16> k(pair + c * Traits::kTileBytes);
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            ptx::wgmma_m64n64k16<Element>(s_, q_[(2 * (i - Traits::kFirstRegisterPair) + c) * kSteps + step],
                                          k.at(step * Traits::kStepBytes));
          }
        }
        if (!is_last_pair && c == 0) {
          const RingPosition<Traits::kPairSlots> next = pair_ + (i + 1);
          has_pair = ptx::mbarrier_test(ptx::shared_address(&shared_.pair_full[next.slot]), next.phase);
        }
        if (is_last_pair && c == 0 && owes_p) hand_over(rope_.slot_before(1));
      }
    }
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void issue_shared_chunk(int chunk, std::uint32_t k_tile, bool accumulate) {
    const ptx::SwizzledOperand<16> q(ptx::shared_address(shared_.q[chunk]));
    const ptx::SwizzledOperand<16> k(k_tile);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      ptx::wgmma_m64n64k16<Element>(s_, q.at(step * Traits::kStepBytes), k.at(step * Traits::kStepBytes),
                                    accumulate || step != 0);
    }
  }

  /// Hides what rows must not see of a block that begins at `begin_token`. Zeroes its V of tokens past the request's
  /// length: 0 * NaN must not reach O. (Some warp may still be at QK, but the scores of such tokens do not count.)
  __device__ __forceinline__ void mask(int begin_token, int seqlen_k) {
    const RowCoordinate* const rows = &shared_.rows[fresh_fragment_row()];
    std::uint32_t thread = threadIdx.x % Traits::kWarpgroupThreads;
    ptx::launder(thread);  // registers are too few to keep what follows from it
    const int first = begin_token + first_column(thread);
    apply_mask(s_, {rows[0].limit(params_, seqlen_k) - first, rows[8].limit(params_, seqlen_k) - first});
    const int live = seqlen_k - begin_token;
    constexpr int kVectorsPerRow = Traits::kRowBytes / 16;
    constexpr int kThreadsPerRow = kVectorsPerRow * Traits::kNumVChunks;
    const int chunk = static_cast<int>(thread) % kThreadsPerRow / kVectorsPerRow;
    const std::uint32_t column =
        ptx::shared_address(shared_.pairs[pair_.slot_before(Traits::kPairsPerBlock - chunk / 2)]) +
        chunk % 2 * Traits::kTileBytes + thread % kVectorsPerRow * 16;
    for (int row = live + static_cast<int>(thread) / kThreadsPerRow; row < Traits::kBlockN;
         row += Traits::kWarpgroupThreads / kThreadsPerRow) {
      ptx::store_shared_v4(column + row * Traits::kRowBytes, 0, 0, 0, 0);
    }
  }

  /// One step of the online softmax: P of the scores, where the block's RoPE was, in `slot`, and what it rescales. The
  /// maximum is kept from the blocks before, and looked for only where that makes P large.
  __device__ __forceinline__ void soften(bool is_first, int slot) {
    float sum[kRowsPerThread];
#pragma unroll 1
    for (bool looks = is_first;; looks = true) {
      if (looks) raise_max(slot);
      store_p(slot, sum);
      if (looks || !__any_sync(~0U, sum[0] > kMaxLazySum || sum[1] > kMaxLazySum)) break;
    }
    row_sum_[0] += sum[0];
    row_sum_[1] += sum[1];
    if (threadIdx.x % 4 == 0) ptx::mbarrier_arrive(ptx::shared_address(&shared_.rescale_full[slot]));
    __syncwarp();
  }
  /// Raises the maxima to those of the block, brings the sums to them, and writes what O must be multiplied with.
  __device__ __forceinline__ void raise_max(int slot) {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      float max = s_[2 * r];
#pragma unroll
      for (int i = 2 * r; i < 32; i += 4) max = fmaxf(max, fmaxf(s_[i], s_[i + 1]));
      max = fmaxf(row_max_[r], row_reduce_max(max) * params_.softmax_scale_log2);
      const float factor = ptx::exp2_approx(row_max_[r] - max);
      row_max_[r] = max;
      row_sum_[r] *= factor;
      if (threadIdx.x % 4 == 0) shared_.rescale[slot][fresh_fragment_row() + 8 * r] = factor;
    }
  }

  /// P, and the thread's sums of it.
  __device__ __forceinline__ void store_p(int slot, float (&sum)[kRowsPerThread]) {
    const std::uint32_t first = first_matrix(shared_.ropes[slot]);
    sum[0] = sum[1] = 0.0F;
#pragma unroll
    for (int group = 0; group < kSteps / 2; ++group) {
      float p[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        p[i] = ptx::exp2_approx(fmaf(s_[16 * group + i], params_.softmax_scale_log2, -row_max_[row_of(i)]));
      }
      if (group == 0) {
        ptx::mbarrier_wait(ptx::shared_address(&shared_.qk_done), block_before());  // all have read RoPE
        __syncwarp();
      }
#pragma unroll
      for (int i = 0; i < 16; i += 8) {
        ptx::store_matrix_x4(matrix_at(first, 2 * group + i / 8), pack<Element>(p[i], p[i + 1]),
                             pack<Element>(p[i + 2], p[i + 3]), pack<Element>(p[i + 4], p[i + 5]),
                             pack<Element>(p[i + 6], p[i + 7]));
      }
#pragma unroll
      for (int i = 0; i < 16; i += 2) sum[row_of(i)] += p[i] + p[i + 1];
    }
  }

  /// Tells the consumers of a block's P, and of what `mask` has zeroed.
  __device__ __forceinline__ void hand_over(int slot) {
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(ptx::shared_address(&shared_.p_full[slot]));
  }

  /// Maxima and sums of the piece, which the consumers find when they have its last P.
  __device__ __forceinline__ void give_rows() {
    ptx::mbarrier_wait(ptx::shared_address(&shared_.rows_taken), piece_);
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const float sum = row_reduce_sum(row_sum_[r]);
      if (threadIdx.x % 4 == 0) {
        shared_.row_max[fresh_fragment_row() + 8 * r] = row_max_[r];
        shared_.row_sum[fresh_fragment_row() + 8 * r] = sum;
      }
    }
  }

  /// The parity of the number of the block before that which the rings are at: a turn of RoPE's is odd.
  __device__ __forceinline__ std::uint32_t block_before() const {
    static_assert(Traits::kRopeSlots % 2 == 1);
    return (rope_.phase ^ static_cast<std::uint32_t>(rope_.slot) ^ 1) & 1;
  }

  static constexpr int kSteps = Traits::kRowBytes / Traits::kStepBytes;  // of a chunk

  const DenseDecodeParams& params_;
  const int num_rows_;
  SharedStorage<Traits>& shared_;
  std::uint32_t piece_ = 0;                // the parity of how many have begun
  RingPosition<Traits::kPairSlots> pair_;  // of the block until its QK is issued, then of the next one
  RingPosition<Traits::kRopeSlots> rope_;  // the same

  std::uint32_t q_[2 * kSteps * Traits::kNumRegisterPairs][4];
  float s_[32];
  float row_max_[kRowsPerThread];  // times softmax_scale_log2
  float row_sum_[kRowsPerThread];  // over this thread's columns only
};

}  // namespace flash_mla::sm90

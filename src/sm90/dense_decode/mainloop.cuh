#pragma once

#include <cstdint>

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/primitives/fragment.cuh"
#include "sm90/primitives/softmax.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flash_mla::sm90 {

/// One of the two consumer warpgroups. It owns every second KV block (its S, its softmax) and one half of O's columns,
/// to which it adds the P of both. The two run half a step apart; README.md beside this file draws the schedule.
template <class Traits>
class Consumer {
  using Element = typename Traits::Element;

 public:
  __device__ __forceinline__ Consumer(const DenseDecodeParams& params, SharedStorage<Traits>& shared, int warpgroup)
      : softmax_scale_log2_(params.softmax_scale_log2),
        shared_(shared),
        warpgroup_(warpgroup),
        q_(ptx::shared_address(shared.q)),
        kv_(ptx::shared_address(shared.kv)),
        exchange_(ptx::shared_address(&shared.exchange[0][threadIdx.x % Traits::kWarpgroupThreads])),
        exchange_full_(ptx::shared_address(shared.exchange_full)),
        kv_full_(ptx::shared_address(shared.kv_full[warpgroup])),
        kv_empty_(ptx::shared_address(shared.kv_empty)) {}

  /// Before each piece.
  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int i = 0; i < 64; ++i) o[0][i] = o[1][i] = 0.0F;
    row_max[0] = row_max[1] = kNoMax;
    row_sum[0] = row_sum[1] = 0.0F;
  }

  /// O (this warpgroup's columns), row maxima and row sums of a piece with at least one block. `limits`: for each of
  /// the thread's rows, the number of the request's tokens that it sees; `min_limit`: the least of the tile.
  __device__ __forceinline__ void run(const Piece& piece, const int (&limits)[2], int min_limit) {
    piece_ = piece;
    limits_[0] = limits[0];
    limits_[1] = limits[1];
    min_limit_ = min_limit;
    ptx::mbarrier_wait(ptx::shared_address(&shared_.q_full), q_phase_);
    q_phase_ ^= 1;

    const int num_blocks = piece.end_block - piece.begin_block;
    int own = warpgroup_;
    if (warpgroup_ == 0) {  // nothing precedes the first block
      ptx::wgmma_fence();
      begin_qk<false>();
      end_qk();
      ptx::wgmma_wait<0>();
      release(0, Traits::kRopePair);
      soften(own);
      hand_over();
      add_own();
      own += Traits::kNumConsumers;
    }
#pragma unroll 1
    for (; own < num_blocks; own += Traits::kNumConsumers) {
      take_state();
      ptx::wgmma_fence();
      begin_qk<true>();
      if constexpr (Traits::kInterleaves) {
        ptx::wgmma_commit();
        ptx::wgmma_fence();
        issue_pv(p_other_, 1 - warpgroup_, 0);
        ptx::wgmma_fence();
      }
      end_qk();
      ptx::wgmma_fence();
      if constexpr (!Traits::kInterleaves) issue_pv(p_other_, 1 - warpgroup_, 0);
      issue_pv(p_other_, 1 - warpgroup_, 1);
      ptx::wgmma_wait<Traits::kInterleaves ? 1 : 2>();
      release(warpgroup_, Traits::kRopePair);
      if constexpr (Traits::kInterleaves) release(1 - warpgroup_, 2 * warpgroup_);
      soften(own);
      hand_over();
      finish_pv<Traits::kInterleaves>(1 - warpgroup_);
      add_own();
    }
    if (lane() == 0) ptx::mbarrier_arrive(ptx::shared_address(&shared_.q_empty));
    const bool owns_last = (num_blocks - 1) % Traits::kNumConsumers == warpgroup_;
    if (!owns_last) {
      take_state();
      take_p();
      give_sums();
      ptx::wgmma_fence();
      issue_pv(p_other_, 1 - warpgroup_, 0);
      issue_pv(p_other_, 1 - warpgroup_, 1);
      finish_pv(1 - warpgroup_);
    }
    total_sums(owns_last);
  }

  /// This warpgroup's columns of O, 128 and 128.
  float o[2][64];
  float row_max[2];
  float row_sum[2];  // within run(): over this warpgroup's blocks and this thread's columns only

 private:
  __device__ static int lane() { return threadIdx.x % 32; }

  /// S = Q K^T of the own buffer's block, RoPE first, then in the order in which the producer fills it: the V columns
  /// of this warpgroup, then those of the other.
  template <bool kTakesP>
  __device__ __forceinline__ void begin_qk() {
    issue_qk_chunks<1>(Traits::kRopeChunk, false);
    if constexpr (kTakesP) take_p();  // while the tensor cores have begun
    issue_qk_chunks<kHalfChunks>(warpgroup_ * kHalfChunks, true);
  }
  __device__ __forceinline__ void end_qk() {
    issue_qk_chunks<kHalfChunks>((1 - warpgroup_) * kHalfChunks, true);
    ptx::wgmma_commit();
    kv_phase_ ^= 1;
  }
  template <int kChunks>
  __device__ __forceinline__ void issue_qk_chunks(int first_chunk, bool accumulate) {
    const std::uint32_t k_tile = kv_ + warpgroup_ * Traits::kTileBytes;
    std::uint32_t full = kv_full_ + first_chunk * sizeof(std::uint64_t);
    ptx::launder(full);
    const ptx::SwizzledOperand<16> q(q_ + first_chunk * Traits::kChunkBytes);
    const ptx::SwizzledOperand<16> k(k_tile + first_chunk * Traits::kChunkBytes);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      ptx::mbarrier_wait(full + chunk * sizeof(std::uint64_t), kv_phase_);
#pragma unroll
      for (int step = 0; step < Traits::kRowBytes / Traits::kStepBytes; ++step) {
        const std::uint32_t offset = chunk * Traits::kChunkBytes + step * Traits::kStepBytes;
        ptx::wgmma_m64n64k16<Element>(s_, q.at(offset), k.at(offset), accumulate || chunk + step != 0);
      }
    }
  }

  /// Adds P V to a half of O, 128 columns, for the block in `buffer`.
  __device__ __forceinline__ void issue_pv(const std::uint32_t (&p)[16], int buffer, int half) {
    const ptx::SwizzledOperand<Traits::kChunkBytes> v(kv_ + buffer * Traits::kTileBytes +
                                                      warpgroup_ * kHalfChunks * Traits::kChunkBytes);
#pragma unroll
    for (int step = 0; step < Traits::kBlockN / 16; ++step) {
      ptx::wgmma_m64n128k16_ra_tb<Element>(o[half], &p[4 * step],
                                           v.at(half * 2 * Traits::kChunkBytes + step * 16 * Traits::kRowBytes));
    }
    ptx::wgmma_commit();
  }

  /// Waits for the PV on `buffer` and gives its chunks back, each half as soon as it is done.
  template <bool kFirstIsDone = false>
  __device__ __forceinline__ void finish_pv(int buffer) {
    if constexpr (!kFirstIsDone) {
      ptx::wgmma_wait<1>();
      release(buffer, 2 * warpgroup_);
    }
    ptx::wgmma_wait<0>();
    release(buffer, 2 * warpgroup_ + 1);
  }

  __device__ __forceinline__ void add_own() {
    rescale_o(rescale_[0], rescale_[1]);
    ptx::wgmma_fence();
    issue_pv(p_, warpgroup_, 0);
    issue_pv(p_, warpgroup_, 1);
    finish_pv(warpgroup_);
  }

  /// Mask and softmax of the own block: S -> P.
  __device__ __forceinline__ void soften(int own) {
    const int begin_token = (piece_.begin_block + own) * Traits::kBlockN;
    if (begin_token + Traits::kBlockN > min_limit_) {
      apply_mask(s_, {{limits_[0] - begin_token, limits_[1] - begin_token}});
      if (begin_token + Traits::kBlockN > piece_.seqlen_k) clear_dead_values(piece_.seqlen_k - begin_token);
    }
    online_softmax<Element>(s_, p_, row_max, row_sum, rescale_, softmax_scale_log2_);
  }

  /// Zeroes V of the own block's tokens from `live` on: 0 * NaN must not reach O. Its QK is done.
  __device__ __forceinline__ void clear_dead_values(int live) {
    constexpr int kVectorsPerRow = Traits::kRowBytes / 16;
    constexpr int kThreadsPerRow = kVectorsPerRow * Traits::kNumVChunks;
    const int thread = threadIdx.x % Traits::kWarpgroupThreads;
    const std::uint32_t column = kv_ + warpgroup_ * Traits::kTileBytes +
                                 thread % kThreadsPerRow / kVectorsPerRow * Traits::kChunkBytes +
                                 thread % kVectorsPerRow * 16;
    for (int row = live + thread / kThreadsPerRow; row < Traits::kBlockN;
         row += Traits::kWarpgroupThreads / kThreadsPerRow) {
      ptx::store_shared_v4(column + row * Traits::kRowBytes, 0, 0, 0, 0);
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(kWarpgroupReady + warpgroup_, Traits::kWarpgroupThreads);
  }

  /// Gives P and the rows' state to the other warpgroup. Each thread has one counterpart there, and one slot serves
  /// both directions: whoever writes it has read what the counterpart had written.
  __device__ __forceinline__ void hand_over() {
#pragma unroll
    for (int i = 0; i < Exchange::kPVectors; ++i) {
      ptx::store_shared_v4(exchange_ + i * kExchangeStep, p_[4 * i], p_[4 * i + 1], p_[4 * i + 2], p_[4 * i + 3]);
    }
    store_state(rescale_[0], row_max[0], rescale_[1], row_max[1]);
    signal_other();
  }

  /// Takes the other's state, and brings O and the own sums to its maximum.
  __device__ __forceinline__ void take_state() {
    wait_for_other();
    float scale[2];
    load_state(scale[0], row_max[0], scale[1], row_max[1]);
    row_sum[0] *= scale[0];
    row_sum[1] *= scale[1];
    rescale_o(scale[0], scale[1]);
  }
  /// Takes the other's P.
  __device__ __forceinline__ void take_p() {
#pragma unroll
    for (int i = 0; i < Exchange::kPVectors; ++i) {
      ptx::load_shared_v4(exchange_ + i * kExchangeStep, p_other_[4 * i], p_other_[4 * i + 1], p_other_[4 * i + 2],
                          p_other_[4 * i + 3]);
    }
  }

  /// The end of a piece: the last block's taker, who may write the slot, gives its sums, and gets the totals back.
  /// After that consumer 0 may write the slot for the next piece's first block.
  __device__ __forceinline__ void give_sums() {
    store_state(row_sum[0], row_sum[1], 0.0F, 0.0F);
    signal_other();
  }
  __device__ __forceinline__ void total_sums(bool owns_last) {
    float other[2], unused[2];
    wait_for_other();
    load_state(other[0], other[1], unused[0], unused[1]);
    if (owns_last) {
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) row_sum[r] += other[r];
      give_sums();
    } else {
      row_sum[0] = other[0];
      row_sum[1] = other[1];
    }
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) row_sum[r] = row_reduce_sum(row_sum[r]);
  }

  __device__ __forceinline__ void store_state(float a, float b, float c, float d) {
    ptx::store_shared_v4(exchange_ + Exchange::kPVectors * kExchangeStep, __float_as_uint(a), __float_as_uint(b),
                         __float_as_uint(c), __float_as_uint(d));
  }
  __device__ __forceinline__ void load_state(float& a, float& b, float& c, float& d) {
    std::uint32_t state[4];
    ptx::load_shared_v4(exchange_ + Exchange::kPVectors * kExchangeStep, state[0], state[1], state[2], state[3]);
    a = __uint_as_float(state[0]);
    b = __uint_as_float(state[1]);
    c = __uint_as_float(state[2]);
    d = __uint_as_float(state[3]);
  }

  __device__ __forceinline__ void signal_other() {
    ptx::mbarrier_arrive(exchange_full_ + warpgroup_ * sizeof(std::uint64_t));
  }
  __device__ __forceinline__ void wait_for_other() {
    ptx::mbarrier_wait(exchange_full_ + (1 - warpgroup_) * sizeof(std::uint64_t), exchange_phase_);
    exchange_phase_ ^= 1;
  }

  __device__ __forceinline__ void rescale_o(float scale0, float scale1) {
    if (!__any_sync(~0U, scale0 != 1.0F || scale1 != 1.0F)) return;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      o[0][i] *= row_of(i) == 0 ? scale0 : scale1;
      o[1][i] *= row_of(i) == 0 ? scale0 : scale1;
    }
  }

  /// This warp is done with a pair of chunks.
  __device__ __forceinline__ void release(int buffer, int pair) {
    if (lane() == 0) ptx::mbarrier_arrive(kv_empty_ + (buffer * Traits::kNumPairs + pair) * sizeof(std::uint64_t));
  }

  static constexpr int kHalfChunks = Traits::kNumVChunks / 2;
  static constexpr int kExchangeStep = Traits::kWarpgroupThreads * sizeof(uint4);

  const float softmax_scale_log2_;
  SharedStorage<Traits>& shared_;
  const int warpgroup_;
  const std::uint32_t q_, kv_, exchange_, exchange_full_, kv_full_, kv_empty_;
  std::uint32_t q_phase_ = 0;
  std::uint32_t kv_phase_ = 0;
  std::uint32_t exchange_phase_ = 0;

  Piece piece_;
  int limits_[2];
  int min_limit_;
  float s_[32];
  float rescale_[2];
  std::uint32_t p_[16];
  std::uint32_t p_other_[16];
};

}  // namespace flash_mla::sm90

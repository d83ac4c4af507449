#pragma once

#include <cstdint>

#include "sm90/dense_decode/traits.cuh"
#include "sm90/primitives/ring.cuh"

namespace flash_mla::sm90 {

/// Constants of the kernel for tiles of few query rows. MMAs have tokens as M and query rows as N, so that rows are
/// padded to kRows and not to 64.
template <class Element, int kRows_>
struct NarrowTraits : TileTraits<Element> {
  using Base = TileTraits<Element>;

  static constexpr int kRows = kRows_;
  static constexpr int kConsumerRegisters = 216;
  static constexpr int kProducerRegisters = 72;

  static constexpr int kQChunkBytes = kRows * Base::kRowBytes;
  static constexpr int kPBytes = kRows * Base::kRowBytes;
  /// Slots of the ring, a block each. Two: a slot always returns to the same consumer, so that whoever waits for a
  /// phase of its barriers has seen the one before.
  static constexpr int kNumSlots = Base::kNumConsumers;
  static constexpr int kBlockBytes = Base::kNumChunks * Base::kChunkBytes;
  /// The block's chunk that is number `i` of a slot: RoPE comes first.
  __device__ static constexpr int chunk_in_slot(int i) { return i == 0 ? Base::kRopeChunk : i - 1; }
  /// Registers of an accumulator of 64 x kRows, and query rows that a thread holds values of.
  static constexpr int kAccumulators = kRows / 2;
  static constexpr int kRowsPerThread = kRows / 4;
  /// Chunks of O that a consumer writes, after merging its own with those of the other.
  static constexpr int kOwnChunks = Base::kNumVChunks / Base::kNumConsumers;
  /// How many of them consumers exchange at a time, and the memory of Q, which these go through.
  static constexpr int kStagedChunks = kRows == 16 ? kOwnChunks : kOwnChunks / 2;
  static constexpr int kStagingBytes =
      Base::kNumConsumers * kStagedChunks * Base::kBlockN * kRows * static_cast<int>(sizeof(float));
  static constexpr int kQBytes =
      kStagingBytes > Base::kNumChunks* kQChunkBytes ? kStagingBytes : Base::kNumChunks* kQChunkBytes;

  /// A unit of a piece in the workspace, and the column, of a consumer's, of its value i. Four in a row are one
  /// thread's: two of a chunk and two of the next.
  using UnitValue = float;
  static constexpr int kRowsOfUnit = 1;
  __device__ static constexpr int unit_row(int) { return 0; }
  __device__ static constexpr int unit_column(int i) {
    return (i / 128 * 2 + i / 2 % 2) * Base::kChunkColumns + i / 32 % 4 * 16 + i / 4 % 8 + i % 2 * 8;
  }

  static_assert(kRows == 16 || kRows == 32, "as there are wgmma wrappers");
  static_assert(Base::kRowBytes == Base::kBlockN * sizeof(Element), "a row of P is a row of the swizzle");
};

template <class Traits>
struct alignas(1024) NarrowStorage {
  /// The memory of Q, P and KV, where split requests are merged in the end.
  static constexpr int kMergeBytes =
      Traits::kQBytes + Traits::kNumConsumers * Traits::kPBytes + Traits::kNumSlots * Traits::kBlockBytes;

  unsigned char q[Traits::kQBytes];  // at the end of a piece: O on its way between consumers
  unsigned char p[Traits::kNumConsumers][Traits::kPBytes];
  unsigned char kv[Traits::kNumSlots][Traits::kNumChunks][Traits::kChunkBytes];  // chunk_in_slot
  float warp_max[Traits::kNumConsumers][Traits::kWarpgroupWarps][Traits::kRows];
  float4 warp_sums[Traits::kNumConsumers][Traits::kRows];  // of the consumer's four warps
  float row_max[Traits::kNumConsumers][Traits::kRows];
  PartPlan plan;
  MergeBarriers merge_barriers;
  std::uint64_t q_full;
  std::uint64_t q_empty;
  std::uint64_t qk_over;
  std::uint64_t consumers_met;
  std::uint64_t kv_full[Traits::kNumSlots][Traits::kNumChunks];
  std::uint64_t kv_empty[Traits::kNumSlots];
};

/// Named barriers; 0 is __syncthreads.
enum NamedBarrier : int {
  kWarpgroupReady = 1,  // + warpgroup: one consumer warpgroup
};

/// Where block number `block` of all that the CTA loads lies.
template <class Traits>
__device__ __forceinline__ RingPosition<Traits::kNumSlots> ring_position_of_block(unsigned block) {
  return {static_cast<int>(block % Traits::kNumSlots), block / Traits::kNumSlots & 1};
}

}  // namespace flash_mla::sm90

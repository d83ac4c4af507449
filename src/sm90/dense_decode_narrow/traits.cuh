#pragma once

#include <cstdint>

#include "sm90/dense_decode/row_coordinate.cuh"
#include "sm90/dense_decode/traits.cuh"

namespace flash_mla::sm90 {

/// Constants of the kernel for tiles of few query rows. MMAs have tokens as M and query rows as N, so that rows are
/// padded to kRows and not to 64.
template <class Element, int kRows_>
struct NarrowTraits : TileTraits<Element> {
  using Base = TileTraits<Element>;

  static constexpr int kRows = kRows_;
  /// No role needs more than a thread has at launch, so none are moved.
  static constexpr int kConsumerRegisters = Base::kRegisters;
  static constexpr int kScorerRegisters = Base::kRegisters;
  static constexpr int kProducerRegisters = Base::kRegisters;

  static constexpr int kQChunkBytes = kRows * Base::kRowBytes;
  static constexpr int kPBytes = kRows * Base::kRowBytes;
  /// Slots of Q: the next piece's arrives while this one is worked.
  static constexpr int kQuerySlots = 2;
  static constexpr int kQueryBytes = Base::kNumChunks * kQChunkBytes;
  /// Slots of the ring, a block each.
  static constexpr int kNumSlots = 2;
  static constexpr int kBlockBytes = Base::kNumChunks * Base::kChunkBytes;
  /// The block's chunk that is number `i` of a slot: RoPE comes first.
  __device__ static constexpr int chunk_in_slot(int i) { return i == 0 ? Base::kRopeChunk : i - 1; }
  /// Registers of an accumulator of 64 x kRows, and query rows that a thread holds values of.
  static constexpr int kAccumulators = kRows / 2;
  static constexpr int kRowsPerThread = kRows / 4;
  /// Chunks of O that are a consumer's.
  static constexpr int kOwnChunks = Base::kNumVChunks / Base::kNumConsumers;

  /// A unit of a piece in the workspace, and the column, of a consumer's, of its value i. Four in a row are one
  /// thread's: two of a chunk and two of the next.
  using UnitValue = float;
  static constexpr bool kKeepsTotals = false;  // it is the scorer that knows them, and it has told everybody by then
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
  static constexpr int kMergeBytes = Traits::kQuerySlots * Traits::kQueryBytes + Traits::kNumSlots * Traits::kPBytes +
                                     Traits::kNumSlots * Traits::kBlockBytes;

  unsigned char q[Traits::kQuerySlots][Traits::kQueryBytes];
  unsigned char p[Traits::kNumSlots][Traits::kPBytes];
  unsigned char kv[Traits::kNumSlots][Traits::kNumChunks][Traits::kChunkBytes];  // chunk_in_slot
  /// For the block of a slot: maxima of the scorer's warps, whether O must be rescaled before P is taken, and by what.
  float warp_max[Traits::kNumSlots][Traits::kWarpgroupWarps][Traits::kRows];
  float rescale[Traits::kNumSlots][Traits::kRows];
  int must_rescale[Traits::kNumSlots];
  float4 warp_sums[Traits::kRows];  // at the end of a piece, of the scorer's four warps
  float row_max[Traits::kRows];
  float row_sum[Traits::kRows];  // of a whole request
  RowCoordinate rows[Traits::kRows];
  PartPlan plan;
  MergeBarriers merge_barriers;
  std::uint64_t q_full[Traits::kQuerySlots];
  std::uint64_t q_empty[Traits::kQuerySlots];
  std::uint64_t sums_full;
  std::uint64_t sums_empty;
  std::uint64_t kv_full[Traits::kNumSlots][Traits::kNumChunks];
  std::uint64_t kv_empty[Traits::kNumSlots];
  std::uint64_t p_full[Traits::kNumSlots];
};

/// Named barrier of the scorer's threads; 0 is __syncthreads.
constexpr int kScorerBarrier = 1;

}  // namespace flash_mla::sm90

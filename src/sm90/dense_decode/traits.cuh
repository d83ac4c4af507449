#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "flash_mla/dense_decode.h"
#include "scheduler/split_plan.h"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/part_plan.cuh"
#include "sm90/dense_decode/query_tiling.h"
#include "sm90/dense_decode/row_coordinate.cuh"

namespace flash_mla::sm90 {

/// What all decode kernels share. A KV block of 64 tokens lies in shared memory as nine chunks of 64 rows and 64
/// columns, each in the 128-byte swizzle; the last holds the RoPE columns. Q lies in chunks of as many rows as a tile
/// has.
template <class Element_>
struct TileTraits {
  using Element = Element_;

  static constexpr int kBlockN = scheduler::kBlockN;
  static constexpr int kChunkColumns = 64;
  static constexpr int kRowBytes = kChunkColumns * sizeof(Element);
  static constexpr int kChunkBytes = kBlockN * kRowBytes;
  static constexpr int kNumChunks = kHeadDimQk / kChunkColumns;
  static constexpr int kNumVChunks = kHeadDimV / kChunkColumns;
  static constexpr int kRopeChunk = kNumVChunks;
  static constexpr int kStepBytes = 16 * sizeof(Element);  // k of one wgmma, along a row

  static constexpr int kWarpgroupThreads = 128;
  static constexpr int kWarpgroupWarps = kWarpgroupThreads / 32;
  static constexpr int kNumConsumers = sm90::kNumConsumers;
  static constexpr int kColumnsPerConsumer = kHeadDimV / kNumConsumers;
  static constexpr int kConsumerThreads = kNumConsumers * kWarpgroupThreads;
  static constexpr int kConsumerWarps = kConsumerThreads / 32;
  /// Warps behind the consumers, beside the first one, which loads KV.
  static constexpr int kQueryWarp = kConsumerWarps + 1;
  static constexpr int kPlanWarp = kConsumerWarps + 2;
  static constexpr int kSplitsWarp = kConsumerWarps + 3;
  /// A warpgroup of producers, and one that scores, come behind the consumers.
  static constexpr int kNumThreads = kConsumerThreads + 2 * kWarpgroupThreads;
  static constexpr int kRegisters = 128;  // that a thread of so many can have at launch

  /// Chunks of Q that stay in shared memory, and which ones these are.
  static constexpr int kNumSharedQueryChunks = kNumChunks;
  __device__ static constexpr int shared_query_chunk(int i) { return i; }
};

/// Constants of the kernel for tiles of 64 query rows.
template <class Element>
struct DenseDecodeTraits : TileTraits<Element> {
  using Base = TileTraits<Element>;

  static constexpr int kRows = kBlockM;
  static constexpr int kConsumerRegisters = 160;
  static constexpr int kScorerRegisters = 160;
  static constexpr int kProducerRegisters = 32;

  static constexpr int kTileBytes = Base::kChunkBytes;  // of 64 rows and 64 columns: chunks of Q and of KV, and P
  /// Chunks of V are loaded and freed in pairs.
  static constexpr int kPairBytes = 2 * Base::kChunkBytes;
  static constexpr int kPairsPerBlock = Base::kNumVChunks / 2;
  static constexpr int kPairsPerConsumer = kPairsPerBlock / Base::kNumConsumers;
  /// Slots of the ring of pairs, and of that of RoPE chunks, each of which the block's P then takes the place of.
  static constexpr int kPairSlots = 11;
  static constexpr int kRopeSlots = 3;

  /// Q: RoPE and the first pair stay in shared memory; the other pairs come through the ring, and go to registers.
  static constexpr int kNumSharedQueryChunks = 3;
  __device__ static constexpr int shared_query_chunk(int i) { return (i + Base::kRopeChunk) % Base::kNumChunks; }
  static constexpr int kFirstRegisterPair = 1;
  static constexpr int kNumRegisterPairs = kPairsPerBlock - kFirstRegisterPair;

  /// A unit of a piece in the workspace, and the row and the column, of a consumer's, of its value i. Eight in a row
  /// are one thread's, and 64 those of two rows' threads, so that a warp writes whole lines.
  using UnitValue = __half;
  /// Whether consumers know the totals of rows, and leave those of a piece that is kept in shared memory.
  static constexpr bool kKeepsTotals = true;
  static constexpr int kRowsOfUnit = 2;
  __device__ static constexpr int unit_row(int i) { return i / 32 % 2; }
  __device__ static constexpr int unit_column(int i) { return i / 64 * 32 + i / 2 % 4 * 8 + i / 8 % 4 * 2 + i % 2; }
};

template <class Traits>
struct alignas(1024) SharedStorage {
  /// The tiles' memory, where split requests are merged in the end.
  static constexpr int kMergeBytes = Traits::kNumSharedQueryChunks * Traits::kTileBytes +
                                     Traits::kPairSlots * Traits::kPairBytes + Traits::kRopeSlots * Traits::kTileBytes;

  unsigned char q[Traits::kNumSharedQueryChunks][Traits::kTileBytes];
  unsigned char pairs[Traits::kPairSlots][Traits::kPairBytes];
  unsigned char ropes[Traits::kRopeSlots][Traits::kTileBytes];  // RoPE of a block until its QK is done, then its P
  /// For each P, what outputs so far are to be multiplied with, and after a piece's last P its maxima and sums.
  float rescale[Traits::kRopeSlots][Traits::kRows];
  float row_max[Traits::kRows];
  float row_sum[Traits::kRows];
  RowCoordinate rows[Traits::kRows];
  PartPlan plan;
  MergeBarriers merge_barriers;
  std::uint64_t q_full;
  std::uint64_t q_empty;
  std::uint64_t pair_full[Traits::kPairSlots];
  std::uint64_t pair_empty[Traits::kPairSlots];
  std::uint64_t rope_full[Traits::kRopeSlots];
  std::uint64_t rope_empty[Traits::kRopeSlots];
  std::uint64_t p_full[Traits::kRopeSlots];
  std::uint64_t rescale_full[Traits::kRopeSlots];
  std::uint64_t qk_done;
  std::uint64_t rows_taken;
};

}  // namespace flash_mla::sm90

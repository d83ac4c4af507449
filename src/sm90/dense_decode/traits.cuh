#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "flash_mla/dense_decode.h"
#include "scheduler/split_plan.h"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/part_plan.cuh"
#include "sm90/dense_decode/query_tiling.h"

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
  static constexpr int kNumThreads = kConsumerThreads + kWarpgroupThreads;
  static constexpr int kConsumerWarps = kConsumerThreads / 32;
  static constexpr int kSplitsWarp = kNumThreads / 32 - 1;
};

/// Constants of the kernel for tiles of 64 query rows. Interleaved, half of the PV on the other's block comes between
/// two parts of QK: its memory is free earlier, and the softmax has less of PV to hide behind.
template <class Element, bool kInterleaves_>
struct DenseDecodeTraits : TileTraits<Element> {
  using Base = TileTraits<Element>;
  static constexpr bool kInterleaves = kInterleaves_;

  static constexpr int kRows = kBlockM;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kProducerRegisters = 40;

  static constexpr int kTileBytes = Base::kNumChunks * Base::kChunkBytes;
  static constexpr int kNumBuffers = 2;
  /// Chunks of a KV buffer are freed and refilled in pairs 0 to 3 (V) and alone (RoPE).
  static constexpr int kNumPairs = Base::kNumVChunks / 2 + 1;
  static constexpr int kRopePair = kNumPairs - 1;

  static_assert(kRows == Base::kBlockN, "Q tiles and KV tiles have one layout");

  /// A unit of a piece in the workspace, and the row and the column, of a consumer's, of its value i. Eight in a row
  /// are one thread's, and 64 those of two rows' threads, so that a warp writes whole lines.
  using UnitValue = __half;
  static constexpr int kRowsOfUnit = 2;
  __device__ static constexpr int unit_row(int i) { return i / 32 % 2; }
  __device__ static constexpr int unit_column(int i) { return i / 64 * 32 + i / 2 % 4 * 8 + i / 8 % 4 * 2 + i % 2; }
};

/// What a thread hands to its counterpart in the other warpgroup after a block's softmax, in 16-byte vectors: its P
/// fragment, and for each of its two rows the factor that sums and outputs so far are to be multiplied with, and the
/// running maximum. At the end of a piece, row sums.
struct Exchange {
  static constexpr int kPVectors = 4;
  static constexpr int kVectors = kPVectors + 1;
};

template <class Traits>
struct alignas(1024) SharedStorage {
  /// The tiles' memory, where split requests are merged in the end.
  static constexpr int kMergeBytes = (1 + Traits::kNumBuffers) * Traits::kTileBytes;

  unsigned char q[Traits::kTileBytes];
  unsigned char kv[Traits::kNumBuffers][Traits::kTileBytes];
  uint4 exchange[Exchange::kVectors][Traits::kWarpgroupThreads];
  std::uint64_t exchange_full[Traits::kNumConsumers];
  PartPlan plan;
  MergeBarriers merge_barriers;
  std::uint64_t q_full;
  std::uint64_t q_empty;
  std::uint64_t kv_full[Traits::kNumBuffers][Traits::kNumChunks];
  std::uint64_t kv_empty[Traits::kNumBuffers][Traits::kNumPairs];
};

/// Named barriers; 0 is __syncthreads.
enum NamedBarrier : int {
  kWarpgroupReady = 1,  // + warpgroup: one consumer warpgroup
};

}  // namespace flash_mla::sm90

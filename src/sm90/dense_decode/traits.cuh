#pragma once

#include <cstdint>

#include "flash_mla/dense_decode.h"
#include "scheduler/split_plan.h"
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
  static constexpr int kNumConsumers = 2;
  static constexpr int kConsumerThreads = kNumConsumers * kWarpgroupThreads;
  static constexpr int kNumThreads = kConsumerThreads + kWarpgroupThreads;
  static constexpr int kConsumerWarps = kConsumerThreads / 32;
  static constexpr int kSplitsWarp = kNumThreads / 32 - 1;
};

/// Four values of O that a thread holds side by side, float4 in the workspace: two rows by two columns.
struct Quad {
  int row;     // the first
  int column;  // the first
};

/// Constants of the kernel for tiles of 64 query rows.
template <class Element>
struct DenseDecodeTraits : TileTraits<Element> {
  using Base = TileTraits<Element>;

  static constexpr int kRows = kBlockM;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kProducerRegisters = 40;

  static constexpr int kTileBytes = Base::kNumChunks * Base::kChunkBytes;
  static constexpr int kNumBuffers = 2;
  /// Chunks of a KV buffer are freed and refilled in pairs 0 to 3 (V) and alone (RoPE).
  static constexpr int kNumPairs = Base::kNumVChunks / 2 + 1;
  static constexpr int kRopePair = kNumPairs - 1;

  /// Columns of O that one consumer warpgroup accumulates, in two halves.
  static constexpr int kColumnsPerConsumer = kHeadDimV / Base::kNumConsumers;

  static_assert(kRows == Base::kBlockN, "Q tiles and KV tiles have one layout");

  /// Consumer thread's quads, for merging: register 4 * quad of O on. Value i is row step * (i / 2), column i % 2.
  static constexpr int kQuadsPerThread = kRows * kHeadDimV / Base::kConsumerThreads / 4;
  static constexpr int kNumUnits = Base::kConsumerWarps * kQuadsPerThread;
  static constexpr int kQuadRowStep = 8;
  static constexpr int kQuadColumnStep = 1;
  __device__ static constexpr int quad_row(int i) { return i / 2; }
  __device__ static Quad quad(int warp, int lane, int quad) {
    return {warp % Base::kWarpgroupWarps * 16 + lane / 4,
            warp / Base::kWarpgroupWarps * kColumnsPerConsumer + 8 * quad + lane % 4 * 2};
  }
  /// Pairs of rows, tile's row pair p being the p-th that quads lie in: those of a unit, a quad of each lane of a warp.
  static constexpr int kPairsPerUnit = 8;
  __device__ static int first_pair(int warp, int) { return warp % Base::kWarpgroupWarps * kPairsPerUnit; }
  __device__ static int pair_of_lane(int lane) { return lane / 4; }
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

#pragma once

#include <cstdint>

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/plan_source.h"
#include "sm90/dense_decode/query_tiling.h"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/tma.cuh"

namespace flash_mla::sm90 {

/// Issues the copy of a chunk of a tile of Q, of which `barrier` is told. By one thread.
template <class Traits>
__device__ void load_query_chunk(const DenseDecodeParams& params, std::uint32_t destination, std::uint32_t barrier,
                                 int chunk, int request, const QueryTile& tile, int head_k) {
  ptx::tma_load_4d(destination, &params.q_map, barrier, chunk * Traits::kChunkColumns,
                   head_k * params.tiling.group_size + tile.head, tile.query, request);
}

/// Issues the copies of the chunks of a tile of Q that stay in shared memory, each of Traits::kRows rows, at `q`. By
/// one thread.
template <class Traits>
__device__ void load_query(const DenseDecodeParams& params, std::uint32_t q, std::uint32_t barrier, int request,
                           const QueryTile& tile, int head_k) {
  ptx::mbarrier_arrive_expect(barrier,
                              Traits::kNumSharedQueryChunks * params.tiling.rows_per_tile() * Traits::kRowBytes);
  for (int i = 0; i < Traits::kNumSharedQueryChunks; ++i) {
    load_query_chunk<Traits>(params, q + i * Traits::kRows * Traits::kRowBytes, barrier, Traits::shared_query_chunk(i),
                             request, tile, head_k);
  }
}

/// Zeroes the rows of Q that no query fills, which costs the tensor cores less power than what lay there.
template <class Traits>
__device__ void clear_query_padding(const DenseDecodeParams& params, std::uint32_t q, int thread, int num_threads) {
  constexpr int kVectorBytes = sizeof(uint4);
  constexpr int kVectors = Traits::kRows * Traits::kRowBytes / kVectorBytes;
  const int first = params.tiling.rows_per_tile() * Traits::kRowBytes / kVectorBytes;
  if (first == kVectors) return;
  for (int i = first + thread; i < kVectors; i += num_threads) {
    for (int chunk = 0; chunk < Traits::kNumSharedQueryChunks; ++chunk) {
      ptx::store_shared_v4(q + (chunk * kVectors + i) * kVectorBytes, 0, 0, 0, 0);
    }
  }
  ptx::fence_proxy_async();
}

/// Whether the request is known without a plan: its Q is then asked for before there is one, so that it is out of KV's
/// way.
template <PlanSource kPlanSource>
constexpr bool kHasKnownQuery = kPlanSource == PlanSource::kLoneRequest;

}  // namespace flash_mla::sm90

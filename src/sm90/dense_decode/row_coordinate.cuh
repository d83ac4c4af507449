#pragma once

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/query_tiling.h"

namespace flash_mla::sm90 {

/// Which query and head a row of a tile is, and whether it is one.
struct RowCoordinate {
  int query;
  int head;  // of num_heads_q, or -1 for padding

  __device__ RowCoordinate(const DenseDecodeParams& params, const QueryTile& tile, int head_k, int row) {
    const QueryTiling& tiling = params.tiling;
    const int query_in_tile = row / tiling.heads_per_tile;
    const int head_in_group = tile.head + row % tiling.heads_per_tile;
    query = tile.query + query_in_tile;
    const bool is_valid =
        query_in_tile < tiling.queries_per_tile && query < params.seqlen_q && head_in_group < tiling.group_size;
    head = is_valid ? head_k * tiling.group_size + head_in_group : -1;
  }
  __device__ bool is_valid() const { return head >= 0; }
  /// Tokens of the request that the row sees.
  __device__ int limit(const DenseDecodeParams& params, int seqlen_k) const {
    return params.causal ? min(seqlen_k - params.seqlen_q + query + 1, seqlen_k) : seqlen_k;
  }
};

/// Notes which query and head each row of a tile is. By a warpgroup, while the plan is made.
template <class Traits>
__device__ __forceinline__ void init_rows(const DenseDecodeParams& params, RowCoordinate (&rows)[Traits::kRows],
                                          const QueryTile& tile, int head_k) {
  const int row = threadIdx.x % Traits::kWarpgroupThreads;
  if (row < Traits::kRows) rows[row] = RowCoordinate(params, tile, head_k, row);
}

}  // namespace flash_mla::sm90

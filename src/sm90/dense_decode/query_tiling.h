#pragma once

#include "scheduler/split_plan.h"

namespace flash_mla::sm90 {

/// Query rows of a tile: M of the matrix multiplies.
constexpr int kBlockM = 64;

/// Query rows up to which tokens are M, and query rows N.
constexpr int kMaxNarrowRows = 32;

/// How the query rows that share a KV head (seqlen_q queries of group_size heads) are laid out in tiles of kBlockM
/// rows. A tile's row is query * heads_per_tile + head. Up to 64 heads, a tile holds as many whole queries as fit;
/// above, a query takes head_tiles tiles.
struct QueryTiling {
  int group_size;        // num_heads_q / num_heads_k
  int heads_per_tile;    // min(group_size, kBlockM)
  int queries_per_tile;  // 1 where a query takes more than one tile
  int head_tiles;
  int num_tiles;

  FLASH_MLA_HOST_DEVICE static QueryTiling make(int group_size, int seqlen_q) {
    QueryTiling tiling;
    tiling.group_size = group_size;
    tiling.heads_per_tile = group_size < kBlockM ? group_size : kBlockM;
    const int fit = kBlockM / tiling.heads_per_tile;
    tiling.queries_per_tile = fit < seqlen_q ? fit : seqlen_q;
    tiling.head_tiles = (group_size + kBlockM - 1) / kBlockM;
    tiling.num_tiles = tiling.head_tiles * ((seqlen_q + tiling.queries_per_tile - 1) / tiling.queries_per_tile);
    return tiling;
  }
  /// Rows of a tile that are loaded; the rest of kBlockM is padding.
  FLASH_MLA_HOST_DEVICE int rows_per_tile() const { return heads_per_tile * queries_per_tile; }
  /// Whether the kernel that has tokens as M takes it.
  FLASH_MLA_HOST_DEVICE bool is_narrow() const { return num_tiles == 1 && rows_per_tile() <= kMaxNarrowRows; }
  /// Rows of a tile in the kernel that takes it.
  FLASH_MLA_HOST_DEVICE int padded_rows() const {
    return !is_narrow() ? kBlockM : rows_per_tile() <= kMaxNarrowRows / 2 ? kMaxNarrowRows / 2 : kMaxNarrowRows;
  }
};

/// One tile: its first query, and its first head within the group.
struct QueryTile {
  int idx;
  int query;
  int head;

  FLASH_MLA_HOST_DEVICE QueryTile(const QueryTiling& tiling, int tile_idx)
      : idx(tile_idx),
        query(tile_idx / tiling.head_tiles * tiling.queries_per_tile),
        head(tile_idx % tiling.head_tiles * kBlockM) {}

  /// Its number among the tiles of all KV heads.
  FLASH_MLA_HOST_DEVICE int index(const QueryTiling& tiling, int head_k) const {
    return head_k * tiling.num_tiles + idx;
  }
};

}  // namespace flash_mla::sm90

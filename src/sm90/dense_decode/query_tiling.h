#pragma once

#include <cstdint>

#include "scheduler/split_plan.h"

namespace flash_mla::sm90 {

/// Query rows of a tile at most: M of the matrix multiplies.
constexpr int kBlockM = 64;

/// Query rows of a tile up to which tokens are M, and query rows N.
constexpr int kMaxNarrowRows = 32;
constexpr int kMinTileRows = 16;

/// How the query rows that share a KV head (seqlen_q queries of group_size heads) are laid out in tiles. A tile's row
/// is query * heads_per_tile + head. A tile holds as many whole queries as fit; where none does, a query takes
/// head_tiles tiles.
struct QueryTiling {
  int group_size;        // num_heads_q / num_heads_k
  int rows;              // of a tile in the kernel that takes it, padding included: 16, 32 or 64
  int heads_per_tile;    // min(group_size, rows)
  int queries_per_tile;  // 1 where a query takes more than one tile
  int head_tiles;
  int num_tiles;

  /// Of at most `max_rows` rows a tile; there is a query at least.
  FLASH_MLA_HOST_DEVICE static QueryTiling make(int group_size, int seqlen_q, int max_rows = kBlockM) {
    QueryTiling tiling;
    tiling.group_size = group_size;
    tiling.rows = max_rows;
    while (tiling.rows > kMinTileRows && static_cast<std::int64_t>(group_size) * seqlen_q <= tiling.rows / 2) {
      tiling.rows /= 2;
    }
    tiling.heads_per_tile = group_size < tiling.rows ? group_size : tiling.rows;
    const int fit = tiling.rows / tiling.heads_per_tile;
    tiling.queries_per_tile = fit < seqlen_q ? fit : seqlen_q;
    tiling.head_tiles = 1 + (group_size - 1) / tiling.rows;  // rounded up, as the next
    tiling.num_tiles = tiling.head_tiles * (1 + (seqlen_q - 1) / tiling.queries_per_tile);
    return tiling;
  }
  /// Rows of a tile that are loaded; the others are padding.
  FLASH_MLA_HOST_DEVICE int rows_per_tile() const { return heads_per_tile * queries_per_tile; }
  /// Whether the kernel that has tokens as M takes it.
  FLASH_MLA_HOST_DEVICE bool is_narrow() const { return rows <= kMaxNarrowRows; }
};

/// One tile: its first query, and its first head within the group.
struct QueryTile {
  int idx;
  int query;
  int head;

  FLASH_MLA_HOST_DEVICE QueryTile(const QueryTiling& tiling, int tile_idx)
      : idx(tile_idx), query(0), head(tile_idx * tiling.rows) {
    if (tiling.num_tiles == tiling.head_tiles) return;  // divisions are 60 instructions before the first copy
    query = tile_idx / tiling.head_tiles * tiling.queries_per_tile;
    head = tile_idx % tiling.head_tiles * tiling.rows;
  }

  /// Its number among the tiles of all KV heads.
  FLASH_MLA_HOST_DEVICE int index(const QueryTiling& tiling, int head_k) const {
    return head_k * tiling.num_tiles + idx;
  }
};

}  // namespace flash_mla::sm90

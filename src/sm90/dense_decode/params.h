#pragma once

#include <cuda.h>

#include <cstdint>

#include "flash_mla/dense_decode.h"
#include "scheduler/split_plan.h"
#include "sm90/dense_decode/query_tiling.h"

namespace flash_mla::sm90 {

/// CTAs of a cluster that work a request: powers of 2, up to what every GPU can place and a chunk of O for each.
constexpr int kMinClusterSize = 2;
constexpr int kMaxClusterSize = 8;
/// KV blocks of such a CTA at most: one for each slot of the ring.
constexpr int kClusterBlocksPerCta = 2;

/// Words of a part for each tile of query rows and each KV head: see TileFlags in split_group.cuh.
constexpr int kWordsPerPart = 5;

/// Consumer warpgroups of a CTA. Each has half of O's columns, in tiles of any number of rows.
constexpr int kNumConsumers = 2;

/// What a piece of a split request leaves for a tile: O, in float16 for tiles of 64 rows and else in float32, and a
/// total for each row of each consumer. slot.cuh draws it.
constexpr int kTotalBytes = 16;
constexpr int kSlotAlignment = 128;  // lines, as a warp stores them, where the workspace begins at one
constexpr int slot_bytes(int rows) {
  const int value_bytes = static_cast<int>(rows == kBlockM ? sizeof(std::uint16_t) : sizeof(float));
  return rows * kHeadDimV * value_bytes + rows * kNumConsumers * kTotalBytes;
}

/// What the kernel takes, by value. Strides in elements.
struct DenseDecodeParams {
  CUtensorMap q_map;        // (576, num_heads_q, seqlen_q, batch), box (64, heads_per_tile, queries_per_tile, 1)
  CUtensorMap k_cache_map;  // (576, page_size, num_heads_k, num_pages), box (64, box_tokens, 1, 1)

  int batch_size;
  int seqlen_q;
  int num_heads_k;
  QueryTiling tiling;

  int page_size_log2;
  /// Where a token lies in its page.
  FLASH_MLA_HOST_DEVICE int in_page(int token) const { return token & ((1 << page_size_log2) - 1); }
  int box_tokens;    // a power of two, at most page_size and 64
  int max_seqlen_k;  // max_pages * page_size: lengths are cut there
  const int* block_table;
  std::int64_t stride_block_table;
  const int* cache_seqlens;

  /// Whether several tiles read the same KV, in parts that are long if requests are as long as the block table has room
  /// for.
  bool shares_kv;

  /// Whether a block takes memory longer than the tensor cores, as all SMs ask at the same time. Tiles of 64 rows then
  /// give back the memory of KV as soon as they can.
  bool waits_for_memory;

  /// CTAs that work a request and a tile together, as a cluster, without a plan; 0: there is a plan.
  int cluster_size;

  const scheduler::Part* parts;  // (num_parts,), or null: planned in the kernel, as one request always is, or no plan
  int num_parts;
  scheduler::QueryTiles tiles;  // what a plan that is made here depends on

  float softmax_scale_log2;  // the softmax's scale times log2(e)
  bool causal;

  void* out;  // (batch, seqlen_q, num_heads_q, 512)
  std::int64_t stride_out_batch, stride_out_query, stride_out_head;
  float* lse;  // (batch, num_heads_q, seqlen_q)
  std::int64_t stride_lse_batch, stride_lse_head, stride_lse_query;

  // Results of pieces of split requests, two slots a part: 2 * part for a piece that continues a request, 2 * part + 1
  // for one that begins it.
  unsigned char* slots;  // (2 * num_parts, num_heads_k, num_tiles, slot_bytes(tiling.rows))
  std::uint64_t* flags;  // (num_heads_k, num_tiles, kWordsPerPart * num_parts); contents arbitrary at the start
  std::uint64_t token;   // unique to this launch; its low 56 bits, which totals hold, are never 0
};

}  // namespace flash_mla::sm90

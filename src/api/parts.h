#pragma once

#include <algorithm>
#include <cstdint>

#include "scheduler/split_plan.h"
#include "sm90/dense_decode/query_tiling.h"

namespace flash_mla {

/// The SMs of a whole GH100 die, of which every Hopper GPU has some switched off.
constexpr int kMaxSms = 144;

/// The number of parts that keep `num_sms` SMs busy once: see dense_decode_num_sm_parts.
constexpr std::int64_t num_sm_parts(int num_sms, std::int64_t num_q_tokens_per_head_k, std::int64_t num_heads_k) {
  const std::int64_t num_tiles = (num_q_tokens_per_head_k - 1) / sm90::kBlockM + 1;
  return std::max<std::int64_t>(num_sms / num_heads_k / num_tiles, 1);
}

/// What query rows of a KV head fill.
constexpr scheduler::QueryTiles query_tiles(std::int64_t num_q_tokens_per_head_k) {
  if (num_q_tokens_per_head_k <= sm90::kMinTileRows) return scheduler::QueryTiles::k16Rows;
  if (num_q_tokens_per_head_k <= sm90::kMaxNarrowRows) return scheduler::QueryTiles::k32Rows;
  return num_q_tokens_per_head_k <= sm90::kBlockM ? scheduler::QueryTiles::k64Rows : scheduler::QueryTiles::kSeveral;
}

}  // namespace flash_mla

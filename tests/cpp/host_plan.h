#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "scheduler/plan.h"

// The host's plan of lengths, which tests of the scheduler look at.

namespace flash_mla::scheduler {

struct Plan {
  std::vector<Part> parts;
  std::vector<std::int32_t> num_splits;
};

inline Plan make_plan(const std::vector<std::int32_t>& seqlens, int num_parts, QueryTiles tiles = QueryTiles::k64Rows) {
  constexpr std::int32_t kUnwritten = -12345;
  Plan plan;
  plan.parts.resize(num_parts, Part{kUnwritten, kUnwritten, kUnwritten, kUnwritten, kUnwritten, kUnwritten, {}});
  plan.num_splits.resize(seqlens.size() + 1, kUnwritten);
  plan_on_host({seqlens.data(), static_cast<std::int32_t>(seqlens.size()), num_parts, tiles, plan.parts.data(),
                plan.num_splits.data()});
  return plan;
}

}  // namespace flash_mla::scheduler

#pragma once

#include <cstdint>

#include "scheduler/split_plan.h"

struct CUstream_st;

namespace flash_mla::scheduler {

/// What planning reads and writes; all arrays contiguous.
struct PlanArguments {
  const std::int32_t* cache_seqlens;  // (batch_size,)
  std::int32_t batch_size;
  std::int32_t num_parts;
  QueryTiles tiles;          // of the calls
  Part* parts;               // (num_parts,)
  std::int32_t* num_splits;  // (batch_size + 1,), or null where nobody asks for it
};

/// Plans on the calling thread, on host memory.
void plan_on_host(const PlanArguments& args);

/// Plans on the device, ordered on `stream`: by one CTA, or, where plans_within_a_warp, by a warp for each part.
void plan_on_device(const PlanArguments& args, CUstream_st* stream);

}  // namespace flash_mla::scheduler

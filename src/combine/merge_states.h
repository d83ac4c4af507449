#pragma once

#include "api/check_merge_states.h"
#include "flash_mla/merge_states.h"

namespace flash_mla::combine {

/// Merges states on the current device: one launch on `stream`. `shape` is what check_merge_states returned for `args`,
/// and has rows.
void launch_merge_states(const MergeStatesArguments& args, const MergeStatesShape& shape, CUstream_st* stream);

}  // namespace flash_mla::combine

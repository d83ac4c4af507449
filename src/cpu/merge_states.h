#pragma once

#include "api/check_merge_states.h"
#include "flash_mla/merge_states.h"

namespace flash_mla::cpu {

/// Merges states on CPU memory, on up to FLASH_MLA_NUM_THREADS threads (default: all cores); done when it returns.
/// `shape` is what check_merge_states returned for `args`.
void merge_states(const MergeStatesArguments& args, const MergeStatesShape& shape);

}  // namespace flash_mla::cpu

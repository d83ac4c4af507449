#pragma once

#include <cstdint>

#include "flash_mla/merge_states.h"

namespace flash_mla {

/// Extents of a validated merge.
struct MergeStatesShape {
  std::int64_t num_states;
  std::int64_t batch_size;
  std::int64_t seqlen_q;
  std::int64_t num_heads_q;

  /// Below 2^31.
  std::int64_t num_rows() const { return batch_size * seqlen_q * num_heads_q; }
};

/// Checks everything about a call that can be known without reading its arrays. Strides of extent-1 dimensions, and all
/// strides of empty tensors, are not looked at and may hold anything.
/// @throws InvalidArgument, InvalidType
MergeStatesShape check_merge_states(const MergeStatesArguments& args);

}  // namespace flash_mla

#pragma once

#include <cstdint>

#include "flash_mla/flash_mla.h"

// A stand-in for the model: what its projections would give for a token is a function of the request, the layer and the
// token's position, so that every result can be computed again from these three.
namespace server::model {

constexpr int kNumLayers = 3;
constexpr int kNumHeads = 16;  // of 128, on one of 8 GPUs
constexpr int kQuerySize = kNumHeads * flash_mla::kHeadDimQk;
constexpr int kOutSize = kNumHeads * flash_mla::kHeadDimV;

/// Which token of which layer.
struct Place {
  int request;
  int layer;
  int position;
};

/// The token's latent, 576 bfloat16 values: what goes into the cache.
void write_latent(const Place& place, std::uint16_t* latent);

/// The token's queries, (kNumHeads, 576) bfloat16.
void write_query(const Place& place, std::uint16_t* query);

/// Whether `out` (kNumHeads, 512) and `lse` (kNumHeads,) are attention of this token over itself and all before it:
/// written out in double, without pages, cache or batch.
bool is_attention(const Place& place, const std::uint16_t* out, const float* lse);

}  // namespace server::model

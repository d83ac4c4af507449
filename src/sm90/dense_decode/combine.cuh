#pragma once

#include <cmath>
#include <cstdint>

#include "sm90/dense_decode/epilogue.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/primitives/fragment.cuh"
#include "sm90/ptx/math.cuh"
#include "sm90/ptx/memory.cuh"

// Merging the pieces of a split request, in CTAs of the same grid that come behind those that compute them: a CTA waits
// only for CTAs of lower index, which are running or done, so any number of SMs and any number of concurrent launches
// make progress.

namespace flash_mla::sm90 {

/// The flags of one tile of one KV head. A flag holds the launch's token once its piece is in the workspace. Tokens are
/// unique among launches, but a replayed graph launches with the same one again: so the last reader of a request's
/// flags clears them.
struct TileFlags {
  std::uint64_t* flags;    // (2 * num_parts,): one for each slot
  std::uint64_t* readers;  // (num_parts,): CTAs that have seen all flags of the request that the part begins

  __device__ TileFlags(const DenseDecodeParams& params, int tile_idx, int head_k) {
    const std::int64_t tile = static_cast<std::int64_t>(head_k) * params.tiling.num_tiles + tile_idx;
    flags = params.flags + tile * kFlagsPerPart * params.num_parts;
    readers = flags + 2 * params.num_parts;
  }
  /// By one thread, after all threads of the piece have written and synchronised.
  __device__ void publish(const DenseDecodeParams& params, int slot) const {
    if (slot % 2 == 1) readers[slot / 2] = 0;  // a slot of a first piece
    ptx::store_release(&flags[slot], params.token);
  }
};

/// A split request: its pieces lie in consecutive parts.
struct SplitRequest {
  int request;
  int first_part;
  int num_pieces;

  __device__ SplitRequest(const DenseDecodeParams& params, int first_part_idx)
      : request(params.parts[first_part_idx].end_request),
        first_part(first_part_idx),
        num_pieces(params.parts[first_part_idx].num_pieces) {}
  __device__ int slot(int piece) const { return 2 * (first_part + piece) + (piece == 0 ? 1 : 0); }
};

/// Writes one slice of a split request's rows: a unit is 128 columns of a row, a float4 for each lane of a warp.
template <class Traits>
class Combine {
  using Element = typename Traits::Element;
  static constexpr int kColumnsPerUnit = 128;
  static constexpr int kUnitsPerRow = kHeadDimV / kColumnsPerUnit;
  static constexpr int kWarps = Traits::kNumThreads / 32;
  /// float4 loads that a warp has in flight.
  static constexpr int kLoads = 16;
  static constexpr float kLn2 = 0.693147180559945309417F;

 public:
  __device__ Combine(const DenseDecodeParams& params, const QueryTile& tile, int tile_idx, int head_k)
      : params_(params), tile_(tile), head_k_(head_k), flags_(params, tile_idx, head_k) {}

  /// The slices of this part: of the request that it continues, and of the one that it begins and does not end.
  __device__ void run(int part_idx) const {
    const scheduler::Part part = params_.parts[part_idx];
    if (part.begin_request > part.end_request) return;
    const bool continues = part.begin_block > 0 && part.first_part >= 0 && part.first_part < part_idx;
    const bool begins = part.num_pieces > 1 && (part.end_request > part.begin_request || part.begin_block == 0);
#pragma unroll 1
    for (int begun = continues ? 0 : 1; begun <= (begins ? 1 : 0); ++begun) {
      const SplitRequest split(params_, begun ? part_idx : part.first_part);
      const int slice = part_idx - split.first_part;
      if (slice < split.num_pieces && wait_for_pieces(split)) merge_slice(split, slice);
    }
  }

 private:
  __device__ void merge_slice(const SplitRequest& split, int slice) const {
    const int num_units = params_.tiling.rows_per_tile() * kUnitsPerRow;
    const int begin = num_units * slice / split.num_pieces;
    const int end = num_units * (slice + 1) / split.num_pieces;
    if (split.num_pieces <= 2) {
      merge<2>(split, begin, end);
    } else {
      merge<kLoads>(split, begin, end);
    }
  }

  /// False where the plan contradicts itself, so that not all pieces will come.
  __device__ bool wait_for_pieces(const SplitRequest& split) const {
    const scheduler::Part first = params_.parts[split.first_part];
    const bool in_range =
        split.request >= 0 && split.request < params_.batch_size &&
        split.num_pieces <= params_.num_parts - split.first_part && first.end_block != scheduler::kToEnd &&
        (first.begin_request < split.request || (first.begin_request == split.request && first.begin_block == 0));
    bool is_piece = true;
    for (int i = 1 + threadIdx.x; in_range && i < split.num_pieces; i += Traits::kNumThreads) {
      const scheduler::Part part = params_.parts[split.first_part + i];
      is_piece &= part.begin_request == split.request && part.end_request >= split.request && part.begin_block > 0;
    }
    if (!__syncthreads_and(in_range && is_piece)) return false;
    for (int i = threadIdx.x; i < split.num_pieces; i += Traits::kNumThreads) {
      while (ptx::load_acquire(&flags_.flags[split.slot(i)]) != params_.token) {
      }
    }
    __syncthreads();
    if (threadIdx.x == 0 && ptx::atomic_add(&flags_.readers[split.first_part], 1) + 1 == split.num_pieces) {
      for (int i = 0; i < split.num_pieces; ++i) flags_.flags[split.slot(i)] = 0;
    }
    return true;
  }

  /// kLoads / kPieces units at a time, kPieces pieces of each at a time. Lane i looks after the weight of piece
  /// i % kPieces of unit i / kPieces.
  template <int kPieces>
  __device__ void merge(const SplitRequest& split, int begin, int end) const {
    constexpr int kUnits = kLoads / kPieces;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = begin + threadIdx.x / 32 * kUnits; first < end; first += kWarps * kUnits) {
      const int my_unit = min(first + lane % kLoads / kPieces, end - 1);
      const int my_row = accum_row(my_unit);
      const float lse = merge_lse<kPieces>(split, my_row);
      float4 sum[kUnits] = {};
#pragma unroll 1
      for (int base = 0; base < split.num_pieces; base += kPieces) {
        const float score = piece_lse(split, base + lane % kPieces, my_row);
        const float weight = score == -INFINITY ? 0.0F : ptx::exp2_approx(score - lse);
        add_pieces<kPieces>(split, base, my_row * kUnitsPerRow + my_unit % kUnitsPerRow, weight, sum);
      }
#pragma unroll
      for (int k = 0; k < kUnits; ++k) {
        const float unit_lse = __shfl_sync(~0U, lse, k * kPieces);
        if (first + k < end) write(split.request, first + k, sum[k], unit_lse);
      }
    }
  }

  /// `my_accum_unit`: where the unit that the lane looks after lies in a slot of out_accum, in units.
  template <int kPieces>
  __device__ __forceinline__ void add_pieces(const SplitRequest& split, int base, int my_accum_unit, float weight,
                                             float4 (&sum)[kLoads / kPieces]) const {
    float4 values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int slot = split.slot(min(base + i % kPieces, split.num_pieces - 1));
      const int accum_unit = __shfl_sync(~0U, my_accum_unit, i);
      const std::int64_t unit = static_cast<std::int64_t>(slot) * num_rows() * kUnitsPerRow + accum_unit;
      values[i] = __ldcg(reinterpret_cast<const float4*>(params_.out_accum) + unit * 32 + threadIdx.x % 32);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float w = __shfl_sync(~0U, weight, i);
      if (w == 0.0F) continue;  // past the last piece, or one that saw no key and wrote no values
      float4& total = sum[i / kPieces];
      total.x += w * values[i].x;
      total.y += w * values[i].y;
      total.z += w * values[i].z;
      total.w += w * values[i].w;
    }
  }

  /// Base-2 log of the sum over all pieces, for the kPieces lanes that look after a unit; -inf where none saw a key.
  template <int kPieces>
  __device__ __forceinline__ float merge_lse(const SplitRequest& split, int row) const {
    const int first = threadIdx.x % kPieces;
    float max = -INFINITY;
#pragma unroll 4
    for (int i = first; i < split.num_pieces; i += kPieces) max = fmaxf(max, piece_lse(split, i, row));
#pragma unroll
    for (int delta = 1; delta < kPieces; delta *= 2) max = fmaxf(max, __shfl_xor_sync(~0U, max, delta));
    float sum = 0.0F;
    for (int i = first; i < split.num_pieces && max > -INFINITY; i += kPieces) {
      sum += exp2f(piece_lse(split, i, row) - max);
    }
#pragma unroll
    for (int delta = 1; delta < kPieces; delta *= 2) sum += __shfl_xor_sync(~0U, sum, delta);
    return max == -INFINITY ? max : max + log2f(sum);
  }

  __device__ float piece_lse(const SplitRequest& split, int piece, int row) const {
    return piece < split.num_pieces
               ? __ldcg(params_.lse_accum + static_cast<std::int64_t>(split.slot(piece)) * num_rows() + row)
               : -INFINITY;
  }

  __device__ void write(int request, int unit, const float4& value, float lse) const {
    const RowCoordinate at = coordinate(unit);
    if (!at.is_valid) return;
    Element* row = static_cast<Element*>(params_.out) + request * params_.stride_out_batch +
                   at.query * params_.stride_out_query + at.head * params_.stride_out_head;
    *reinterpret_cast<uint2*>(row + column(unit)) =
        make_uint2(pack<Element>(value.x, value.y), pack<Element>(value.z, value.w));
    if (unit % kUnitsPerRow == 0 && threadIdx.x % 32 == 0) {
      params_.lse[request * params_.stride_lse_batch + at.head * params_.stride_lse_head +
                  at.query * params_.stride_lse_query] = lse == -INFINITY ? INFINITY : lse * kLn2;
    }
  }

  __device__ RowCoordinate coordinate(int unit) const { return {params_, tile_, head_k_, unit / kUnitsPerRow}; }
  __device__ int column(int unit) const {
    return unit % kUnitsPerRow * kColumnsPerUnit + static_cast<int>(threadIdx.x % 32) * 4;
  }
  __device__ int num_rows() const { return params_.seqlen_q * params_.num_heads_q; }
  /// Rows that are none are read as the first one, and not written.
  __device__ int accum_row(int unit) const {
    const RowCoordinate at = coordinate(unit);
    return at.is_valid ? at.query * params_.num_heads_q + at.head
                       : tile_.query * params_.num_heads_q + head_k_ * params_.tiling.group_size + tile_.head;
  }

  const DenseDecodeParams& params_;
  const QueryTile& tile_;
  const int head_k_;
  const TileFlags flags_;
};

}  // namespace flash_mla::sm90

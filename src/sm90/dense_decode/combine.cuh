#pragma once

#include <cmath>
#include <cstdint>

#include "sm90/dense_decode/epilogue.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/primitives/fragment.cuh"
#include "sm90/primitives/softmax.cuh"
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

/// Writes one slice of a split request's rows. A unit is 128 columns of a row, a float4 for each lane of a warp; where
/// there are fewer units than warps, several warps share the pieces of a unit.
template <class Traits>
class Combine {
  using Element = typename Traits::Element;
  static constexpr int kColumnsPerUnit = 128;
  static constexpr int kUnitsPerRow = kHeadDimV / kColumnsPerUnit;
  static constexpr int kWarps = Traits::kNumThreads / 32;
  /// Pieces that a warp has in flight.
  static constexpr int kBatch = 16;
  static constexpr float kLn2 = 0.693147180559945309417F;

  /// A weighted sum of pieces, and of their weights exp2(lse - max).
  struct Sum {
    float4 values{};
    float max = kNoMax;
    float weight = 0.0F;

    __device__ void add(float factor, const float4& other) {
      values.x = fmaf(factor, other.x, values.x);
      values.y = fmaf(factor, other.y, values.y);
      values.z = fmaf(factor, other.z, values.z);
      values.w = fmaf(factor, other.w, values.w);
    }
    __device__ void raise_max(float new_max) {
      const float factor = ptx::exp2_approx(max - new_max);
      values = {values.x * factor, values.y * factor, values.z * factor, values.w * factor};
      weight *= factor;
      max = new_max;
    }
  };

 public:
  /// What the CTA has in shared memory: a Sum for each lane of each warp.
  static constexpr int kSharedBytes = Traits::kNumThreads * sizeof(Sum);

  __device__ Combine(const DenseDecodeParams& params, const QueryTile& tile, int tile_idx, int head_k, void* shared)
      : params_(params),
        tile_(tile),
        head_k_(head_k),
        flags_(params, tile_idx, head_k),
        shared_(static_cast<Sum*>(shared)) {}

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
    if (split.num_pieces <= 2) return merge_few<2>(split, begin, end);
    if (split.num_pieces <= 4) return merge_few<4>(split, begin, end);
#pragma unroll 1
    for (int first = begin; first < end; first += kWarps) merge_units(split, first, min(end - first, kWarps));
  }

  /// Units of up to kPieces pieces: kBatch / kPieces units of a warp are in flight.
  template <int kPieces>
  __device__ void merge_few(const SplitRequest& split, int begin, int end) const {
    constexpr int kUnits = kBatch / kPieces;
#pragma unroll 1
    for (int first = begin + static_cast<int>(threadIdx.x) / 32 * kUnits; first < end; first += kWarps * kUnits) {
      float4 values[kUnits][kPieces];
      float lse[kUnits][kPieces];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int unit = min(first + u, end - 1);
        const std::int64_t row = accum_row(unit);
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const std::int64_t at = split.slot(min(i, split.num_pieces - 1)) * num_rows() + row;
          values[u][i] = __ldcg(reinterpret_cast<const float4*>(params_.out_accum + at * kHeadDimV + column(unit)));
          lse[u][i] = i < split.num_pieces ? __ldcg(params_.lse_accum + at) : -INFINITY;
        }
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        Sum sum;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) sum.max = fmaxf(sum.max, lse[u][i]);
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const float weight = ptx::exp2_approx(lse[u][i] - sum.max);
          sum.weight += weight;
          if (weight != 0.0F) sum.add(weight, values[u][i]);
        }
        if (first + u < end) write(split.request, first + u, sum);
      }
    }
  }

  /// `count` units, kWarps at most. The warps that share a unit meet in shared memory.
  __device__ void merge_units(const SplitRequest& split, int first, int count) const {
    const int warp = threadIdx.x / 32;
    const int num_groups = kWarps / count;
    const int group = warp / count;
    const int unit = first + warp % count;
    Sum sum;
    if (group < num_groups) {
      sum = add_pieces(split, unit, split.num_pieces * group / num_groups, split.num_pieces * (group + 1) / num_groups);
    }
    if (num_groups > 1) {
      shared_[threadIdx.x] = sum;
      __syncthreads();
      for (int i = 1; i < num_groups && group == 0; ++i) {
        const Sum& other = shared_[threadIdx.x + i * count * 32];
        sum.raise_max(fmaxf(sum.max, other.max));
        const float factor = ptx::exp2_approx(other.max - sum.max);
        sum.add(factor, other.values);
        sum.weight += factor * other.weight;
      }
      __syncthreads();
    }
    if (group == 0) write(split.request, unit, sum);
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

  /// Pieces `begin` to `end` of a unit. Lane i looks after the weight of piece i of a batch.
  __device__ __forceinline__ Sum add_pieces(const SplitRequest& split, int unit, int begin, int end) const {
    const int lane = threadIdx.x % 32;
    const std::int64_t row = accum_row(unit);
    const float4* values =
        reinterpret_cast<const float4*>(params_.out_accum) + row * (kHeadDimV / 4) + column(unit) / 4;
    Sum sum;
#pragma unroll 1
    for (int base = begin; base < end; base += kBatch) {
      float4 batch[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        batch[i] = __ldcg(values + split.slot(min(base + i, end - 1)) * num_rows() * (kHeadDimV / 4));
      }
      const bool has_piece = lane < kBatch && base + lane < end;
      const float lse = has_piece ? __ldcg(params_.lse_accum + split.slot(base + lane) * num_rows() + row) : -INFINITY;
      sum.raise_max(fmaxf(sum.max, warp_reduce_max(lse)));
      const float weight = ptx::exp2_approx(lse - sum.max);
      sum.weight += warp_reduce_sum(weight);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float w = __shfl_sync(~0U, weight, i);
        if (w != 0.0F) sum.add(w, batch[i]);  // 0: past the last piece, or one that saw no key and wrote no values
      }
    }
    return sum;
  }

  __device__ void write(int request, int unit, const Sum& sum) const {
    const RowCoordinate at = coordinate(unit);
    if (!at.is_valid) return;
    const float inverse = inverse_sum(sum.weight);
    Element* row = static_cast<Element*>(params_.out) + request * params_.stride_out_batch +
                   at.query * params_.stride_out_query + at.head * params_.stride_out_head;
    *reinterpret_cast<uint2*>(row + column(unit)) =
        make_uint2(pack<Element>(sum.values.x * inverse, sum.values.y * inverse),
                   pack<Element>(sum.values.z * inverse, sum.values.w * inverse));
    if (unit % kUnitsPerRow == 0 && threadIdx.x % 32 == 0) {
      params_.lse[request * params_.stride_lse_batch + at.head * params_.stride_lse_head +
                  at.query * params_.stride_lse_query] =
          sum.weight == 0.0F ? INFINITY : (sum.max + log2f(sum.weight)) * kLn2;
    }
  }

  __device__ RowCoordinate coordinate(int unit) const { return {params_, tile_, head_k_, unit / kUnitsPerRow}; }
  __device__ int column(int unit) const {
    return unit % kUnitsPerRow * kColumnsPerUnit + static_cast<int>(threadIdx.x % 32) * 4;
  }
  __device__ std::int64_t num_rows() const { return static_cast<std::int64_t>(params_.seqlen_q) * params_.num_heads_q; }
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
  Sum* const shared_;
};

}  // namespace flash_mla::sm90

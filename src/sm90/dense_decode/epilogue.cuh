#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/row_coordinate.cuh"
#include "sm90/dense_decode/slice_memory.cuh"
#include "sm90/dense_decode/slot.cuh"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/primitives/fragment.cuh"

namespace flash_mla::sm90 {

/// What the sums of P are divided out with. No key: 0; NaN stays.
__device__ __forceinline__ float inverse_sum(float row_sum) {
  return row_sum > 0.0F ? 1.0F / row_sum : row_sum == 0.0F ? 0.0F : row_sum;
}

/// `max` in base 2.
__device__ __forceinline__ float log_sum_exp(float max, float sum) {
  constexpr float kLn2 = 0.693147180559945309417F;
  return sum == 0.0F ? INFINITY : (max + log2f(sum)) * kLn2;
}

/// Where a request's results go.
template <class Element>
struct FinalOutput {
  const DenseDecodeParams& params;
  int request;

  __device__ Element* row(const RowCoordinate& at) const {
    return static_cast<Element*>(params.out) + request * params.stride_out_batch + at.query * params.stride_out_query +
           at.head * params.stride_out_head;
  }
  __device__ float* lse(const RowCoordinate& at) const {
    return params.lse + request * params.stride_lse_batch + at.head * params.stride_lse_head +
           at.query * params.stride_lse_query;
  }
  /// `max` in base 2.
  __device__ void write_lse(const RowCoordinate& at, float max, float sum) const { *lse(at) = log_sum_exp(max, sum); }
};

/// Writes a consumer warpgroup's columns of O of a whole request.
template <class Traits>
class Epilogue {
  using Element = typename Traits::Element;

 public:
  __device__ Epilogue(const DenseDecodeParams& params, const Piece& piece, int warpgroup)
      : params_(params), piece_(piece), first_column_(warpgroup * Traits::kColumnsPerConsumer) {}

  /// Half `half` of the columns. `rows`: the thread's are the first and the one 8 further. Sums are over all columns of
  /// both warpgroups.
  __device__ __forceinline__ void write(const RowCoordinate* rows, int half, const float (&o)[64],
                                        const float (&row_sum)[kRowsPerThread]) const {
    write_row<0>(rows[0], half, o, row_sum[0]);
    write_row<1>(rows[8], half, o, row_sum[1]);
  }
  /// Both consumers call it, and the first one writes.
  __device__ __forceinline__ void write_lse(const RowCoordinate* rows, const float (&row_max)[kRowsPerThread],
                                            const float (&row_sum)[kRowsPerThread]) const {
    if (first_column_ != 0 || threadIdx.x % 4 != 0) return;
    const FinalOutput<Element> output{params_, piece_.request};
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      if (rows[8 * r].is_valid()) output.write_lse(rows[8 * r], row_max[r], row_sum[r]);
    }
  }

 private:
  /// 32 columns at a time, transposed so that each thread stores 16 bytes.
  template <int kRow>
  __device__ __forceinline__ void write_row(const RowCoordinate& at, int half, const float (&o)[64],
                                            float row_sum) const {
    const float inverse = inverse_sum(row_sum);
    Element* const row = FinalOutput<Element>{params_, piece_.request}.row(at) + first_column_ + half * 128;
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      std::uint32_t packed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 4 * (4 * group + j) + 2 * kRow;
        packed[j] = pack<Element>(o[i] * inverse, o[i + 1] * inverse);
      }
      transpose_quad(packed);
      if (at.is_valid()) {
        *reinterpret_cast<uint4*>(row + 32 * group + threadIdx.x % 4 * 8) =
            make_uint4(packed[0], packed[1], packed[2], packed[3]);
      }
    }
  }

  const DenseDecodeParams& params_;
  const Piece& piece_;
  const int first_column_;
};

/// Writes a consumer warpgroup's columns of O of a part of a request, not normalised, and the rows' totals. The first
/// half of the columns while PV of the last block goes on with the second: it takes the scale that it needs, and some
/// room for larger values of the second half. (What has overflowed to infinity there gets the largest scale.)
template <class Traits>
class PartialEpilogue {
 public:
  /// `tile` counts those of all KV heads.
  __device__ PartialEpilogue(const DenseDecodeParams& params, const Piece& piece, int tile, int warpgroup)
      : params_(params), piece_(piece), tile_(tile), warpgroup_(warpgroup) {}

  /// The piece stays in this memory, which is shared, where merging reads it. Before anything is written.
  __device__ __forceinline__ void keep(unsigned char* memory) { kept_ = memory; }

  __device__ __forceinline__ void write_first_half(const float (&o)[64]) {
    float largest[kRowsPerThread];
    find_largest(o, largest);
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) scale_[r] = RowScale(fminf(kRoom * largest[r], FLT_MAX));
    write_half(o, 0);
  }

  /// The second half, and the totals. The first half again, where the second needs a larger scale.
  __device__ __forceinline__ void write_rest(const float (&o)[2][64], const float (&row_max)[kRowsPerThread],
                                             const float (&row_sum)[kRowsPerThread]) {
    float largest[kRowsPerThread];
    find_largest(o[1], largest);
    if (!__all_sync(~0U, scale_[0].fits(largest[0]) && scale_[1].fits(largest[1]))) {
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        if (!scale_[r].fits(largest[r])) scale_[r] = RowScale(largest[r]);
      }
      write_half(o[0], 0);
    }
    if (threadIdx.x % 4 == 0) {
      const int row = fresh_fragment_row();
      const SlotTile<Traits> slot(params_, piece_.slot, tile_);
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        const Total total{row_max[r], row_sum[r], scale_[r].scale()};
        const int at = unit(row, r) * Traits::kRowsOfUnit + row % Traits::kRowsOfUnit;
        if (kept_ != nullptr) {
          SliceMemory<Traits>::of_two_pieces(kept_).totals[2 * at] =
              make_float4(total.max, total.sum, total.scale, 0.0F);
        } else {
          total.announce(slot.totals(0) + at, params_.token);
        }
      }
    }
    __syncwarp();
    write_half(o[1], 1);
  }

 private:
  static constexpr float kRoom = 16.0F;

  /// The unit of the thread's row number `r`, of which `first_row` is the first.
  __device__ __forceinline__ int unit(int first_row, int r) const {
    return SlotTile<Traits>::unit(first_row, warpgroup_) + r * (8 / Traits::kRowsOfUnit * Traits::kNumConsumers);
  }

  /// The largest magnitudes of the thread's rows.
  __device__ __forceinline__ static void find_largest(const float (&o)[64], float (&largest)[kRowsPerThread]) {
    largest[0] = largest[1] = 0.0F;
#pragma unroll
    for (int i = 0; i < 64; ++i) largest[row_of(i)] = fmaxf(largest[row_of(i)], fabsf(o[i]));
    largest[0] = row_reduce_max(largest[0]);
    largest[1] = row_reduce_max(largest[1]);
  }

  __device__ __forceinline__ void write_half(const float (&o)[64], int half) const {
    const int row = fresh_fragment_row();
    const SlotTile<Traits> slot(params_, piece_.slot, tile_);
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      // The threads of two rows in turn.
      unsigned char* const values =
          kept_ != nullptr ? kept_ + unit(row, r) * slot.kUnitBytes : slot.values(unit(row, r));
      auto* const to = reinterpret_cast<uint4*>(values) + half * 32 + threadIdx.x % 8;
#pragma unroll
      for (int i = 0; i < 64; i += 16) {
        std::uint32_t packed[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float* const v = &o[i + 4 * k + 2 * r];
          packed[k] = pack<__half>(v[0] * scale_[r].inverse, v[1] * scale_[r].inverse);
        }
        to[i / 2] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
      }
    }
  }

  const DenseDecodeParams& params_;
  const Piece& piece_;
  const int tile_;
  const int warpgroup_;
  unsigned char* kept_ = nullptr;
  RowScale scale_[kRowsPerThread] = {RowScale(0.0F), RowScale(0.0F)};
};

}  // namespace flash_mla::sm90

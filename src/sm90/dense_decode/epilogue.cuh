#pragma once

#include <cmath>
#include <cstdint>

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/row_coordinate.cuh"
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

/// Writes a consumer warpgroup's columns of O.
template <class Traits>
class Epilogue {
  using Element = typename Traits::Element;

 public:
  __device__ Epilogue(const DenseDecodeParams& params, const Piece& piece, int warpgroup)
      : params_(params), piece_(piece), first_column_(warpgroup * Traits::kColumnsPerConsumer) {}

  /// One of the thread's rows of a whole piece: its values of O, its maximum, and the sum over all columns of both
  /// warpgroups.
  template <int kRow>
  __device__ __forceinline__ void write_final(const RowCoordinate& at, const float (&o)[2][64], float row_max,
                                              float row_sum) const {
    const FinalOutput<Element> output{params_, piece_.request};
    const float inverse = inverse_sum(row_sum);
    Element* const row = output.row(at) + first_column_;
#pragma unroll
    for (int half = 0; half < 2; ++half) write_half<kRow>(row + half * 128, at.is_valid(), o[half], inverse);
    if (first_column_ == 0 && at.is_valid() && threadIdx.x % 4 == 0) {
      output.write_lse(at, row_max, row_sum);
    }
  }

  /// All of another piece, totals first. `tile` counts those of all KV heads.
  __device__ __forceinline__ void write_partial(const float (&o)[2][64], const float (&row_max)[2],
                                                const float (&row_sum)[2], int tile) const {
    const SlotTile<Traits> slot(params_, piece_.slot, tile);
    float largest[2] = {0.0F, 0.0F};
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      largest[row_of(i)] = fmaxf(largest[row_of(i)], fmaxf(fabsf(o[0][i]), fabsf(o[1][i])));
    }
    const RowScale scale[2] = {RowScale(row_reduce_max(largest[0])), RowScale(row_reduce_max(largest[1]))};
    const int consumer = first_column_ / Traits::kColumnsPerConsumer;
    const int row = fresh_fragment_row();
    const int unit = slot.unit(row, consumer);
    constexpr int kUnitsBetween = 8 / Traits::kRowsOfUnit * Traits::kNumConsumers;  // the thread's rows
    if (threadIdx.x % 4 == 0) {
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        const Total total{row_max[r], row_sum[r], scale[r].scale};
        total.announce(slot.totals(unit + r * kUnitsBetween) + row % Traits::kRowsOfUnit, params_.token);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      // The threads of two rows in turn.
      auto* const to = reinterpret_cast<uint4*>(slot.values(unit + r * kUnitsBetween)) + threadIdx.x % 8;
#pragma unroll
      for (int i = 0; i < 128; i += 16) {
        std::uint32_t packed[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float* const v = &o[i / 64][i % 64 + 4 * k + 2 * r];
          packed[k] = pack<__half>(v[0] * scale[r].inverse, v[1] * scale[r].inverse);
        }
        to[i / 2] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
      }
    }
  }

 private:
  /// 32 columns at a time, transposed so that each thread stores 16 bytes.
  template <int kRow>
  __device__ __forceinline__ static void write_half(Element* row, bool is_valid, const float (&o)[64], float inverse) {
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      std::uint32_t packed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 4 * (4 * group + j) + 2 * kRow;
        packed[j] = pack<Element>(o[i] * inverse, o[i + 1] * inverse);
      }
      transpose_quad(packed);
      if (is_valid) {
        *reinterpret_cast<uint4*>(row + 32 * group + threadIdx.x % 4 * 8) =
            make_uint4(packed[0], packed[1], packed[2], packed[3]);
      }
    }
  }

  const DenseDecodeParams& params_;
  const Piece& piece_;
  const int first_column_;
};

}  // namespace flash_mla::sm90

#pragma once

#include <cmath>
#include <cstdint>

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/primitives/fragment.cuh"
#include "sm90/ptx/barrier.cuh"

namespace flash_mla::sm90 {

/// Which query and head a row of a tile is, and whether it is one.
struct RowCoordinate {
  int query;
  int head;  // of num_heads_q
  bool is_valid;

  __device__ RowCoordinate(const DenseDecodeParams& params, const QueryTile& tile, int head_k, int row) {
    const QueryTiling& tiling = params.tiling;
    const int query_in_tile = row / tiling.heads_per_tile;
    const int head_in_group = tile.head + row % tiling.heads_per_tile;
    query = tile.query + query_in_tile;
    head = head_k * tiling.group_size + head_in_group;
    is_valid = query_in_tile < tiling.queries_per_tile && query < params.seqlen_q && head_in_group < tiling.group_size;
  }
  /// Tokens of the request that the row sees.
  __device__ int limit(const DenseDecodeParams& params, int seqlen_k) const {
    return params.causal ? min(seqlen_k - params.seqlen_q + query + 1, seqlen_k) : seqlen_k;
  }
};

/// What the sums of P are divided out with. No key: 0; NaN stays.
__device__ __forceinline__ float inverse_sum(float row_sum) {
  return row_sum > 0.0F ? 1.0F / row_sum : row_sum == 0.0F ? 0.0F : row_sum;
}

/// Where a piece's results go: of whole pieces to out and lse, of others to their slot of the workspace.
template <class Element>
struct PieceOutput {
  const DenseDecodeParams& params;
  const Piece& piece;

  __device__ Element* out_row(const RowCoordinate& at) const {
    return static_cast<Element*>(params.out) + piece.request * params.stride_out_batch +
           at.query * params.stride_out_query + at.head * params.stride_out_head;
  }
  __device__ float* accum_row(const RowCoordinate& at) const { return params.out_accum + slot_row(at) * kHeadDimV; }

  __device__ void write_lse(const RowCoordinate& at, float row_max, float row_sum) const {
    if (piece.is_whole) {
      params.lse[piece.request * params.stride_lse_batch + at.head * params.stride_lse_head +
                 at.query * params.stride_lse_query] =
          row_sum == 0.0F ? INFINITY : row_max * params.softmax_scale + logf(row_sum);
    } else {
      params.lse_accum[slot_row(at)] =
          row_sum == 0.0F ? -INFINITY : row_max * params.softmax_scale_log2 + log2f(row_sum);
    }
  }

 private:
  __device__ std::int64_t slot_row(const RowCoordinate& at) const {
    return (static_cast<std::int64_t>(piece.slot) * params.seqlen_q + at.query) * params.num_heads_q + at.head;
  }
};

/// Writes a consumer warpgroup's columns of O.
template <class Traits>
class Epilogue {
  using Element = typename Traits::Element;

 public:
  __device__ Epilogue(const DenseDecodeParams& params, const Piece& piece, int warpgroup)
      : output_{params, piece}, first_column_(warpgroup * Traits::kColumnsPerConsumer) {}

  /// One of the thread's rows: its values of O, its maximum, and the sum over all columns of both warpgroups.
  template <int kRow>
  __device__ __forceinline__ void write_row(const RowCoordinate& at, float (&o)[2][64], float row_max,
                                            float row_sum) const {
    const float inverse = inverse_sum(row_sum);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = first_column_ + half * 128;
      if (output_.piece.is_whole) {
        write_out<kRow>(at, o[half], inverse, column);
      } else {
        write_accum<kRow>(at, o[half], inverse, column);
      }
    }
    if (first_column_ == 0 && at.is_valid && threadIdx.x % 4 == 0) output_.write_lse(at, row_max, row_sum);
  }

 private:
  /// 32 columns at a time, transposed so that each thread stores 16 bytes.
  template <int kRow>
  __device__ __forceinline__ void write_out(const RowCoordinate& at, const float (&o)[64], float inverse,
                                            int column) const {
    Element* row = output_.out_row(at) + column;
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      std::uint32_t packed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 4 * (4 * group + j) + 2 * kRow;
        packed[j] = pack<Element>(o[i] * inverse, o[i + 1] * inverse);
      }
      transpose_quad(packed);
      if (at.is_valid) {
        *reinterpret_cast<uint4*>(row + 32 * group + threadIdx.x % 4 * 8) =
            make_uint4(packed[0], packed[1], packed[2], packed[3]);
      }
    }
  }

  template <int kRow>
  __device__ __forceinline__ void write_accum(const RowCoordinate& at, const float (&o)[64], float inverse,
                                              int column) const {
    if (!at.is_valid) return;
    float* row = output_.accum_row(at) + column + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int i = 4 * j + 2 * kRow;
      *reinterpret_cast<float2*>(row + 8 * j) = make_float2(o[i] * inverse, o[i + 1] * inverse);
    }
  }

  const PieceOutput<Element> output_;
  const int first_column_;
};

}  // namespace flash_mla::sm90

#include "combine/combine.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>

#include "cuda/launch.h"
#include "flash_mla/dense_decode.h"
#include "sm90/primitives/fragment.cuh"
#include "sm90/ptx/grid.cuh"

namespace flash_mla::combine {
namespace {

constexpr int kWarpsPerCta = 8;
/// Columns of one warp: a float4 for each lane.
constexpr int kColumnsPerWarp = 128;
constexpr int kWarpsPerRow = kHeadDimV / kColumnsPerWarp;
constexpr float kLn2 = 0.693147180559945309417F;
/// Pieces whose partial outputs a warp has in flight at once.
constexpr int kUnroll = 16;

__device__ float warp_max(float value) {
  for (int delta = 16; delta > 0; delta /= 2) value = fmaxf(value, __shfl_xor_sync(~0U, value, delta));
  return value;
}

__device__ float warp_sum(float value) {
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_xor_sync(~0U, value, delta);
  return value;
}

/// The pieces of one request, and where in the workspace each lies.
struct Pieces {
  int request;
  int count;
  int first_part;

  /// The first piece begins its request, the others continue it.
  __device__ std::int64_t slot(int piece) const { return 2 * (first_part + piece) + (piece == 0 ? 1 : 0); }
};

/// Base-2 log of the sum over all pieces; -inf where none saw a key.
__device__ float merge_lse(const CombineParams& params, const Pieces& pieces, int row, int num_rows) {
  const int lane = threadIdx.x % 32;
  float max = -INFINITY;
  for (int i = lane; i < pieces.count; i += 32) max = fmaxf(max, params.lse_accum[pieces.slot(i) * num_rows + row]);
  max = warp_max(max);
  if (max == -INFINITY) return max;
  float sum = 0.0F;
  for (int i = lane; i < pieces.count; i += 32) sum += exp2f(params.lse_accum[pieces.slot(i) * num_rows + row] - max);
  return max + log2f(warp_sum(sum));
}

/// Grid: (rows * kWarpsPerRow / kWarpsPerCta, parts). A part whose last piece begins a split request merges it; a warp
/// does kColumnsPerWarp columns of one row.
template <class Element>
__global__ void __launch_bounds__(kWarpsPerCta * 32) combine_kernel(CombineParams params) {
  ptx::wait_for_previous_grids();
  const scheduler::Part part = params.parts[blockIdx.y];
  const bool begins_here = part.end_request > part.begin_request || part.begin_block == 0;
  if (part.num_pieces <= 1 || !begins_here || part.end_request >= params.batch_size) return;
  const int part_idx = static_cast<int>(blockIdx.y);
  const Pieces pieces{part.end_request, min(part.num_pieces, params.num_parts - part_idx), part_idx};

  const int lane = threadIdx.x % 32;
  const int num_rows = params.seqlen_q * params.num_heads_q;
  const unsigned unit = blockIdx.x * kWarpsPerCta + threadIdx.x / 32;
  const int row = static_cast<int>(unit / kWarpsPerRow);
  if (row >= num_rows) return;
  const int column = static_cast<int>(unit % kWarpsPerRow) * kColumnsPerWarp + lane * 4;

  const float lse = merge_lse(params, pieces, row, num_rows);
  float sum[4] = {0.0F, 0.0F, 0.0F, 0.0F};
  const int count = lse == -INFINITY ? 0 : pieces.count;
  for (int base = 0; base < count; base += kUnroll) {
    const int mine = base + lane % kUnroll;
    const float weight = mine < count ? exp2f(params.lse_accum[pieces.slot(mine) * num_rows + row] - lse) : 0.0F;
    float4 values[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const std::int64_t accum_row = pieces.slot(min(base + i, count - 1)) * num_rows + row;
      values[i] = *reinterpret_cast<const float4*>(params.out_accum + accum_row * kHeadDimV + column);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const float w = __shfl_sync(~0U, weight, i);
      if (w == 0.0F) continue;  // past the last piece, or one that saw no key and wrote no values
      sum[0] += w * values[i].x;
      sum[1] += w * values[i].y;
      sum[2] += w * values[i].z;
      sum[3] += w * values[i].w;
    }
  }

  const int query = row / params.num_heads_q;
  const int head = row % params.num_heads_q;
  Element* out = static_cast<Element*>(params.out) + pieces.request * params.stride_out_batch +
                 query * params.stride_out_query + head * params.stride_out_head;
  *reinterpret_cast<uint2*>(out + column) =
      make_uint2(sm90::pack<Element>(sum[0], sum[1]), sm90::pack<Element>(sum[2], sum[3]));
  if (column == 0) {
    params.lse[pieces.request * params.stride_lse_batch + head * params.stride_lse_head +
               query * params.stride_lse_query] = lse == -INFINITY ? INFINITY : lse * kLn2;
  }
}

template <class Element>
void launch(const CombineParams& params, cudaStream_t stream) {
  const std::int64_t warps = static_cast<std::int64_t>(params.seqlen_q) * params.num_heads_q * kWarpsPerRow;
  const dim3 grid(static_cast<unsigned>((warps + kWarpsPerCta - 1) / kWarpsPerCta), params.num_parts);
  const cuda::Launch launch("combine_kernel", grid, dim3(kWarpsPerCta * 32), 0, stream, cuda::Overlap::kWithPrevious);
  launch(combine_kernel<Element>, params);
}

}  // namespace

void launch_combine(const CombineParams& params, DType dtype, CUstream_st* stream) {
  if (dtype == DType::kBFloat16) {
    launch<__nv_bfloat16>(params, stream);
  } else {
    launch<__half>(params, stream);
  }
}

}  // namespace flash_mla::combine

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "combine/merge_states.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "flash_mla/dense_decode.h"
#include "sm90/primitives/fragment.cuh"
#include "sm90/ptx/grid.cuh"
#include "sm90/ptx/math.cuh"

// A CTA merges a row, a thread 16 bytes of it, with up to kBatch loads under way. The kernel does little but read, so
// threads need nothing of each other, and each works out the weights for itself. Which row it is follows from blockIdx
// without a division.

namespace flash_mla::combine {
namespace {

constexpr int kBatch = 8;  // states that a thread has in flight
constexpr float kLog2E = 1.44269504088896340736F;

/// A row: one head of one query of one request.
struct Row {
  unsigned batch_idx;
  unsigned query;
  unsigned head;
};

/// Of an out and its lse, in elements.
struct Strides {
  std::int64_t out_batch, out_query, out_head;
  std::int64_t lse_batch, lse_head, lse_query;

  __device__ std::int64_t of_out(const Row& row) const {
    return row.batch_idx * out_batch + row.query * out_query + row.head * out_head;
  }
  __device__ std::int64_t of_lse(const Row& row) const {
    return row.batch_idx * lse_batch + row.head * lse_head + row.query * lse_query;
  }
};

/// The kernel's parameter. States that share their strides, as those of a collective do, share a row's offset: without
/// that, addresses are half of the work. States with strides of their own take 8 KB of parameters, as drivers have
/// from R530 (CUDA 12.1) on.
template <bool kShareStrides>
struct Params {
  const void* outs[kMaxMergeStates];
  const float* lses[kMaxMergeStates];
  Strides strides[kShareStrides ? 1 : kMaxMergeStates];
  int num_states;
  unsigned batch_size;
  unsigned seqlen_q;
  void* out;
  float* lse;
  Strides result_strides;
};

template <class In>
constexpr int kColumns = 16 / static_cast<int>(sizeof(In));  // that a thread merges
template <class In>
constexpr int kThreads = kHeadDimV / kColumns<In>;

template <class In>
__device__ __forceinline__ void unpack(const uint4& packed, float (&values)[kColumns<In>]) {
  const std::uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<In, float>) {
      values[i] = __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<In, __nv_bfloat16>) {
      values[2 * i] = __uint_as_float(words[i] << 16);
      values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000U);
    } else {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}

// As single vectors: an assignment through such a pointer gets split into four.
template <class Out, int kCount>
__device__ __forceinline__ void store(Out* to, const float (&values)[kCount]) {
  if constexpr (std::is_same_v<Out, float>) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      __stcg(reinterpret_cast<float4*>(to + i), make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]));
    }
  } else {
    static_assert(kCount == 8, "16 bytes of 16-bit values");
    __stcg(reinterpret_cast<uint4*>(to),
           make_uint4(sm90::pack<Out>(values[0], values[1]), sm90::pack<Out>(values[2], values[3]),
                      sm90::pack<Out>(values[4], values[5]), sm90::pack<Out>(values[6], values[7])));
  }
}

/// A weighted sum of states, and of their weights exp(lse - max). The weight is 0 only where no state had a key.
template <class In>
struct Sum {
  float values[kColumns<In>] = {};
  float max = -FLT_MAX;  // finite, so that no difference is NaN
  float weight = 0.0F;

  /// Infinite log-sum-exps, of states without keys or past the last one, have no part in it. NaN has.
  __device__ __forceinline__ void add(const uint4 (&packed)[kBatch], const float (&lse)[kBatch]) {
    float new_max = max;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (!isinf(lse[i])) new_max = fmaxf(new_max, lse[i]);
    }
    const float rescale = ptx::exp2_approx((max - new_max) * kLog2E);
    max = new_max;
    weight *= rescale;
#pragma unroll
    for (int c = 0; c < kColumns<In>; ++c) values[c] *= rescale;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (isinf(lse[i])) continue;
      const float factor = ptx::exp2_approx((lse[i] - max) * kLog2E);
      weight += factor;
      float unpacked[kColumns<In>];
      unpack<In>(packed[i], unpacked);
#pragma unroll
      for (int c = 0; c < kColumns<In>; ++c) values[c] = fmaf(factor, unpacked[c], values[c]);
    }
  }
};

template <class In, class Out, bool kShareStrides>
__device__ __forceinline__ void merge_row(const Params<kShareStrides>& params, const Row& row) {
  const int column = static_cast<int>(threadIdx.x) * kColumns<In>;
  Sum<In> sum;
#pragma unroll 1
  for (int first = 0; first < params.num_states; first += kBatch) {
    uint4 values[kBatch] = {};
    float lse[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      lse[i] = INFINITY;
      if (first + i >= params.num_states) continue;
      const Strides& strides = params.strides[kShareStrides ? 0 : first + i];
      lse[i] = __ldcg(params.lses[first + i] + strides.of_lse(row));
      const In* const source = static_cast<const In*>(params.outs[first + i]) + strides.of_out(row) + column;
      values[i] = __ldcg(reinterpret_cast<const uint4*>(source));
    }
    sum.add(values, lse);
  }

  const float inverse = sum.weight == 0.0F ? 0.0F : 1.0F / sum.weight;
#pragma unroll
  for (float& value : sum.values) value *= inverse;
  store(static_cast<Out*>(params.out) + params.result_strides.of_out(row) + column, sum.values);
  if (column == 0) {
    params.lse[params.result_strides.of_lse(row)] = sum.weight == 0.0F ? INFINITY : sum.max + logf(sum.weight);
  }
}

/// Grid: (num_heads_q, seqlen_q, batch_size), the last two as far as a grid goes.
template <class In, class Out, bool kShareStrides>
__global__ void __launch_bounds__(kThreads<In>)
    merge_states_kernel(const __grid_constant__ Params<kShareStrides> params) {
  ptx::launch_dependents();
  ptx::wait_for_previous_grids();
  for (unsigned batch_idx = blockIdx.z; batch_idx < params.batch_size; batch_idx += gridDim.z) {
    for (unsigned query = blockIdx.y; query < params.seqlen_q; query += gridDim.y) {
      merge_row<In, Out>(params, {batch_idx, query, blockIdx.x});
    }
  }
}

Strides strides_of(const Tensor& out, const Tensor& lse) {
  return {out.strides[0], out.strides[1], out.strides[2], lse.strides[0], lse.strides[1], lse.strides[2]};
}

/// Strides of extents of 1 mean nothing.
bool are_alike(const Tensor& a, const Tensor& b) {
  for (int i = 0; i + 1 < a.rank; ++i) {
    if (a.shape[i] > 1 && a.strides[i] != b.strides[i]) return false;
  }
  return true;
}

bool share_strides(const MergeStatesArguments& args) {
  for (std::int64_t i = 1; i < args.num_states; ++i) {
    if (!are_alike(args.outs[0], args.outs[i]) || !are_alike(args.lses[0], args.lses[i])) return false;
  }
  return true;
}

template <bool kShareStrides>
Params<kShareStrides> make_params(const MergeStatesArguments& args, const MergeStatesShape& shape) {
  Params<kShareStrides> params;
  for (std::int64_t i = 0; i < shape.num_states; ++i) {
    params.outs[i] = args.outs[i].data;
    params.lses[i] = static_cast<const float*>(args.lses[i].data);
    if (i == 0 || !kShareStrides) params.strides[i] = strides_of(args.outs[i], args.lses[i]);
  }
  params.num_states = static_cast<int>(shape.num_states);
  params.batch_size = static_cast<unsigned>(shape.batch_size);
  params.seqlen_q = static_cast<unsigned>(shape.seqlen_q);
  params.out = args.out.data;
  params.lse = static_cast<float*>(args.lse.data);
  params.result_strides = strides_of(args.out, args.lse);
  return params;
}

template <class In, class Out, bool kShareStrides>
void launch(const MergeStatesArguments& args, const MergeStatesShape& shape, CUstream_st* stream) {
  const auto extent = [](std::int64_t count) {
    return static_cast<unsigned>(std::min<std::int64_t>(count, cuda::kMaxGridExtent));
  };
  const dim3 grid(static_cast<unsigned>(shape.num_heads_q), extent(shape.seqlen_q), extent(shape.batch_size));
  const cuda::Launch launch("merge_states_kernel", grid, dim3(kThreads<In>), 0, stream, cuda::Overlap::kWithPrevious);
  launch(merge_states_kernel<In, Out, kShareStrides>, make_params<kShareStrides>(args, shape));
}

template <class In, class Out>
void launch_for(const MergeStatesArguments& args, const MergeStatesShape& shape, CUstream_st* stream) {
  if (share_strides(args)) {
    launch<In, Out, true>(args, shape, stream);
  } else {
    launch<In, Out, false>(args, shape, stream);
  }
}

template <class In>
void launch_to(const MergeStatesArguments& args, const MergeStatesShape& shape, CUstream_st* stream) {
  if (args.out.dtype == DType::kFloat32) {
    launch_for<In, float>(args, shape, stream);
  } else {
    launch_for<In, In>(args, shape, stream);
  }
}

}  // namespace

void launch_merge_states(const MergeStatesArguments& args, const MergeStatesShape& shape, CUstream_st* stream) {
  switch (args.outs[0].dtype) {
    case DType::kBFloat16:
      return launch_to<__nv_bfloat16>(args, shape, stream);
    case DType::kFloat16:
      return launch_to<__half>(args, shape, stream);
    default:
      return launch_to<float>(args, shape, stream);
  }
}

}  // namespace flash_mla::combine

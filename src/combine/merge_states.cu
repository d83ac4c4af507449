#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "combine/merge_states.h"
#include "cuda/launch.h"
#include "flash_mla/dense_decode.h"
#include "sm90/primitives/fragment.cuh"
#include "sm90/ptx/grid.cuh"
#include "sm90/ptx/math.cuh"

// A thread merges 16 bytes of a row: 64 or 128 threads make up a row, each with up to kBatch loads under way. The
// kernel does little but read, so threads need nothing of each other, and each works out the weights for itself.

namespace flash_mla::combine {
namespace {

constexpr int kThreads = 128;
constexpr int kBatch = 8;  // states that a thread has in flight
constexpr float kLog2E = 1.44269504088896340736F;

/// One state. Strides in elements.
struct State {
  const void* out;
  const float* lse;
  std::int64_t stride_out_batch, stride_out_query, stride_out_head;
  std::int64_t stride_lse_batch, stride_lse_head, stride_lse_query;
};

/// The kernel's parameter: kCapacity is kBatch, or kMaxMergeStates in 8 KB of parameters, which take longer to launch.
template <int kCapacity>
struct Params {
  State states[kCapacity];
  int num_states;
  int seqlen_q;
  int num_heads_q;
  int num_rows;
  void* out;
  float* lse;
  std::int64_t stride_out_batch, stride_out_query, stride_out_head;
  std::int64_t stride_lse_batch, stride_lse_head, stride_lse_query;
};

/// A row: one head of one query of one request. `Place` is State or Params.
struct Row {
  int batch_idx;
  int query;
  int head;

  template <class Place>
  __device__ std::int64_t of_out(const Place& place) const {
    return batch_idx * place.stride_out_batch + query * place.stride_out_query + head * place.stride_out_head;
  }
  template <class Place>
  __device__ std::int64_t of_lse(const Place& place) const {
    return batch_idx * place.stride_lse_batch + head * place.stride_lse_head + query * place.stride_lse_query;
  }
};

template <class In>
constexpr int kColumns = 16 / static_cast<int>(sizeof(In));  // that a thread merges

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

template <class Out, int kCount>
__device__ __forceinline__ void store(Out* to, const float (&values)[kCount]) {
  if constexpr (std::is_same_v<Out, float>) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      *reinterpret_cast<float4*>(to + i) = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
    }
  } else {
    static_assert(kCount == 8, "16 bytes of 16-bit values");
    *reinterpret_cast<uint4*>(to) =
        make_uint4(sm90::pack<Out>(values[0], values[1]), sm90::pack<Out>(values[2], values[3]),
                   sm90::pack<Out>(values[4], values[5]), sm90::pack<Out>(values[6], values[7]));
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

template <class In, class Out, int kCapacity>
__global__ void __launch_bounds__(kThreads) merge_states_kernel(const __grid_constant__ Params<kCapacity> params) {
  ptx::launch_dependents();
  ptx::wait_for_previous_grids();
  constexpr int kThreadsPerRow = kHeadDimV / kColumns<In>;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const auto row_idx = static_cast<int>(thread / kThreadsPerRow);
  const int column = static_cast<int>(thread % kThreadsPerRow) * kColumns<In>;
  if (row_idx >= params.num_rows) return;
  const int token = row_idx / params.num_heads_q;
  const Row row{token / params.seqlen_q, token % params.seqlen_q, row_idx % params.num_heads_q};

  Sum<In> sum;
  const int end = kCapacity == kBatch ? 1 : params.num_states;  // one batch, or any number
#pragma unroll 1
  for (int first = 0; first < end; first += kBatch) {
    uint4 values[kBatch] = {};
    float lse[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      lse[i] = INFINITY;
      if (first + i >= params.num_states) continue;
      const State& state = params.states[first + i];
      lse[i] = __ldcg(state.lse + row.of_lse(state));
      const In* const source = static_cast<const In*>(state.out) + row.of_out(state) + column;
      values[i] = __ldcg(reinterpret_cast<const uint4*>(source));
    }
    sum.add(values, lse);
  }

  const float inverse = sum.weight == 0.0F ? 0.0F : 1.0F / sum.weight;
#pragma unroll
  for (float& value : sum.values) value *= inverse;
  store(static_cast<Out*>(params.out) + row.of_out(params) + column, sum.values);
  if (column == 0) {
    params.lse[row.of_lse(params)] = sum.weight == 0.0F ? INFINITY : sum.max + logf(sum.weight);
  }
}

template <int kCapacity>
Params<kCapacity> make_params(const MergeStatesArguments& args, const MergeStatesShape& shape) {
  Params<kCapacity> params;
  for (std::int64_t i = 0; i < shape.num_states; ++i) {
    const Tensor& out = args.outs[i];
    const Tensor& lse = args.lses[i];
    params.states[i] = {out.data,       static_cast<const float*>(lse.data),
                        out.strides[0], out.strides[1],
                        out.strides[2], lse.strides[0],
                        lse.strides[1], lse.strides[2]};
  }
  params.num_states = static_cast<int>(shape.num_states);
  params.seqlen_q = static_cast<int>(shape.seqlen_q);
  params.num_heads_q = static_cast<int>(shape.num_heads_q);
  params.num_rows = static_cast<int>(shape.num_rows());
  params.out = args.out.data;
  params.lse = static_cast<float*>(args.lse.data);
  params.stride_out_batch = args.out.strides[0];
  params.stride_out_query = args.out.strides[1];
  params.stride_out_head = args.out.strides[2];
  params.stride_lse_batch = args.lse.strides[0];
  params.stride_lse_head = args.lse.strides[1];
  params.stride_lse_query = args.lse.strides[2];
  return params;
}

template <class In, class Out, int kCapacity>
void launch(const MergeStatesArguments& args, const MergeStatesShape& shape, CUstream_st* stream) {
  const std::int64_t num_threads = shape.num_rows() * (kHeadDimV / kColumns<In>);
  const auto num_blocks = static_cast<unsigned>((num_threads + kThreads - 1) / kThreads);  // below 2^31
  const cuda::Launch launch("merge_states_kernel", dim3(num_blocks), dim3(kThreads), 0, stream,
                            cuda::Overlap::kWithPrevious);
  launch(merge_states_kernel<In, Out, kCapacity>, make_params<kCapacity>(args, shape));
}

template <class In, class Out>
void launch_for(const MergeStatesArguments& args, const MergeStatesShape& shape, CUstream_st* stream) {
  if (shape.num_states <= kBatch) {
    launch<In, Out, kBatch>(args, shape, stream);
  } else {
    launch<In, Out, kMaxMergeStates>(args, shape, stream);
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

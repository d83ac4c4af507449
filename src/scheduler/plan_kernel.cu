#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "scheduler/plan.h"
#include "scheduler/small_plan.cuh"
#include "scheduler/warp_plan.cuh"
#include "sm90/ptx/grid.cuh"

namespace flash_mla::scheduler {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
static_assert(kThreads >= kMaxBatchKeptWhole, "such a batch is one chunk");

/// Inclusive prefix sum over the CTA's threads; `total` is the sum over all. `scratch` holds kWarps values.
__device__ std::int64_t block_scan(std::int64_t value, std::int64_t* scratch, std::int64_t& total) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  for (int delta = 1; delta < 32; delta *= 2) {
    const std::int64_t below = __shfl_up_sync(~0U, value, delta);
    if (lane >= delta) value += below;
  }
  __syncthreads();  // the last scan's readers are done with scratch
  if (lane == 31) scratch[warp] = value;
  __syncthreads();
  std::int64_t sum = scratch[lane];
  for (int delta = 1; delta < 32; delta *= 2) {
    const std::int64_t below = __shfl_up_sync(~0U, sum, delta);
    if (lane >= delta) sum += below;
  }
  total = __shfl_sync(~0U, sum, 31);
  const std::int64_t before = __shfl_sync(~0U, sum, warp == 0 ? 0 : warp - 1);
  return value + (warp == 0 ? 0 : before);
}

/// The request of this chunk that holds `cut`: the last one with offsets[i] <= cut.
__device__ int find_request(const std::int64_t* offsets, int count, std::int64_t cut) {
  int low = 0;
  int high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (offsets[middle] <= cut ? low : high) = middle;
  }
  return low;
}

/// Whether all parts can take whole requests. `offsets` holds the prefix sums of cost of the whole batch.
__device__ bool keeps_whole(const SplitPlan& plan, QueryTiles tiles, const std::int64_t* offsets, int batch_size) {
  const int count = static_cast<int>(plan.whole_requests(batch_size));
  const int begin = threadIdx.x * count;
  const int end = min(begin + count, batch_size);
  return __syncthreads_and(begin >= batch_size || plan.allows_whole(tiles, offsets[end] - offsets[begin], end - begin));
}

/// One CTA. First the sums over all requests, then, kThreads requests at a time, their prefix sums of cost: each
/// request counts its pieces, each part whose cut lies among them looks up its request.
__global__ void __launch_bounds__(kThreads) plan_kernel(PlanArguments args) {
  __shared__ std::int64_t scratch[kWarps];
  __shared__ std::int64_t offsets[kThreads + 1];
  ptx::launch_dependents();

  Workload mine;
  for (int i = threadIdx.x; i < args.batch_size; i += kThreads) mine.add(args.cache_seqlens[i]);
  Workload work;
  block_scan(mine.num_blocks, scratch, work.num_blocks);
  block_scan(mine.num_nonempty, scratch, work.num_nonempty);
  const SplitPlan plan(work, args.num_parts);

  std::int64_t chunk_offset = 0;
  std::int64_t splits = 0;
  for (int begin = 0; begin < args.batch_size; begin += kThreads) {
    const int count = min(kThreads, args.batch_size - begin);
    const int request = begin + threadIdx.x;
    const bool is_request = threadIdx.x < count;
    std::int64_t chunk_cost;
    const std::int64_t cost = is_request ? plan.cost(args.cache_seqlens[request]) : 0;
    const std::int64_t end_offset = chunk_offset + block_scan(cost, scratch, chunk_cost);
    if (threadIdx.x == 0) offsets[0] = chunk_offset;
    offsets[threadIdx.x + 1] = end_offset;
    __syncthreads();
    if (may_keep_whole(args.batch_size) && keeps_whole(plan, args.tiles, offsets, args.batch_size)) {
      for (int part = threadIdx.x; part < args.num_parts; part += kThreads) {
        plan.write_whole(args.parts[part], part, args.batch_size);
      }
      for (int i = threadIdx.x; args.num_splits != nullptr && i <= args.batch_size; i += kThreads)
        args.num_splits[i] = i;
      return;
    }

    if (args.num_splits != nullptr) {
      const std::int64_t pieces = is_request ? plan.num_pieces(end_offset - cost, end_offset) : 0;
      std::int64_t chunk_splits;
      const std::int64_t before = splits + block_scan(pieces, scratch, chunk_splits) - pieces;
      if (is_request) args.num_splits[request] = static_cast<std::int32_t>(before);
      splits += chunk_splits;
    }
    const std::int64_t last_cut = plan.first_cut_from(chunk_offset + chunk_cost);
    for (std::int64_t part = plan.first_cut_from(chunk_offset) + threadIdx.x; part < last_cut; part += kThreads) {
      const int i = find_request(offsets, count, plan.cut(part));
      plan.write_cut(part > 0 ? &args.parts[part - 1] : nullptr, &args.parts[part], part, begin + i, offsets[i],
                     offsets[i + 1]);
    }
    chunk_offset += chunk_cost;
    __syncthreads();  // offsets are read before the next chunk's are written
  }
  if (args.num_splits != nullptr && threadIdx.x == 0)
    args.num_splits[args.batch_size] = static_cast<std::int32_t>(splits);
  for (int part = threadIdx.x; part < args.num_parts; part += kThreads)
    plan.write_rest(args.parts[part], part, args.batch_size);
}

constexpr int kSmallThreads = 128;
constexpr int kSmallWarps = kSmallThreads / 32;

/// Small batches: a warp for each part.
__global__ void __launch_bounds__(kSmallThreads) plan_small_kernel(PlanArguments args) {
  ptx::launch_dependents();
  const WarpPlan plan(args.cache_seqlens, args.batch_size, args.num_parts, args.tiles);
  const auto part = static_cast<std::int32_t>((blockIdx.x * kSmallThreads + threadIdx.x) / 32);
  if (part == 0 && args.num_splits != nullptr) plan.write_num_splits(args.num_splits);
  if (part >= args.num_parts) return;
  std::int32_t unused;
  Part row;
  if (args.batch_size == 1 && args.cache_seqlens[0] <= SmallPlan::kMaxSeqlen) {
    SmallPlan::make_alone(args.cache_seqlens[0], args.num_parts, part, row);
  } else if (!SmallPlan::make(args.cache_seqlens, args.batch_size, args.num_parts, args.tiles, part, row, unused)) {
    row = plan.row(part, unused);
  }
  if (threadIdx.x % 32 == 0) args.parts[part] = row;
}

}  // namespace

void plan_on_device(const PlanArguments& args, CUstream_st* stream) {
  if (plans_within_a_warp(args.batch_size, args.num_parts)) {
    const dim3 grid((args.num_parts + kSmallWarps - 1) / kSmallWarps);
    cuda::Launch("plan_small_kernel", grid, dim3(kSmallThreads), 0, stream)(plan_small_kernel, args);
  } else {
    cuda::Launch("plan_kernel", dim3(1), dim3(kThreads), 0, stream)(plan_kernel, args);
  }
}

}  // namespace flash_mla::scheduler

#include "flash_mla/plan.h"

#include <string>

#include "api/argument.h"
#include "api/check.h"
#include "api/parts.h"
#include "cuda/device.h"
#include "scheduler/plan.h"

namespace flash_mla {
namespace {

void check_at_least_one(const char* name, std::int64_t value) {
  if (value < 1) checks::fail(name, "at least 1", std::to_string(value));
}

}  // namespace

std::int64_t dense_decode_num_sm_parts(std::int64_t num_q_tokens_per_head_k, std::int64_t num_heads_k, Device device) {
  check_at_least_one("num_q_tokens_per_head_k", num_q_tokens_per_head_k);
  check_at_least_one("num_heads_k", num_heads_k);
  if (device.type == DeviceType::kCpu) return 1;
  cuda::require_hopper(device.index);
  return num_sm_parts(cuda::device_properties(device.index).num_sms, num_q_tokens_per_head_k, num_heads_k);
}

void plan_dense_decode(const Tensor& cache_seqlens, std::int64_t num_q_tokens_per_head_k,
                       const Tensor& tile_scheduler_metadata, const Tensor& num_splits, CUstream_st* stream) {
  check_at_least_one("num_q_tokens_per_head_k", num_q_tokens_per_head_k);
  check_plan(cache_seqlens, tile_scheduler_metadata, num_splits);
  const scheduler::PlanArguments args{
      static_cast<const std::int32_t*>(cache_seqlens.data),        static_cast<std::int32_t>(cache_seqlens.shape[0]),
      static_cast<std::int32_t>(tile_scheduler_metadata.shape[0]), query_tiles(num_q_tokens_per_head_k),
      static_cast<scheduler::Part*>(tile_scheduler_metadata.data), static_cast<std::int32_t*>(num_splits.data)};
  if (cache_seqlens.device.type == DeviceType::kCpu) {
    scheduler::plan_on_host(args);
    return;
  }
  cuda::require_hopper(cache_seqlens.device.index);
  const cuda::DeviceGuard guard(cache_seqlens.device.index);
  scheduler::plan_on_device(args, stream);
}

}  // namespace flash_mla

#include "scheduler/plan.h"

#include <algorithm>

namespace flash_mla::scheduler {
namespace {

bool keeps_whole(const PlanArguments& args, const SplitPlan& plan) {
  if (args.batch_size > kMaxBatchKeptWhole || args.batch_size == 0) return false;
  const auto count = static_cast<std::int32_t>(plan.whole_requests(args.batch_size));
  for (std::int32_t begin = 0; begin < args.batch_size; begin += count) {
    std::int64_t cost = 0;
    for (std::int32_t i = begin; i < std::min(begin + count, args.batch_size); ++i) {
      cost += plan.cost(args.cache_seqlens[i]);
    }
    if (!plan.allows_whole(cost)) return false;
  }
  return true;
}

}  // namespace

void plan_on_host(const PlanArguments& args) {
  Workload work;
  for (std::int32_t i = 0; i < args.batch_size; ++i) work.add(args.cache_seqlens[i]);
  const SplitPlan plan(work, args.num_parts);
  if (keeps_whole(args, plan)) {
    for (std::int32_t p = 0; p < args.num_parts; ++p) plan.write_whole(args.parts, p, args.batch_size);
    for (std::int32_t i = 0; args.num_splits != nullptr && i <= args.batch_size; ++i) args.num_splits[i] = i;
    return;
  }

  std::int64_t offset = 0;
  std::int64_t part = 0;
  std::int32_t splits = 0;
  for (std::int32_t i = 0; i < args.batch_size; ++i) {
    const std::int64_t end_offset = offset + plan.cost(args.cache_seqlens[i]);
    for (; part < plan.num_parts() && plan.cut(part) < end_offset; ++part) {
      plan.write_cut(args.parts, part, i, offset, end_offset);
    }
    if (args.num_splits != nullptr) args.num_splits[i] = splits;
    splits += plan.num_pieces(offset, end_offset);
    offset = end_offset;
  }
  if (args.num_splits != nullptr) args.num_splits[args.batch_size] = splits;
  for (std::int32_t p = 0; p < args.num_parts; ++p) plan.write_rest(args.parts, p, args.batch_size);
}

}  // namespace flash_mla::scheduler

#include "scheduler/plan.h"

#include <algorithm>

namespace flash_mla::scheduler {
namespace {

/// Whether all parts can take the same number of whole requests.
bool keeps_whole(const PlanArguments& args, const SplitPlan& plan) {
  if (!may_keep_whole(args.batch_size)) return false;
  const auto count = static_cast<std::int32_t>(plan.whole_requests(args.batch_size));
  for (std::int32_t begin = 0; begin < args.batch_size; begin += count) {
    const std::int32_t end = std::min(begin + count, args.batch_size);
    std::int64_t cost = 0;
    for (std::int32_t i = begin; i < end; ++i) cost += plan.cost(args.cache_seqlens[i]);
    if (!plan.allows_whole(args.tiles, cost, end - begin)) return false;
  }
  return true;
}

/// The least quota of blocks with which parts suffice for each request to have its own, 0 if there is none.
std::int64_t own_quota(const PlanArguments& args, const SplitPlan& plan, const Workload& work) {
  for (std::int64_t quota = plan.least_quota(work, args.num_parts); quota <= plan.largest_quota(); ++quota) {
    std::int64_t num_parts = 0;
    for (std::int32_t i = 0; i < args.batch_size; ++i) num_parts += SplitPlan::own_parts(args.cache_seqlens[i], quota);
    if (num_parts <= args.num_parts) return quota;
  }
  return 0;
}

/// Whether a part for each request is sooner done than these parts of their own, or cuts.
bool keeps_each_whole(const PlanArguments& args, const SplitPlan& plan, std::int64_t quota) {
  if (!may_keep_whole(args.batch_size)) return false;
  const std::int64_t longest = plan.longest_kept_whole(args.tiles, quota);
  return std::all_of(args.cache_seqlens, args.cache_seqlens + args.batch_size,
                     [&](std::int32_t seqlen) { return num_blocks(seqlen) <= longest; });
}

void plan_whole(const PlanArguments& args, const SplitPlan& plan) {
  for (std::int32_t p = 0; p < args.num_parts; ++p) plan.write_whole(args.parts[p], p, args.batch_size);
  for (std::int32_t i = 0; args.num_splits != nullptr && i <= args.batch_size; ++i) args.num_splits[i] = i;
}

void plan_own_parts(const PlanArguments& args, std::int64_t quota) {
  std::int32_t part = 0;
  for (std::int32_t i = 0; i < args.batch_size; ++i) {
    const std::int32_t count = SplitPlan::own_parts(args.cache_seqlens[i], quota);
    if (args.num_splits != nullptr) args.num_splits[i] = part;
    for (std::int32_t idx = 0; idx < count; ++idx) {
      SplitPlan::write_own(args.parts[part + idx], i, args.cache_seqlens[i], part, idx, count);
    }
    part += count;
  }
  if (args.num_splits != nullptr) args.num_splits[args.batch_size] = part;
  for (; part < args.num_parts; ++part) SplitPlan::write_empty(args.parts[part], part, args.batch_size);
}

void plan_cuts(const PlanArguments& args, const SplitPlan& plan) {
  std::int64_t offset = 0;
  std::int64_t part = 0;
  std::int32_t splits = 0;
  for (std::int32_t i = 0; i < args.batch_size; ++i) {
    const std::int64_t end_offset = offset + plan.cost(args.cache_seqlens[i]);
    for (; part < plan.num_parts() && plan.cut(part) < end_offset; ++part) {
      plan.write_cut(part > 0 ? &args.parts[part - 1] : nullptr, &args.parts[part], part, i, offset, end_offset);
    }
    if (args.num_splits != nullptr) args.num_splits[i] = splits;
    splits += plan.num_pieces(offset, end_offset);
    offset = end_offset;
  }
  if (args.num_splits != nullptr) args.num_splits[args.batch_size] = splits;
  for (std::int32_t p = 0; p < args.num_parts; ++p) plan.write_rest(args.parts[p], p, args.batch_size);
}

}  // namespace

void plan_on_host(const PlanArguments& args) {
  Workload work;
  for (std::int32_t i = 0; i < args.batch_size; ++i) work.add(args.cache_seqlens[i]);
  const SplitPlan plan(work, args.num_parts);
  const bool has_part_for_each = plans_within_a_warp(args.batch_size, args.num_parts);
  const std::int64_t quota = has_part_for_each ? own_quota(args, plan, work) : 0;
  if (has_part_for_each ? keeps_each_whole(args, plan, quota) : keeps_whole(args, plan)) {
    plan_whole(args, plan);
  } else if (quota > 0) {
    plan_own_parts(args, quota);
  } else {
    plan_cuts(args, plan);
  }
}

}  // namespace flash_mla::scheduler

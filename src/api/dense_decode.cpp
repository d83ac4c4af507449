#include "flash_mla/dense_decode.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <optional>
#include <random>
#include <string>

#include "api/argument.h"
#include "api/check.h"
#include "api/parts.h"
#include "api/waits_for_memory.h"
#include "cpu/dense_decode.h"
#include "cuda/device.h"
#include "cuda/tensor_map.h"
#include "flash_mla/error.h"
#include "scheduler/plan.h"
#include "sm90/launch.h"

namespace flash_mla {
namespace {

constexpr std::size_t kWorkspaceAlignment = 16;
constexpr int kChunkColumns = 64;  // 128 bytes: the swizzle's row
constexpr int kMaxMeanPart = 4;    // blocks a part, on average, that are few
constexpr float kLog2E = 1.44269504088896340736F;

/// Where things lie in the workspace, in bytes. The plan comes first, and only where the caller gives none.
struct Workspace {
  std::size_t flags;
  std::size_t slots;
  std::size_t size;
};

/// How a call is worked: tiles of query rows, and parts of KV.
struct Work {
  sm90::QueryTiling tiling;
  int num_parts;
  bool plans_itself;     // whatever plan is given
  int cluster_size = 0;  // see DenseDecodeParams
};

/// The tokens that a request may have. Lengths are cut there.
std::int64_t max_seqlen_k(const DenseDecodeShape& shape) {
  return shape.num_pages > 0 ? shape.max_pages * shape.page_size : 0;
}

sm90::QueryTiling make_tiling(const DenseDecodeShape& shape, int max_rows = sm90::kBlockM) {
  return sm90::QueryTiling::make(static_cast<int>(shape.num_heads_q / shape.num_heads_k),
                                 static_cast<int>(shape.seqlen_q), max_rows);
}

/// Tiles of 64 rows where there are so many, and as many parts as keep the SMs busy, or as the plan has. A request that
/// is alone is planned by each CTA at once, sooner than a plan is read.
Work divide_by_plan(const DenseDecodeShape& shape, int num_sms) {
  const sm90::QueryTiling tiling = make_tiling(shape);
  // What get_mla_metadata counts: query rows filled up to whole tiles of 64.
  const std::int64_t rows = std::int64_t{tiling.num_tiles} * sm90::kBlockM;
  const std::int64_t parts =
      shape.num_sm_parts > 0 ? shape.num_sm_parts : num_sm_parts(num_sms, rows, shape.num_heads_k);
  return {tiling, static_cast<int>(parts), /*plans_itself=*/shape.batch_size == 1};
}

/// Tiles of fewer rows and a part for each block, where all of these fit on the SMs: a CTA then has less to write, read
/// and compute. For a short request that is alone, whose blocks would leave SMs idle. How short is told by what the
/// block table has room for: lengths are on the device.
std::optional<Work> divide_by_blocks(const DenseDecodeShape& shape, int num_sms, int rows) {
  if (shape.batch_size != 1) return std::nullopt;
  const auto max_blocks = scheduler::num_blocks(static_cast<std::int32_t>(max_seqlen_k(shape)));
  const std::int64_t parts = std::max<std::int64_t>(max_blocks, 1);
  const sm90::QueryTiling tiling = make_tiling(shape, rows);
  if (parts * tiling.num_tiles * shape.num_heads_k > num_sms) return std::nullopt;
  return Work{tiling, static_cast<int>(parts), true};
}

/// A cluster of CTAs for each request and tile of few rows, and two blocks for each CTA, where requests are so short
/// that clusters hold them, and so few that all run at once. These need no plan and no workspace. On the current
/// device.
std::optional<Work> divide_by_clusters(const DenseDecodeShape& shape) {
  const std::int64_t max_blocks = (max_seqlen_k(shape) + scheduler::kBlockN - 1) / scheduler::kBlockN;
  if (max_blocks > sm90::kClusterBlocksPerCta * sm90::kMaxClusterSize) return std::nullopt;
  int size = sm90::kMinClusterSize;
  while (sm90::kClusterBlocksPerCta * size < max_blocks) size *= 2;
  const sm90::QueryTiling tiling = make_tiling(shape, sm90::kMinTileRows);
  const std::int64_t clusters = shape.batch_size * tiling.num_tiles * shape.num_heads_k;
  if (clusters > sm90::max_active_clusters(size)) return std::nullopt;
  return Work{tiling, static_cast<int>(shape.batch_size) * size, true, size};
}

Work divide_work(const DenseDecodeShape& shape, int num_sms) {
  for (int rows = sm90::kMinTileRows; rows <= sm90::kMaxNarrowRows; rows *= 2) {
    if (const std::optional<Work> work = divide_by_blocks(shape, num_sms, rows)) return *work;
  }
  return divide_by_plan(shape, num_sms);
}

Work divide_work(const DenseDecodeArguments& args, const DenseDecodeShape& shape) {
  return divide_work(shape, cuda::device_properties(args.q.device.index).num_sms);
}

Workspace lay_out_workspace(const DenseDecodeShape& shape, const Work& work) {
  const auto align = [](std::size_t bytes) {
    return (bytes + sm90::kSlotAlignment - 1) / sm90::kSlotAlignment * sm90::kSlotAlignment;
  };
  const auto num_parts = static_cast<std::size_t>(work.num_parts);
  const std::size_t num_tiles = static_cast<std::size_t>(work.tiling.num_tiles * shape.num_heads_k);
  // One part splits nothing: however many tiles there are, they need no slots.
  const std::size_t slot_tiles = num_parts > 1 ? 2 * num_parts * num_tiles : 0;
  Workspace workspace{};
  workspace.flags = shape.num_sm_parts > 0 ? 0 : num_parts * sizeof(scheduler::Part);
  workspace.slots = align(workspace.flags + num_tiles * sm90::kWordsPerPart * num_parts * sizeof(std::uint64_t));
  workspace.size = workspace.slots + slot_tiles * static_cast<std::size_t>(sm90::slot_bytes(work.tiling.rows));
  return workspace;
}

/// A number that no other launch of this process has, and that memory of any origin holds with negligible probability;
/// its low 56 bits are not 0.
std::uint64_t next_launch_token() {
  static std::atomic<std::uint64_t> counter{[] {
    std::random_device random;
    return std::uint64_t{random()} << 32 | random();
  }()};
  // One round of splitmix64 (Steele, Lea, Flood 2014), a bijection of 64 bits.
  std::uint64_t z = counter.fetch_add(0x9e3779b97f4a7c15U, std::memory_order_relaxed);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9U;
  z = (z ^ z >> 27) * 0x94d049bb133111ebU;
  z ^= z >> 31;
  return z << 8 != 0 ? z : 1;
}

/// Whether the caller has given memory for what no call does without.
bool has_addresses(const DenseDecodeArguments& args) {
  return args.q.data != nullptr && args.k_cache.data != nullptr && args.block_table.data != nullptr &&
         args.cache_seqlens.data != nullptr && args.out.data != nullptr && args.lse.data != nullptr;
}

bool is_empty(const DenseDecodeShape& shape) { return shape.batch_size == 0 || shape.seqlen_q == 0; }

/// Strides as the copy engine takes them: a dimension of one element may have any stride, and it wants a legal one.
std::int64_t map_stride(const Tensor& t, int dim) { return t.shape[dim] > 1 ? t.strides[dim] : t.shape[t.rank - 1]; }

const CUtensorMap& make_q_map(const Tensor& q, const sm90::QueryTiling& tiling) {
  static thread_local cuda::TensorMap map;
  return map.encode({q.data,
                     q.dtype,
                     {q.shape[3], q.shape[2], q.shape[1], q.shape[0]},
                     {map_stride(q, 2), map_stride(q, 1), map_stride(q, 0)},
                     {kChunkColumns, tiling.heads_per_tile, tiling.queries_per_tile, 1}});
}

const CUtensorMap& make_k_cache_map(const Tensor& k, int box_tokens, const void* any_address) {
  static thread_local cuda::TensorMap map;
  // A cache without pages is never read, but the map wants an address and an extent.
  void* data = k.shape[0] > 0 ? k.data : const_cast<void*>(any_address);
  return map.encode({data,
                     k.dtype,
                     {k.shape[3], k.shape[1], k.shape[2], std::max<std::int64_t>(k.shape[0], 1)},
                     {map_stride(k, 1), map_stride(k, 2), map_stride(k, 0)},
                     {kChunkColumns, box_tokens, 1, 1}});
}

int log2_of(std::int64_t power_of_two) {
  int log2 = 0;
  while ((std::int64_t{1} << log2) < power_of_two) ++log2;
  return log2;
}

sm90::DenseDecodeParams make_params(const DenseDecodeArguments& args, const DenseDecodeShape& shape, const Work& work) {
  sm90::DenseDecodeParams params{};
  params.batch_size = static_cast<int>(shape.batch_size);
  params.seqlen_q = static_cast<int>(shape.seqlen_q);
  params.num_heads_k = static_cast<int>(shape.num_heads_k);
  params.tiling = work.tiling;
  params.q_map = make_q_map(args.q, params.tiling);
  params.page_size_log2 = log2_of(shape.page_size);
  params.box_tokens = static_cast<int>(std::min<std::int64_t>(shape.page_size, scheduler::kBlockN));
  params.k_cache_map = make_k_cache_map(args.k_cache, params.box_tokens, args.q.data);
  params.max_seqlen_k = static_cast<int>(max_seqlen_k(shape));
  params.num_parts = work.num_parts;
  params.tiles = query_tiles(shape.seqlen_q * (shape.num_heads_q / shape.num_heads_k));
  params.block_table = static_cast<const int*>(args.block_table.data);
  params.stride_block_table = args.block_table.strides[0];
  params.cache_seqlens = static_cast<const int*>(args.cache_seqlens.data);
  const std::int64_t max_blocks = shape.batch_size * scheduler::num_blocks(params.max_seqlen_k);
  params.shares_kv = params.tiling.num_tiles > 1 && max_blocks > std::int64_t{kMaxMeanPart} * params.num_parts;
  params.waits_for_memory = waits_for_memory(cuda::device_properties(args.q.device.index), params.tiling.num_tiles);
  params.cluster_size = work.cluster_size;
  params.softmax_scale_log2 = std::min(args.softmax_scale * kLog2E, std::numeric_limits<float>::max());
  params.causal = args.causal;
  params.out = args.out.data;
  params.stride_out_batch = args.out.strides[0];
  params.stride_out_query = args.out.strides[1];
  params.stride_out_head = args.out.strides[2];
  params.lse = static_cast<float*>(args.lse.data);
  params.stride_lse_batch = args.lse.strides[0];
  params.stride_lse_head = args.lse.strides[1];
  params.stride_lse_query = args.lse.strides[2];
  return params;
}

void check_workspace(const Workspace& needed, void* workspace, std::size_t workspace_bytes) {
  if (workspace_bytes < needed.size || workspace == nullptr) {
    throw InvalidArgument("workspace: expected at least " + std::to_string(needed.size) + " bytes, got " +
                          (workspace == nullptr ? std::string("a null pointer") : std::to_string(workspace_bytes)));
  }
  Tensor memory;
  memory.data = workspace;
  checks::check_address_of_data({"workspace", memory}, kWorkspaceAlignment);
}

/// Decodes: one launch, and one before to plan where the caller gives no plan and the batch is large.
void decode_on_hopper(const DenseDecodeArguments& args, const DenseDecodeShape& shape, void* workspace,
                      std::size_t workspace_bytes, CUstream_st* stream) {
  const cuda::DeviceGuard guard(args.q.device.index);
  // What sizes tell; whether clusters serve, which need none of it, only the device knows.
  const Work by_plan = divide_work(args, shape);
  const Workspace layout = lay_out_workspace(shape, by_plan);
  check_workspace(layout, workspace, workspace_bytes);
  const Work work = divide_by_clusters(shape).value_or(by_plan);
  auto* const bytes = static_cast<unsigned char*>(workspace);

  sm90::DenseDecodeParams params = make_params(args, shape, work);
  params.token = next_launch_token();
  params.flags = reinterpret_cast<std::uint64_t*>(bytes + layout.flags);
  params.slots = bytes + layout.slots;
  if (args.tile_scheduler_metadata && !work.plans_itself) {
    params.parts = static_cast<const scheduler::Part*>(args.tile_scheduler_metadata.data);
  } else if (work.cluster_size == 0 && !scheduler::plans_within_a_warp(params.batch_size, work.num_parts)) {
    auto* const planned = reinterpret_cast<scheduler::Part*>(bytes);
    scheduler::plan_on_device({params.cache_seqlens, params.batch_size, work.num_parts, params.tiles, planned, nullptr},
                              stream);
    params.parts = planned;
  }
  sm90::launch_dense_decode(params, args.q.dtype, stream);
}

}  // namespace

std::size_t dense_decode_workspace_size(const DenseDecodeArguments& args) {
  const DenseDecodeShape shape = check_dense_decode(args, /*with_pointers=*/has_addresses(args));
  if (args.q.device.type == DeviceType::kCpu || is_empty(shape)) return 0;
  cuda::require_hopper(args.q.device.index);
  return lay_out_workspace(shape, divide_work(args, shape)).size;
}

std::size_t dense_decode_max_workspace_size(const DenseDecodeArguments& args) {
  const DenseDecodeShape shape = check_dense_decode(args, /*with_pointers=*/has_addresses(args));
  if (is_empty(shape)) return 0;
  std::size_t size = lay_out_workspace(shape, divide_by_plan(shape, kMaxSms)).size;
  for (int rows = sm90::kMinTileRows; rows <= sm90::kMaxNarrowRows; rows *= 2) {
    const std::optional<Work> work = divide_by_blocks(shape, kMaxSms, rows);
    if (work) size = std::max(size, lay_out_workspace(shape, *work).size);
  }
  return size;
}

void dense_decode(const DenseDecodeArguments& args, void* workspace, std::size_t workspace_bytes, CUstream_st* stream) {
  const DenseDecodeShape shape = check_dense_decode(args, /*with_pointers=*/true);
  if (is_empty(shape)) return;
  if (args.q.device.type == DeviceType::kCpu) {
    cpu::dense_decode(args, shape);
    return;
  }
  cuda::require_hopper(args.q.device.index);
  decode_on_hopper(args, shape, workspace, workspace_bytes, stream);
}

}  // namespace flash_mla

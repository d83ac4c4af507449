// An engine's decoding step: memory is laid out once, the step is planned once, then each layer is one call.
//
// It runs on the CPU, so that it runs anywhere. On a GPU the device is {DeviceType::kCuda, ordinal}, all memory is that
// device's, and `stream` is the cudaStream_t that the engine runs or captures its step on. Nothing else changes.

#include <flash_mla/flash_mla.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

using flash_mla::DType;

/// What all layers of a step share. Arrays are on the device; the engine writes them before the step.
struct Step {
  flash_mla::Device device;
  std::int64_t batch_size, seqlen_q, num_heads_q, num_pages, page_size, max_pages;
  std::int32_t* block_table;    // (batch_size, max_pages)
  std::int32_t* cache_seqlens;  // (batch_size,); 0 for the requests that pad the batch
};

flash_mla::DenseDecodeArguments arguments(const Step& step, void* q, void* k_cache, void* out, void* lse) {
  flash_mla::DenseDecodeArguments args;
  args.q = make_tensor(q, DType::kBFloat16, step.device, step.batch_size, step.seqlen_q, step.num_heads_q,
                       flash_mla::kHeadDimQk);
  args.k_cache =
      make_tensor(k_cache, DType::kBFloat16, step.device, step.num_pages, step.page_size, 1, flash_mla::kHeadDimQk);
  args.block_table = make_tensor(step.block_table, DType::kInt32, step.device, step.batch_size, step.max_pages);
  args.cache_seqlens = make_tensor(step.cache_seqlens, DType::kInt32, step.device, step.batch_size);
  args.out = make_tensor(out, DType::kBFloat16, step.device, step.batch_size, step.seqlen_q, step.num_heads_q,
                         flash_mla::kHeadDimV);
  args.lse = make_tensor(lse, DType::kFloat32, step.device, step.batch_size, step.num_heads_q, step.seqlen_q);
  args.causal = true;
  return args;
}

int main() try {
  CUstream_st* const stream = nullptr;
  std::vector<std::int32_t> block_table = {2, 0, 1, -1};  // request 0 has pages 2 and 0, request 1 has page 1
  std::vector<std::int32_t> cache_seqlens = {65, 0};      // and request 1 only pads the batch
  const Step step{{}, 2, 1, 16, 3, 64, 2, block_table.data(), cache_seqlens.data()};

  std::vector<std::uint16_t> q(2 * 16 * flash_mla::kHeadDimQk, 0);  // bfloat16; the model's projections write it
  std::vector<std::uint16_t> out(2 * 16 * flash_mla::kHeadDimV);
  std::vector<float> lse(2 * 16);
  std::vector<std::vector<std::uint16_t>> k_caches(4, std::vector<std::uint16_t>(3 * 64 * flash_mla::kHeadDimQk, 0));

  // Once: a plan's arrays, and a workspace. Their sizes follow from shapes, never from lengths.
  const std::int64_t rows = step.seqlen_q * step.num_heads_q;  // for the one KV head
  const std::int64_t num_parts = flash_mla::dense_decode_num_sm_parts(rows, 1, step.device);
  std::vector<std::int32_t> parts(num_parts * flash_mla::kTileSchedulerMetadataSize);
  std::vector<std::int32_t> splits(step.batch_size + 1);
  const auto metadata =
      make_tensor(parts.data(), DType::kInt32, step.device, num_parts, flash_mla::kTileSchedulerMetadataSize);
  const auto num_splits = make_tensor(splits.data(), DType::kInt32, step.device, step.batch_size + 1);
  flash_mla::DenseDecodeArguments any_layer = arguments(step, q.data(), k_caches[0].data(), out.data(), lse.data());
  any_layer.tile_scheduler_metadata = metadata;
  any_layer.num_splits = num_splits;
  std::vector<unsigned char> workspace(flash_mla::dense_decode_workspace_size(any_layer));

  // Each step: plan, then the layers. Captured in a CUDA graph, a replay follows new lengths and block tables.
  flash_mla::plan_dense_decode(any_layer.cache_seqlens, rows, metadata, num_splits, stream);
  for (auto& k_cache : k_caches) {
    flash_mla::DenseDecodeArguments layer = arguments(step, q.data(), k_cache.data(), out.data(), lse.data());
    layer.tile_scheduler_metadata = metadata;
    layer.num_splits = num_splits;
    flash_mla::dense_decode(layer, workspace.data(), workspace.size(), stream);
  }
  std::printf("lse %.4f of 65 tokens alike, %.4f of none\n", lse[0], lse[16]);
  return std::abs(lse[0] - std::log(65.0F)) < 1e-5F && std::isinf(lse[16]) ? 0 : 1;
} catch (const flash_mla::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());  // names the argument, what was expected and what it got
  return 1;
}

#include "decode_step.h"

#include <algorithm>
#include <iterator>

namespace server {

using flash_mla::DType;
using flash_mla::kHeadDimQk;
using flash_mla::kHeadDimV;
using model::kNumHeads;
using model::kNumLayers;

namespace {

constexpr std::size_t kPoolBytes = sizeof(std::uint16_t) * kNumLayers * kNumPages * kPageSize * kHeadDimQk;

}  // namespace

DecodeStep::DecodeStep(Runtime& runtime)
    : q(runtime, kNumLayers * kMaxBatch, model::kQuerySize),
      block_table(runtime, kMaxBatch, kMaxPages),
      cache_seqlens(runtime, kMaxBatch, 1),
      out(runtime, kNumLayers * kMaxBatch, model::kOutSize),
      lse(runtime, kNumLayers * kMaxBatch, kNumHeads),
      runtime_(runtime),
      pool_(runtime.allocate(kPoolBytes, 0xff)),  // NaN: what no request has written is never read
      num_sm_parts_(flash_mla::dense_decode_num_sm_parts(kNumHeads, 1, runtime.device())),
      metadata_(runtime.allocate(sizeof(std::int32_t) * num_sm_parts_ * flash_mla::kTileSchedulerMetadataSize, 0)),
      num_splits_(runtime.allocate(sizeof(std::int32_t) * (kMaxBatch + 1), 0)) {
  for (const int size : kBatchSizes) {
    workspace_bytes_ = std::max(workspace_bytes_, flash_mla::dense_decode_workspace_size(make_arguments(0, size)));
  }
  workspace_ = runtime.allocate(std::max<std::size_t>(workspace_bytes_, 1), 0);
  for (const int size : kBatchSizes) graphs_[size] = runtime.record([this, size] { enqueue(size); });
}

std::uint16_t* DecodeStep::pool(int layer, std::int32_t page) const {
  return static_cast<std::uint16_t*>(pool_.get()) + (std::int64_t{layer} * kNumPages + page) * kPageSize * kHeadDimQk;
}

void DecodeStep::write_latents(int layer, std::int32_t page, int first, const std::uint16_t* latents, int num_tokens) {
  runtime_.copy(pool(layer, page) + first * kHeadDimQk, latents, sizeof(std::uint16_t) * num_tokens * kHeadDimQk);
}

flash_mla::DenseDecodeArguments DecodeStep::make_arguments(int layer, int batch_size) const {
  const flash_mla::Device device = runtime_.device();
  const int row = layer * kMaxBatch;
  flash_mla::DenseDecodeArguments args;
  args.q = make_tensor(q.device(row), DType::kBFloat16, device, batch_size, 1, kNumHeads, kHeadDimQk);
  args.k_cache = make_tensor(pool(layer, 0), DType::kBFloat16, device, kNumPages, kPageSize, 1, kHeadDimQk);
  args.block_table = make_tensor(block_table.device(), DType::kInt32, device, batch_size, kMaxPages);
  args.cache_seqlens = make_tensor(cache_seqlens.device(), DType::kInt32, device, batch_size);
  args.out = make_tensor(out.device(row), DType::kBFloat16, device, batch_size, 1, kNumHeads, kHeadDimV);
  args.lse = make_tensor(lse.device(row), DType::kFloat32, device, batch_size, kNumHeads, 1);
  args.tile_scheduler_metadata =
      make_tensor(metadata_.get(), DType::kInt32, device, num_sm_parts_, flash_mla::kTileSchedulerMetadataSize);
  args.num_splits = make_tensor(num_splits_.get(), DType::kInt32, device, batch_size + 1);
  return args;
}

void DecodeStep::enqueue(int batch_size) {
  block_table.upload(0, batch_size);
  cache_seqlens.upload(0, batch_size);
  for (int layer = 0; layer < kNumLayers; ++layer) {
    const flash_mla::DenseDecodeArguments args = make_arguments(layer, batch_size);
    if (layer == 0) {
      flash_mla::plan_dense_decode(args.cache_seqlens, kNumHeads, args.tile_scheduler_metadata, args.num_splits,
                                   runtime_.stream());
    }
    q.upload(layer * kMaxBatch, batch_size);
    flash_mla::dense_decode(args, workspace_.get(), workspace_bytes_, runtime_.stream());
    out.download(layer * kMaxBatch, batch_size);
    lse.download(layer * kMaxBatch, batch_size);
  }
}

int DecodeStep::run(int batch_size) {
  const int padded = *std::lower_bound(std::begin(kBatchSizes), std::end(kBatchSizes), batch_size);
  std::fill(cache_seqlens.host(batch_size), cache_seqlens.host(padded), 0);
  graphs_.at(padded)();
  runtime_.synchronize();
  return padded;
}

}  // namespace server

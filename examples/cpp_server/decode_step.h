#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>

#include "model.h"
#include "runtime.h"

namespace server {

constexpr int kPageSize = 64;  // tokens
constexpr int kNumPages = 36;  // of each layer's pool: too few for all requests at once
constexpr int kMaxPages = 8;   // of one request
constexpr int kMaxBatch = 16;
constexpr int kBatchSizes[] = {1, 2, 4, 8, kMaxBatch};  // each has its graph

/// An array of the host and one of the device, of `rows` rows, and the copies between them.
template <class T>
class Mirror {
 public:
  Mirror(Runtime& runtime, int rows, int row_size)
      : runtime_(runtime),
        row_size_(row_size),
        host_(runtime.allocate_on_host(sizeof(T) * rows * row_size)),
        device_(runtime.allocate(sizeof(T) * rows * row_size, 0)) {}

  T* host(int row = 0) const { return static_cast<T*>(host_.get()) + std::int64_t{row} * row_size_; }
  T* device(int row = 0) const { return static_cast<T*>(device_.get()) + std::int64_t{row} * row_size_; }
  void upload(int row, int rows) const { runtime_.copy(device(row), host(row), sizeof(T) * rows * row_size_); }
  void download(int row, int rows) const { runtime_.copy(host(row), device(row), sizeof(T) * rows * row_size_); }

 private:
  Runtime& runtime_;
  int row_size_;
  std::shared_ptr<void> host_, device_;
};

/// A decode step through all layers for up to kMaxBatch requests. All arrays keep their addresses, as graphs need. Rows
/// of q, out and lse: layer * kMaxBatch + the request's place in the batch.
class DecodeStep {
 public:
  explicit DecodeStep(Runtime& runtime);
  DecodeStep(const DecodeStep&) = delete;
  DecodeStep& operator=(const DecodeStep&) = delete;

  /// Copies `num_tokens` latents into a page, from its token `first` on. In order before the next run.
  void write_latents(int layer, std::int32_t page, int first, const std::uint16_t* latents, int num_tokens);

  /// Decodes the first `batch_size` requests, padded by requests of length 0 to a size that has a graph. Returns that
  /// size when the results are on the host.
  int run(int batch_size);

  // Written by the host before a run:
  Mirror<std::uint16_t> q;             // (layers * kMaxBatch, heads * 576)
  Mirror<std::int32_t> block_table;    // (kMaxBatch, kMaxPages)
  Mirror<std::int32_t> cache_seqlens;  // (kMaxBatch, 1)
  // and read after it:
  Mirror<std::uint16_t> out;  // (layers * kMaxBatch, heads * 512)
  Mirror<float> lse;          // (layers * kMaxBatch, heads)

 private:
  void enqueue(int batch_size);
  std::uint16_t* pool(int layer, std::int32_t page) const;
  flash_mla::DenseDecodeArguments make_arguments(int layer, int batch_size) const;

  Runtime& runtime_;
  std::shared_ptr<void> pool_;  // (layers, kNumPages, kPageSize, 1, 576)
  std::int64_t num_sm_parts_;
  std::shared_ptr<void> metadata_, num_splits_;  // the plan that all layers of a step share
  std::size_t workspace_bytes_ = 0;
  std::shared_ptr<void> workspace_;
  std::map<int, std::function<void()>> graphs_;  // by batch size
};

}  // namespace server

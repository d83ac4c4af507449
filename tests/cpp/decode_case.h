#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "cpu/half.h"
#include "flash_mla/flash_mla.h"
#include "on_device.h"

// A decode on a GPU beside the same on the CPU.

namespace flash_mla {

constexpr Device kCpu{DeviceType::kCpu, 0};
constexpr Device kGpu{DeviceType::kCuda, 0};

inline std::uint16_t to_bfloat16(float value) {
  cpu::BFloat16 result;
  cpu::from_float(value, result);
  return result.bits;
}

inline float from_bfloat16(std::uint16_t value) { return cpu::to_float(cpu::BFloat16{value}); }

inline std::vector<std::uint16_t> random_bfloat16(std::size_t size, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, 0.1F);
  std::vector<std::uint16_t> values(size);
  for (std::uint16_t& value : values) value = to_bfloat16(normal(random));
  return values;
}

class DenseDecodeGpu : public testing::Test {
 protected:
  void SetUp() override {
    if (!has_hopper()) GTEST_SKIP() << "needs a Hopper GPU (compute capability 9.0)";
  }
};

// With and without whole blocks, and none; the longest is split over many parts.
inline const std::vector<std::int32_t> kSeqlens{2500, 0, 64, 1, 777};
constexpr int kMaxTokens = 2560;

/// Extents of a decode.
struct Extents {
  int num_heads_q;
  int seqlen_q;
  int page_size;
  bool causal;
  int max_tokens = kMaxTokens;  // that the block table has room for: longer requests are cut
  int num_parts = 0;            // of a plan that is given; 0: none is
};

inline std::string name_of(const testing::TestParamInfo<Extents>& info) {
  const Extents& e = info.param;
  return std::to_string(e.num_heads_q) + "_heads_" + std::to_string(e.seqlen_q) + "_queries_pages_of_" +
         std::to_string(e.page_size) + (e.causal ? "_causal" : "") +
         (e.max_tokens < kMaxTokens ? "_up_to_" + std::to_string(e.max_tokens) : "") +
         (e.num_parts > 0 ? "_in_" + std::to_string(e.num_parts) + "_parts" : "");
}

struct HostCase {
  explicit HostCase(const Extents& e)
      : extents(e),
        q(random_bfloat16(kSeqlens.size() * e.seqlen_q * e.num_heads_q * kHeadDimQk, 1)),
        k_cache(random_bfloat16(kSeqlens.size() * e.max_tokens * kHeadDimQk, 2)),
        block_table(kSeqlens.size() * e.max_tokens / e.page_size),
        out(kSeqlens.size() * e.seqlen_q * e.num_heads_q * kHeadDimV, 0x7fc0),  // NaN
        lse(kSeqlens.size() * e.seqlen_q * e.num_heads_q, NAN) {
    for (std::size_t i = 0; i < block_table.size(); ++i) {
      block_table[i] = static_cast<std::int32_t>(i * 7 % block_table.size());
    }
  }

  Extents extents;
  std::vector<std::uint16_t> q, k_cache;
  std::vector<std::int32_t> block_table, cache_seqlens = kSeqlens;
  std::vector<std::uint16_t> out;
  std::vector<float> lse;
};

inline DenseDecodeArguments make_arguments(const Extents& e, Device device, std::uint16_t* q, std::uint16_t* k_cache,
                                           std::int32_t* block_table, std::int32_t* cache_seqlens, std::uint16_t* out,
                                           float* lse) {
  const auto batch = static_cast<std::int64_t>(kSeqlens.size());
  const int max_pages = e.max_tokens / e.page_size;
  DenseDecodeArguments args;
  args.q = make_tensor(q, DType::kBFloat16, device, batch, e.seqlen_q, e.num_heads_q, kHeadDimQk);
  args.k_cache = make_tensor(k_cache, DType::kBFloat16, device, batch * max_pages, e.page_size, 1, kHeadDimQk);
  args.block_table = make_tensor(block_table, DType::kInt32, device, batch, max_pages);
  args.cache_seqlens = make_tensor(cache_seqlens, DType::kInt32, device, batch);
  args.out = make_tensor(out, DType::kBFloat16, device, batch, e.seqlen_q, e.num_heads_q, kHeadDimV);
  args.lse = make_tensor(lse, DType::kFloat32, device, batch, e.num_heads_q, e.seqlen_q);
  args.causal = e.causal;
  return args;
}

inline DenseDecodeArguments host_arguments(HostCase& host, Device device) {
  return make_arguments(host.extents, device, host.q.data(), host.k_cache.data(), host.block_table.data(),
                        host.cache_seqlens.data(), host.out.data(), host.lse.data());
}

/// A plan on the GPU, with its arrays in the arguments.
struct GivenPlan {
  GivenPlan(DenseDecodeArguments& args, std::int64_t num_parts)
      : metadata(std::vector<std::int32_t>(num_parts * kTileSchedulerMetadataSize, -1)),
        num_splits(std::vector<std::int32_t>(args.cache_seqlens.shape[0] + 1)) {
    args.tile_scheduler_metadata =
        make_tensor(metadata.data(), DType::kInt32, kGpu, num_parts, kTileSchedulerMetadataSize);
    args.num_splits = make_tensor(num_splits.data(), DType::kInt32, kGpu, args.cache_seqlens.shape[0] + 1);
    plan_dense_decode(args.cache_seqlens, args.q.shape[1] * args.q.shape[2], args.tile_scheduler_metadata,
                      args.num_splits, nullptr);
    cudaDeviceSynchronize();
  }

  OnDevice<std::int32_t> metadata, num_splits;
};

/// The arrays of a host case's first requests on the GPU, with a plan if the case has one.
struct DeviceCase {
  explicit DeviceCase(const HostCase& host, std::size_t batch = kSeqlens.size())
      : q(host.q),
        k_cache(host.k_cache),
        out(host.out),
        block_table(host.block_table),
        cache_seqlens(host.cache_seqlens),
        lse(host.lse),
        args(make_arguments(host.extents, kGpu, q.data(), k_cache.data(), block_table.data(), cache_seqlens.data(),
                            out.data(), lse.data())) {
    for (Tensor* tensor : {&args.q, &args.block_table, &args.cache_seqlens, &args.out, &args.lse}) {
      tensor->shape[0] = static_cast<std::int64_t>(batch);
    }
    if (host.extents.num_parts > 0) plan.emplace(args, host.extents.num_parts);
  }

  OnDevice<std::uint16_t> q, k_cache, out;
  OnDevice<std::int32_t> block_table, cache_seqlens;
  OnDevice<float> lse;
  DenseDecodeArguments args;
  std::optional<GivenPlan> plan;
};

/// A decode in a graph, on a stream of its own.
class CapturedDecode {
 public:
  CapturedDecode(const DenseDecodeArguments& args, void* workspace, std::size_t workspace_bytes) {
    EXPECT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
    cudaGraph_t graph = nullptr;
    EXPECT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    dense_decode(args, workspace, workspace_bytes, stream_);
    EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), cudaSuccess);
    EXPECT_EQ(cudaGraphInstantiate(&graph_, graph, 0), cudaSuccess);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  }
  ~CapturedDecode() {
    cudaGraphExecDestroy(graph_);
    cudaStreamDestroy(stream_);
  }
  CapturedDecode(const CapturedDecode&) = delete;
  CapturedDecode& operator=(const CapturedDecode&) = delete;

  void replay() const { EXPECT_EQ(cudaGraphLaunch(graph_, stream_), cudaSuccess); }
  cudaStream_t stream() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
};

/// Holds the results of the case's first requests against the CPU's.
inline void expect_results(const DeviceCase& device, const HostCase& expected, std::size_t batch = kSeqlens.size()) {
  const std::vector<std::uint16_t> out = device.out.to_host();
  const std::vector<float> lse = device.lse.to_host();
  const std::size_t num_rows = lse.size() / kSeqlens.size() * batch;
  for (std::size_t i = 0; i < num_rows * kHeadDimV; ++i) {
    const float value = from_bfloat16(expected.out[i]);
    ASSERT_NEAR(from_bfloat16(out[i]), value, 8e-4F + 2.01F / 128 * std::abs(value)) << "out at " << i;
  }
  for (std::size_t i = 0; i < num_rows; ++i) {
    if (std::isinf(expected.lse[i])) {
      ASSERT_EQ(lse[i], expected.lse[i]) << "lse at " << i;
    } else {
      ASSERT_NEAR(lse[i], expected.lse[i], 1e-6F + 8.01F / 65536 * std::abs(expected.lse[i])) << "lse at " << i;
    }
  }
}

/// Decodes on the GPU, in the current context, and holds the results against the CPU's. `rows`: of a plan that is
/// another than what would be made.
inline void expect_agreement(const Extents& extents, const std::vector<std::int32_t>& rows = {}) {
  HostCase host(extents);
  DeviceCase device(host);
  if (!rows.empty()) device.plan->metadata.set(rows);
  const std::size_t size = dense_decode_workspace_size(device.args);
  EXPECT_LE(size, dense_decode_max_workspace_size(device.args));
  const OnDevice<unsigned char> workspace(std::vector<unsigned char>(size, 0xff));
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  dense_decode(device.args, workspace.data(), size, stream);
  ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  ASSERT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  dense_decode(host_arguments(host, kCpu), nullptr, 0, nullptr);
  expect_results(device, host);
}

}  // namespace flash_mla

// The public C++ API on a GPU, against the CPU path and the host's plan. Skipped, by name, without a Hopper GPU.

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "busy_sms.h"
#include "decode_case.h"
#include "flash_mla/flash_mla.h"
#include "late_writer.h"
#include "on_device.h"

namespace flash_mla {
namespace {

class DenseDecodeGpuGrid : public DenseDecodeGpu, public testing::WithParamInterface<Extents> {};

TEST_P(DenseDecodeGpuGrid, AgreesWithTheCpu) { expect_agreement(GetParam()); }

INSTANTIATE_TEST_SUITE_P(Extents, DenseDecodeGpuGrid,
                         testing::Values(Extents{1, 1, 64, false}, Extents{16, 2, 64, true}, Extents{63, 1, 128, false},
                                         Extents{128, 1, 64, false}, Extents{9, 9, 16, true}),
                         name_of);

// Where clusters of 8, 4 and 2 CTAs work a request each.
INSTANTIATE_TEST_SUITE_P(ShortExtents, DenseDecodeGpuGrid,
                         testing::Values(Extents{16, 1, 64, false, 1024}, Extents{9, 9, 64, true, 960},
                                         Extents{20, 2, 16, true, 512}, Extents{63, 1, 128, false, 256},
                                         Extents{128, 1, 64, false, 128}),
                         name_of);

// Where the longest request has two pieces, of which the second comes early: its part goes on.
INSTANTIATE_TEST_SUITE_P(PlannedExtents, DenseDecodeGpuGrid,
                         testing::Values(Extents{16, 1, 64, false, kMaxTokens, 2},
                                         Extents{9, 3, 16, true, kMaxTokens, 2},
                                         Extents{40, 1, 64, false, kMaxTokens, 3},
                                         Extents{128, 1, 64, false, kMaxTokens, 2}),
                         name_of);

/// Two parts that have half of the longest request each, and nothing else: both merge, a slice each.
TEST_F(DenseDecodeGpu, MergesTwoPiecesInSlices) {
  constexpr int kParts = 6;
  std::vector<std::int32_t> rows{0, 0, 0, 20, 2, 0, 0, 0, 0, 20, 0, INT32_MAX, 1, 0, 0, 0};
  for (std::int32_t part = 2; part < kParts; ++part) {
    for (const std::int32_t value : {part - 1, 0, part - 1, INT32_MAX, 1, part, 0, 0}) rows.push_back(value);
  }
  for (const int num_heads_q : {16, 32, 40, 128}) {
    SCOPED_TRACE(num_heads_q);
    expect_agreement(Extents{num_heads_q, 1, 64, false, kMaxTokens, kParts}, rows);
  }
}

/// Plans on the GPU and on the host, for few and many query rows, into arrays that hold other values.
void expect_the_plan_of_the_host(const std::vector<std::int32_t>& seqlens, std::int64_t parts) {
  const auto batch = static_cast<std::int64_t>(seqlens.size());
  std::vector<std::int32_t> lengths = seqlens;
  const OnDevice<std::int32_t> gpu_lengths(seqlens);
  for (const int query_rows : {16, 32, 64, 128}) {
    SCOPED_TRACE(std::to_string(batch) + " requests, of which the first has " + std::to_string(seqlens[0]) +
                 " tokens, " + std::to_string(parts) + " parts, " + std::to_string(query_rows) + " rows");
    // Part is 16-byte aligned; vectors of int32 are as well, on every allocator this test meets.
    std::vector<std::int32_t> metadata(parts * kTileSchedulerMetadataSize, -1), splits(batch + 1, -1);
    const OnDevice<std::int32_t> gpu_metadata(std::vector<std::int32_t>(metadata.size(), -2));
    const OnDevice<std::int32_t> gpu_splits(std::vector<std::int32_t>(splits.size(), -2));
    const auto plan = [&](Device device, std::int32_t* seqlens_data, std::int32_t* rows, std::int32_t* sums) {
      plan_dense_decode(make_tensor(seqlens_data, DType::kInt32, device, batch), query_rows,
                        make_tensor(rows, DType::kInt32, device, parts, kTileSchedulerMetadataSize),
                        make_tensor(sums, DType::kInt32, device, batch + 1), nullptr);
    };
    plan(kCpu, lengths.data(), metadata.data(), splits.data());
    plan(kGpu, gpu_lengths.data(), gpu_metadata.data(), gpu_splits.data());
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    ASSERT_EQ(gpu_metadata.to_host(), metadata);
    ASSERT_EQ(gpu_splits.to_host(), splits);
  }
}

TEST_F(DenseDecodeGpu, PlansAsTheHostDoes) {
  std::mt19937 random(3);
  for (const int batch : {1, 2, 3, 4, 7, 16, 31, 32, 33, 64, 128, 1000, 1024, 1025, 5000, 100000}) {
    for (const int parts : {1, 33, 66, 132, 160}) {
      for (const int max_seqlen : {0, 1, 128, 300, 600, 2048, 8192, 100000, 1 << 20, 1 << 21}) {
        std::vector<std::int32_t> seqlens(batch);
        for (std::int32_t& value : seqlens) {
          const auto seqlen = static_cast<std::int32_t>(random() % (max_seqlen + 1));
          value = random() % 4 != 0 ? seqlen : random() % 2 == 0 ? 0 : -seqlen;
        }
        expect_the_plan_of_the_host(seqlens, parts);
        if (HasFatalFailure()) return;
      }
    }
  }
}

/// Short requests of about equal lengths, where a plan's ways are closest to each other.
TEST_F(DenseDecodeGpu, PlansShortRequestsAsTheHostDoes) {
  std::mt19937 random(9);
  for (const int parts : {33, 66, 132}) {
    for (const int share : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16}) {  // eighths of as many requests as parts
      const int batch = parts * share / 8;
      for (int blocks = 1; blocks <= 14; ++blocks) {
        for (const int kind : {0, 1, 2}) {  // equal, nearly so, with some that are empty
          std::vector<std::int32_t> seqlens(batch);
          for (std::int32_t& value : seqlens) {
            value = (blocks + static_cast<std::int32_t>(random() % (kind + 1))) * 64;
            if (kind == 2 && random() % 8 == 0) value = 0;
          }
          expect_the_plan_of_the_host(seqlens, parts);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

/// Of a plan that is given for a request that is alone only the number of parts counts, and not even that where the
/// block table had room for no more blocks than there are SMs.
TEST_F(DenseDecodeGpu, PlansALoneRequestWhateverPlanIsGiven) {
  for (const int num_heads_q : {16, 32, 64, 128}) {
    HostCase host(Extents{num_heads_q, 1, 64, false, 10240});
    DenseDecodeArguments on_cpu = host_arguments(host, kCpu);
    for (Tensor* tensor : {&on_cpu.q, &on_cpu.block_table, &on_cpu.cache_seqlens, &on_cpu.out, &on_cpu.lse}) {
      tensor->shape[0] = 1;
    }
    dense_decode(on_cpu, nullptr, 0, nullptr);
    for (const int num_parts : {1, 2, 33, 132, 160}) {
      SCOPED_TRACE(std::to_string(num_heads_q) + " heads, " + std::to_string(num_parts) + " parts");
      DeviceCase device(host, 1);
      const GivenPlan plan(device.args, num_parts);
      std::vector<std::int32_t> rows(num_parts * kTileSchedulerMetadataSize);
      for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<std::int32_t>(i * 7919 % 11) - 2;
      plan.metadata.set(rows);
      const std::size_t size = dense_decode_workspace_size(device.args);
      const OnDevice<unsigned char> workspace(std::vector<unsigned char>(size, 0xff));
      ASSERT_EQ(cudaMemset(device.out.data(), 0xff, host.out.size() * sizeof(host.out[0])), cudaSuccess);
      ASSERT_EQ(cudaMemset(device.lse.data(), 0xff, host.lse.size() * sizeof(host.lse[0])), cudaSuccess);
      dense_decode(device.args, workspace.data(), size, nullptr);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      expect_results(device, host, 1);
      if (HasFatalFailure()) return;
    }
  }
}

/// A decode may begin while the kernel before it still writes lengths, pages and the plan. (Of one request the plan is
/// not read: whatever is there does no harm.)
TEST_F(DenseDecodeGpu, ReadsWhatIsWrittenLate) {
  struct Case {
    Extents extents;
    int batch;
    bool is_planned;
    int parts = 0;  // 0: as many as there should be; few have several blocks each
  };
  constexpr int kAll = 5;
  constexpr std::size_t kFlushBytes = 128 << 20;  // more than L2 has, so that nothing lies there
  void* flush = nullptr;
  ASSERT_EQ(cudaMalloc(&flush, kFlushBytes), cudaSuccess);
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  std::mt19937 random(4);
  for (const Case& c : {Case{{16, 1, 64, false, 1024}, kAll, false}, Case{{63, 1, 128, false, 256}, kAll, false},
                        Case{{16, 1, 64, false, 128}, kAll, false}, Case{{128, 1, 64, false, 1024}, 1, false},
                        Case{{20, 2, 16, true, 512}, kAll, false}, Case{{16, 1, 64, false}, 1, false},
                        Case{{128, 1, 64, false}, 1, false}, Case{{128, 1, 64, false}, 1, true},
                        Case{{16, 1, 64, false}, kAll, true}, Case{{32, 1, 128, false}, kAll, true},
                        Case{{128, 1, 64, false}, kAll, true}, Case{{64, 2, 64, true}, kAll, true},
                        Case{{16, 1, 64, false}, kAll, true, 4}, Case{{32, 1, 128, false}, kAll, true, 9},
                        Case{{64, 1, 64, false}, kAll, true, 3}, Case{{128, 1, 64, false}, kAll, true, 5}}) {
    SCOPED_TRACE(name_of({c.extents, 0}) + ", batch " + std::to_string(c.batch) +
                 (c.is_planned ? ", planned, " : ", ") + std::to_string(c.parts));
    const HostCase host(c.extents);
    DeviceCase device(host, c.batch);
    DenseDecodeArguments& args = device.args;
    const std::int64_t rows_q = c.extents.num_heads_q * c.extents.seqlen_q;
    const std::int64_t parts = c.parts > 0 ? c.parts : dense_decode_num_sm_parts(rows_q, 1, kGpu);
    const int plan_size = static_cast<int>(parts) * kTileSchedulerMetadataSize;
    const OnDevice<std::int32_t> plan(std::vector<std::int32_t>(plan_size, -1));
    const OnDevice<std::int32_t> num_splits(std::vector<std::int32_t>(c.batch + 1));
    if (c.is_planned) {
      args.tile_scheduler_metadata = make_tensor(plan.data(), DType::kInt32, kGpu, parts, kTileSchedulerMetadataSize);
      args.num_splits = make_tensor(num_splits.data(), DType::kInt32, kGpu, c.batch + 1);
      plan_dense_decode(args.cache_seqlens, rows_q, args.tile_scheduler_metadata, args.num_splits, stream);
    }
    const std::size_t size = dense_decode_workspace_size(args);
    const OnDevice<unsigned char> workspace(std::vector<unsigned char>(size, 0xff));
    dense_decode(args, workspace.data(), size, stream);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    const std::vector<std::uint16_t> out = device.out.to_host();
    const std::vector<float> lse = device.lse.to_host();
    const std::size_t num_values = out.size() / kSeqlens.size() * c.batch;

    // What is read, what it should be, and what it is before it is written.
    const std::vector<std::int32_t> right[3] = {host.cache_seqlens, host.block_table, plan.to_host()};
    std::int32_t* const arrays[3] = {device.cache_seqlens.data(), device.block_table.data(), plan.data()};
    const OnDevice<std::int32_t> lengths(right[0]), pages(right[1]), rows(right[2]);
    const OnDevice<std::int32_t>* const written[3] = {&lengths, &pages, &rows};
    for (int round = 0; round < 28; ++round) {
      SCOPED_TRACE("round " + std::to_string(round));
      LateCopy copies[3];
      for (int i = 0; i < (c.is_planned ? 3 : 2); ++i) {
        if (((1 + round % 7) >> i & 1) == 0) continue;  // each set of arrays
        std::vector<std::int32_t> wrong = right[i];
        if (round / 7 == 0) {  // of the same kind
          std::rotate(wrong.begin(), wrong.begin() + (i == 2 ? kTileSchedulerMetadataSize : 1), wrong.end());
        } else if (round / 7 == 1) {
          for (std::int32_t& value : wrong) value = static_cast<std::int32_t>(random());
        } else if (round / 7 == 2) {  // every second word only
          for (std::size_t k = 1; k < wrong.size(); k += 2) wrong[k] = right[i][k - 1];
        } else {
          constexpr std::int32_t kValues[] = {0, 1, -1, 100, INT32_MAX, INT32_MIN, 5000};
          std::fill(wrong.begin(), wrong.end(), kValues[round % 7]);
        }
        ASSERT_EQ(cudaMemcpy(arrays[i], wrong.data(), wrong.size() * sizeof(wrong[0]), cudaMemcpyHostToDevice),
                  cudaSuccess);
        copies[i] = {arrays[i], written[i]->data(), static_cast<int>(wrong.size())};
      }
      ASSERT_EQ(cudaMemset(device.out.data(), 0xff, out.size() * sizeof(out[0])), cudaSuccess);
      ASSERT_EQ(cudaMemset(flush, round, kFlushBytes), cudaSuccess);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      copy_late(copies, stream);
      dense_decode(args, workspace.data(), size, stream);
      ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      ASSERT_EQ(std::memcmp(device.out.to_host().data(), out.data(), num_values * sizeof(out[0])), 0);
      ASSERT_EQ(std::memcmp(device.lse.to_host().data(), lse.data(), lse.size() * sizeof(lse[0])), 0);
    }
  }
  ASSERT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  ASSERT_EQ(cudaFree(flush), cudaSuccess);
}

/// CTAs that share a request wait for each other only if all of them run. Not a DenseDecodeGpu: a tool that runs one
/// kernel at a time would wait for ever.
class DenseDecodeOnBusyGpu : public DenseDecodeGpu {
 protected:
  /// Whether the stream's work is done in a time that is enough.
  static bool ends_soon(cudaStream_t stream) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(5);
    while (cudaStreamQuery(stream) == cudaErrorNotReady) {
      if (std::chrono::steady_clock::now() > deadline) return false;
    }
    return cudaStreamQuery(stream) == cudaSuccess;
  }
};

TEST_F(DenseDecodeOnBusyGpu, NeedsNoMoreSmsThanThereAre) {
  int num_sms = 0;
  ASSERT_EQ(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0), cudaSuccess);
  // Up to 1600 tokens and alone, 16 heads have slices of one unit of the tile and of two, whose pieces are added in
  // different ways: a CTA that merges all slices does both in turn. With two parts the longest request is merged by the
  // CTA that begins it, which keeps its piece if the other one runs.
  for (const auto& [num_heads_q, max_tokens, num_parts] : {std::tuple{16, kMaxTokens, 0},
                                                           {16, 1600, 0},
                                                           {32, kMaxTokens, 0},
                                                           {128, kMaxTokens, 0},
                                                           {16, kMaxTokens, 2},
                                                           {32, kMaxTokens, 3},
                                                           {128, kMaxTokens, 2}}) {
    for (const int batch : {1, static_cast<int>(kSeqlens.size())}) {
      const Extents extents{num_heads_q, 1, 64, false, max_tokens, num_parts};
      SCOPED_TRACE(name_of({extents, 0}) + ", batch " + std::to_string(batch));
      const HostCase host(extents);
      const DeviceCase device(host, batch);
      const std::size_t size = dense_decode_workspace_size(device.args);
      const OnDevice<unsigned char> workspace(std::vector<unsigned char>(size, 0xff));
      // Replayed, so that what a launch leaves in the workspace meets one with the same token.
      const CapturedDecode call(device.args, workspace.data(), size);
      std::vector<std::uint16_t> out;
      std::vector<float> lse;
      for (const int num_busy : {0, 1, num_sms / 2, 0, num_sms - 1, num_sms / 3, 0}) {
        SCOPED_TRACE(std::to_string(num_busy) + " SMs are busy");
        ASSERT_EQ(cudaMemset(device.out.data(), 0xff, host.out.size() * sizeof(host.out[0])), cudaSuccess);
        ASSERT_EQ(cudaMemset(device.lse.data(), 0xff, host.lse.size() * sizeof(host.lse[0])), cudaSuccess);
        ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
        {
          const BusySms busy(num_busy);
          for (int replay = 0; replay < 3; ++replay) call.replay();
          ASSERT_TRUE(ends_soon(call.stream()));
        }
        if (out.empty()) {
          out = device.out.to_host();
          lse = device.lse.to_host();
        }
        ASSERT_EQ(device.out.to_host(), out);
        ASSERT_EQ(std::memcmp(device.lse.to_host().data(), lse.data(), lse.size() * sizeof(lse[0])), 0);
      }
    }
  }
}

TEST(DenseDecodeWithoutGpu, SaysWhatIsMissing) {
  if (has_hopper()) GTEST_SKIP() << "this machine has a Hopper GPU";
  // Addresses of the host stand in for the GPU's: nothing may be read before the error.
  HostCase host(Extents{16, 1, 64, false});
  try {
    dense_decode(host_arguments(host, kGpu), nullptr, 0, nullptr);
    FAIL() << "expected Unsupported";
  } catch (const Unsupported& error) {
    EXPECT_NE(std::string(error.what()).find("Hopper"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace flash_mla

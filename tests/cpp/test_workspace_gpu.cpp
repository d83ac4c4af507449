// What a decode on a GPU may find in its workspace, and what it leaves there. Skipped, by name, without a Hopper GPU.

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "decode_case.h"
#include "flash_mla/flash_mla.h"
#include "on_device.h"

namespace flash_mla {
namespace {

/// What says that a piece is there, or a row's total. If it stays, it tells so to a replayed graph too, which has the
/// same token. Flags are the workspace's first words where a plan is given: of each tile two for each part, whether its
/// CTA runs, a count, and how its request is merged. Slots follow, in each of which a tile has values, then totals of
/// two words, the second with the token.
TEST_F(DenseDecodeGpu, LeavesNothingAnnounced) {
  const int batch_of_all = static_cast<int>(kSeqlens.size());
  constexpr int kManyParts = 160;  // more CTAs than SMs: not all run at the same time
  struct Case {
    int num_heads_q;
    int batch;
    int num_parts;   // of the plan; 0: as many as are advised
    bool is_broken;  // the plan contradicts itself
  };
  for (const Case& c :
       {Case{16, batch_of_all, 0, false}, Case{32, batch_of_all, 0, false}, Case{128, batch_of_all, 0, false},
        Case{16, 1, 0, false}, Case{32, 1, 0, false}, Case{128, 1, 0, false}, Case{16, batch_of_all, 2, false},
        Case{32, batch_of_all, 3, false}, Case{128, batch_of_all, 2, false}, Case{16, batch_of_all, kManyParts, false},
        Case{128, batch_of_all, kManyParts, false}, Case{16, batch_of_all, 0, true},
        Case{128, batch_of_all, 0, true}}) {
    SCOPED_TRACE(std::to_string(c.num_heads_q) + " heads, batch " + std::to_string(c.batch) + ", " +
                 std::to_string(c.num_parts) + " parts" + (c.is_broken ? ", broken plan" : ""));
    HostCase host(Extents{c.num_heads_q, 1, 64, false});
    if (c.batch == 1) host.cache_seqlens[0] = 777;  // few pieces, so that other CTAs merge too
    DeviceCase device(host, c.batch);
    DenseDecodeArguments& args = device.args;
    const std::int64_t planned_parts =
        c.num_parts > 0 ? c.num_parts : dense_decode_num_sm_parts(c.num_heads_q, 1, kGpu);
    const GivenPlan plan(args, planned_parts);
    std::vector<std::int32_t> rows_of_plan = plan.metadata.to_host();
    for (std::int64_t part = 2; c.is_broken && part < planned_parts; part += 3) {
      std::int32_t* const row = &rows_of_plan[part * kTileSchedulerMetadataSize];
      if (row[1] > 0) ++row[5];  // begins within a request; which part begins that
    }
    const OnDevice<std::int32_t> metadata(rows_of_plan);
    args.tile_scheduler_metadata.data = metadata.data();
    const std::size_t size = dense_decode_workspace_size(args);
    const OnDevice<std::uint64_t> workspace(std::vector<std::uint64_t>((size + 7) / 8, 0));
    // A request of few heads that is alone gets a part for each block that the table has room for.
    const std::int64_t parts = c.batch == 1 && c.num_heads_q <= 32 ? kMaxTokens / 64 : planned_parts;
    const std::int64_t rows = c.num_heads_q > 32 ? 64 : c.batch == 1 ? 16 : c.num_heads_q;
    const std::int64_t tiles = c.num_heads_q / rows;
    const std::int64_t totals = rows * 2;                           // of a tile: of each row for each consumer
    const std::int64_t values = rows * 512 / (rows == 64 ? 4 : 2);  // words: float16, float32
    const std::int64_t tile_words = values + 2 * totals;
    const std::int64_t slots = (tiles * 5 * parts + 15) / 16 * 16;  // they begin at a line
    ASSERT_EQ(static_cast<std::int64_t>(size / 8), slots + 2 * parts * tiles * tile_words);
    for (int launch = 0; launch < 10; ++launch) {
      dense_decode(args, workspace.data(), size, nullptr);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      const std::vector<std::uint64_t> words = workspace.to_host();
      for (std::int64_t word = 0; word < 5 * parts * tiles; ++word) {
        const bool is_count = word / parts % 5 == 3;
        ASSERT_TRUE(is_count || words[word] == 0) << "launch " << launch << ", word " << word;
      }
      for (std::int64_t slot = 0; slot < 2 * parts * tiles; ++slot) {
        const std::int64_t end = slots + (slot + 1) * tile_words;
        for (std::int64_t total = 0; total < totals; ++total) {
          ASSERT_EQ(words[end - 2 * total - 1], 0U) << "launch " << launch << ", slot " << slot << ", total " << total;
        }
      }
    }
  }
}

/// Between two replays of a graph its workspace may be anybody's, as PyTorch's graphs share their memory. So a replay
/// must not take for its own what another one left there, whatever became of the words around it.
TEST_F(DenseDecodeGpu, ReplaysWhateverTheWorkspaceHolds) {
  for (const auto& [num_heads_q, batch, num_parts] : {std::tuple{16, 1, 0},
                                                      {32, 1, 0},
                                                      {128, 1, 0},
                                                      {16, 5, 0},
                                                      {32, 5, 0},
                                                      {128, 5, 0},
                                                      {16, 5, 2},
                                                      {32, 5, 3},
                                                      {128, 5, 2},
                                                      {16, 5, 132},
                                                      {128, 5, 66}}) {
    const Extents extents{num_heads_q, 1, 64, false, kMaxTokens, num_parts};
    SCOPED_TRACE(name_of({extents, 0}) + ", batch " + std::to_string(batch));
    const HostCase host(extents);
    const DeviceCase device(host, batch);
    const std::size_t num_words = (dense_decode_workspace_size(device.args) + 7) / 8;
    std::mt19937_64 random(5);
    std::vector<std::uint64_t> words(num_words);
    std::generate(words.begin(), words.end(), std::ref(random));
    const OnDevice<std::uint64_t> workspace(words);

    // Two versions of what a replay reads, and what comes of them.
    std::vector<std::uint16_t> k_caches[2] = {host.k_cache, random_bfloat16(host.k_cache.size(), 6)};
    std::vector<std::int32_t> lengths[2] = {host.cache_seqlens, host.cache_seqlens};
    if (num_parts == 0) std::reverse(lengths[1].begin(), lengths[1].end());  // a plan is for one set of lengths
    std::vector<std::uint16_t> out[2];
    std::vector<float> lse[2];
    const auto decode = [&](int version, const auto& call) {
      device.k_cache.set(k_caches[version]);
      device.cache_seqlens.set(lengths[version]);
      device.out.set(host.out);  // NaN
      device.lse.set(host.lse);
      EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);  // a graph's stream does not wait for copies
      call();
      EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    };
    for (const int version : {0, 1}) {
      decode(version, [&] { dense_decode(device.args, workspace.data(), num_words * 8, nullptr); });
      out[version] = device.out.to_host();
      lse[version] = device.lse.to_host();
    }
    ASSERT_NE(out[0], out[1]);

    const CapturedDecode captured(device.args, workspace.data(), num_words * 8);
    const std::vector<std::uint64_t> before_all = words = workspace.to_host();
    std::vector<std::uint64_t> before_last = words;
    std::uniform_real_distribution<double> any_bits(0.0, std::log2(num_words));
    const auto any_word = [&] { return static_cast<std::size_t>(std::exp2(any_bits(random))); };
    for (int round = 0; round < 40; ++round) {
      SCOPED_TRACE("replay " + std::to_string(round));
      // Where others write: from the begin, to the end, between, and here and there. Flags are a small part, in front.
      const std::size_t words_of_range[2] = {any_word(), any_word()};
      const auto [first, last] = std::minmax(words_of_range[0], words_of_range[1]);
      const std::size_t begin = round % 4 == 0 ? 0 : first;
      const std::size_t end = round % 4 == 1 ? num_words : last;
      const bool is_sparse = round % 4 == 3;
      for (std::size_t i = begin; i < end; ++i) {
        if (is_sparse && random() % 2 == 0) continue;
        const std::uint64_t values[5] = {before_last[i], before_all[i], 0, ~std::uint64_t{0}, random()};
        words[i] = values[round / 4 % 5];
      }
      workspace.set(words);
      before_last = words;
      const int version = round % 2;
      decode(version, [&] { captured.replay(); });
      ASSERT_EQ(device.out.to_host(), out[version]);
      ASSERT_EQ(std::memcmp(device.lse.to_host().data(), lse[version].data(), lse[version].size() * sizeof(float)), 0);
      words = workspace.to_host();
    }
  }
}

TEST_F(DenseDecodeGpu, ChecksTheWorkspace) {
  const DeviceCase device(HostCase(Extents{16, 1, 64, false}));
  EXPECT_THROW(dense_decode(device.args, nullptr, 0, nullptr), InvalidArgument);
  const std::size_t size = dense_decode_workspace_size(device.args);
  const OnDevice<unsigned char> workspace(std::vector<unsigned char>(size + 16));
  EXPECT_THROW(dense_decode(device.args, workspace.data(), size - 1, nullptr), InvalidArgument);
  try {
    dense_decode(device.args, workspace.data() + 8, size, nullptr);
    FAIL() << "expected InvalidArgument";
  } catch (const InvalidArgument& error) {
    const std::string text = "workspace: expected an address that is a multiple of 16, got 0x";
    EXPECT_EQ(std::string(error.what()).substr(0, text.size()), text);
  }
}

}  // namespace
}  // namespace flash_mla

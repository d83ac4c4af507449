// The plans that a warp makes, lane by lane on the CPU: they are the host's.

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "host_plan.h"
#include "warp_on_cpu/warp_on_cpu.h"

// The device's code, behind what it needs on the CPU.
#include "scheduler/small_plan.cuh"
#include "scheduler/warp_plan.cuh"

namespace flash_mla::scheduler {
namespace {

bool operator==(const Part& a, const Part& b) {
  return a.begin_request == b.begin_request && a.begin_block == b.begin_block && a.end_request == b.end_request &&
         a.end_block == b.end_block && a.num_pieces == b.num_pieces && a.first_part == b.first_part;
}

std::string text_of(const Part& p) {
  std::string text;
  for (const std::int32_t value :
       {p.begin_request, p.begin_block, p.end_request, p.end_block, p.num_pieces, p.first_part}) {
    text += std::to_string(value) + " ";
  }
  return text;
}

/// One row, as all lanes find it, and the number of pieces of the request that it continues.
void expect_row(const Plan& host, std::int32_t part, const std::vector<Part>& rows,
                const std::vector<std::int32_t>& continued) {
  const Part& expected = host.parts[part];
  const std::int32_t* const splits = &host.num_splits[expected.begin_block > 0 ? expected.begin_request : 0];
  const std::int32_t pieces = expected.begin_block > 0 ? splits[1] - splits[0] : 0;
  for (int lane = 0; lane < WarpOnCpu::kLanes; ++lane) {
    ASSERT_TRUE(rows[lane] == expected) << "part " << part << ", lane " << lane << ": " << text_of(rows[lane]) << "for "
                                        << text_of(expected);
    ASSERT_EQ(continued[lane], pieces) << "part " << part << ", lane " << lane;
  }
}

/// Whether SmallPlan made them.
bool expect_rows_of_the_host(const std::vector<std::int32_t>& seqlens, std::int32_t num_parts, QueryTiles tiles,
                             const std::vector<std::int32_t>& parts) {
  const auto batch_size = static_cast<std::int32_t>(seqlens.size());
  const Plan host = make_plan(seqlens, num_parts, tiles);
  bool is_small = false;
  for (const std::int32_t part : parts) {
    std::vector<Part> rows(WarpOnCpu::kLanes);
    std::vector<std::int32_t> continued(WarpOnCpu::kLanes, -1);
    EXPECT_TRUE(WarpOnCpu::run([&] {
      const int lane = WarpOnCpu::lane();
      const WarpPlan plan(seqlens.data(), batch_size, num_parts, tiles);
      rows[lane] = plan.row(part, continued[lane]);
    }));
    expect_row(host, part, rows, continued);
    rows.assign(WarpOnCpu::kLanes, Part{});
    continued.assign(WarpOnCpu::kLanes, -1);
    std::vector<char> is_made(WarpOnCpu::kLanes);
    EXPECT_TRUE(WarpOnCpu::run([&] {
      const int lane = WarpOnCpu::lane();
      is_made[lane] = static_cast<char>(
          SmallPlan::make(seqlens.data(), batch_size, num_parts, tiles, part, rows[lane], continued[lane]));
    }));
    EXPECT_EQ(is_made, std::vector<char>(WarpOnCpu::kLanes, is_made[0]));
    if (is_made[0] != 0) expect_row(host, part, rows, continued);
    is_small = is_made[0] != 0;
  }
  return is_small;
}

TEST(WarpPlan, IsThatOfTheHost) {
  std::mt19937 random(4);
  const auto any = [&](int first, int last) {
    return first + static_cast<int>(random() % static_cast<unsigned>(last - first + 1));
  };
  int num_small = 0;
  for (int round = 0; round < 600; ++round) {
    const int num_parts = std::vector<int>{2, 33, 44, 66, 131, 132, 160}[any(0, 6)];
    const int batch_size = any(2, round % 2 == 0 ? std::min(num_parts, 32) : num_parts);
    const int blocks = any(1, 20);
    const int kind = any(0, 6);
    std::vector<std::int32_t> seqlens(batch_size);
    for (std::int32_t& value : seqlens) {
      if (kind <= 2) value = (blocks + any(0, kind)) * kBlockN;  // about equal
      if (kind == 3) value = any(0, 5) == 0 ? 0 : blocks * kBlockN;
      if (kind == 4) value = any(-100, 4000);
      if (kind == 5) value = any(0, 9) == 0 ? any(1, 1 << 20) : any(1, 200);
      if (kind == 6) value = any(0, 40) == 0 ? INT32_MAX : any(0, 1 << 20);
    }
    for (const QueryTiles tiles :
         {QueryTiles::k16Rows, QueryTiles::k32Rows, QueryTiles::k64Rows, QueryTiles::kSeveral}) {
      SCOPED_TRACE("round " + std::to_string(round) + ": " + std::to_string(batch_size) + " requests, the first of " +
                   std::to_string(seqlens[0]) + " tokens, " + std::to_string(num_parts) + " parts, tiles " +
                   std::to_string(static_cast<int>(tiles)));
      const std::vector<std::int32_t> parts{0, num_parts - 1, any(0, num_parts - 1)};
      num_small += expect_rows_of_the_host(seqlens, num_parts, tiles, parts) ? 1 : 0;
      if (HasFailure()) return;
    }
  }
  EXPECT_GT(num_small, 200);
}

TEST(WarpPlan, CountsTheHostsSplits) {
  std::mt19937 random(5);
  for (const int batch_size : {2, 31, 32, 33, 66, 132}) {
    std::vector<std::int32_t> seqlens(batch_size);
    for (std::int32_t& value : seqlens) value = static_cast<std::int32_t>(random() % 5000);
    const Plan host = make_plan(seqlens, 132, QueryTiles::k64Rows);
    std::vector<std::int32_t> num_splits(batch_size + 1, -1);
    ASSERT_TRUE(WarpOnCpu::run(
        [&] { WarpPlan(seqlens.data(), batch_size, 132, QueryTiles::k64Rows).write_num_splits(num_splits.data()); }));
    EXPECT_EQ(num_splits, host.num_splits) << batch_size << " requests";
  }
}

// SmallPlan's way for a request that is alone is arithmetic only.
TEST(WarpPlan, OfALoneRequestIsTheHosts) {
  for (const std::int32_t seqlen : {-1, 0, 1, 64, 65, 777, 8192, 65536, 100000, 1 << 20}) {
    for (const int num_parts : {1, 2, 33, 66, 132, 160}) {
      const Plan host = make_plan({seqlen}, num_parts);
      for (std::int32_t part = 0; part < num_parts; ++part) {
        Part row;
        EXPECT_EQ(SmallPlan::make_alone(seqlen, num_parts, part, row), host.num_splits[1]);
        EXPECT_TRUE(row == host.parts[part]) << text_of(row) << "for " << text_of(host.parts[part]);
      }
    }
  }
}

// That the tests above can fail: a lane that goes its own way is noticed.
TEST(WarpOnCpu, NoticesLanesThatPart) {
  EXPECT_TRUE(WarpOnCpu::run([] { EXPECT_TRUE(__any_sync(~0U, threadIdx.x == 31)); }));
  EXPECT_FALSE(WarpOnCpu::run([] {
    if (threadIdx.x == 7) __all_sync(~0U, true);
  }));
  EXPECT_FALSE(WarpOnCpu::run([] { threadIdx.x < 7 ? __all_sync(~0U, true) : __any_sync(~0U, true); }));
}

}  // namespace
}  // namespace flash_mla::scheduler

// The split of work: the formulas that host and device share, run on the host.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "api/parts.h"
#include "host_plan.h"
#include "scheduler/plan.h"

namespace flash_mla::scheduler {
namespace {

/// Walks the parts as the kernel does: every block of every request once and in order, every request at least once, no
/// empty piece, and pieces counted rightly. Returns the parts' costs.
std::vector<std::int64_t> check_cover(const std::vector<std::int32_t>& seqlens, const Plan& plan) {
  std::vector<std::int64_t> costs;
  std::int32_t request = 0;     // the next one to be worked
  std::int64_t next_block = 0;  // of it
  std::vector<std::int32_t> pieces(seqlens.size(), 0);
  for (const Part& part : plan.parts) {
    std::int64_t cost = 0;
    for (std::int32_t i = part.begin_request; i <= part.end_request; ++i) {
      const std::int64_t blocks = num_blocks(seqlens[i]);
      const std::int64_t begin = i == part.begin_request ? part.begin_block : 0;
      const std::int64_t end = i == part.end_request && part.end_block != kToEnd ? part.end_block : blocks;
      EXPECT_EQ(i, request);
      EXPECT_EQ(begin, next_block);
      EXPECT_LE(end, blocks);
      EXPECT_TRUE(begin < end || blocks == 0) << "empty piece of request " << i;
      if (testing::Test::HasFailure()) return costs;
      ++pieces[i];
      cost += end - begin;
      const bool ends_here = i < part.end_request || part.end_block == kToEnd;
      request += ends_here ? 1 : 0;
      next_block = ends_here ? 0 : end;
    }
    costs.push_back(cost);
  }
  EXPECT_EQ(request, static_cast<std::int32_t>(seqlens.size()));

  EXPECT_EQ(plan.num_splits[0], 0);
  for (std::size_t i = 0; i < seqlens.size(); ++i) {
    EXPECT_EQ(plan.num_splits[i + 1] - plan.num_splits[i], pieces[i]) << "request " << i;
  }
  for (std::size_t p = 0; p < plan.parts.size(); ++p) {
    const Part& part = plan.parts[p];
    if (part.begin_block > 0) {
      const Part& first = plan.parts[part.first_part];
      EXPECT_LT(part.first_part, static_cast<std::int32_t>(p));
      EXPECT_EQ(first.end_request, part.begin_request);
      EXPECT_TRUE(first.begin_request < first.end_request || first.begin_block == 0);
    }
    const bool begins_its_last = part.end_request > part.begin_request || part.begin_block == 0;
    if (part.begin_request <= part.end_request && begins_its_last) {
      EXPECT_EQ(part.num_pieces, pieces[part.end_request]);
    }
  }
  return costs;
}

std::vector<std::int32_t> lengths(const std::string& kind, int batch_size, std::mt19937& random) {
  std::vector<std::int32_t> values(batch_size);
  for (std::int32_t& value : values) {
    if (kind == "zero") value = 0;
    if (kind == "one") value = 1;
    if (kind == "equal") value = 4096;
    if (kind == "short") value = static_cast<std::int32_t>(random() % 200);
    if (kind == "sparse") value = random() % 10 == 0 ? static_cast<std::int32_t>(random() % 8192) : 0;
    if (kind == "long") value = static_cast<std::int32_t>(random() % ((1 << 20) + 1));
    if (kind == "negative") value = -static_cast<std::int32_t>(random() % 100);
  }
  return values;
}

class SchedulerTest : public testing::TestWithParam<std::string> {};

TEST_P(SchedulerTest, CoversEveryBlockOnceWithinTheBound) {
  std::mt19937 random(7);
  for (const int batch_size : {1, 2, 3, 31, 64, 128, 129, 1024, 1025, 5000, 100000}) {
    for (const int num_parts : {1, 2, 16, 33, 66, 132, 500}) {
      const QueryTiles tiles =
          std::array{QueryTiles::k16Rows, QueryTiles::k32Rows, QueryTiles::k64Rows, QueryTiles::kSeveral}[random() % 4];
      SCOPED_TRACE("batch " + std::to_string(batch_size) + ", parts " + std::to_string(num_parts));
      const std::vector<std::int32_t> seqlens = lengths(GetParam(), batch_size, random);
      const Plan plan = make_plan(seqlens, num_parts, tiles);
      check_cover(seqlens, plan);
      if (HasFailure()) return;

      // In units of blocks with the fixed cost of each piece: no part above its share, one more fixed cost, one block,
      // and what keeping requests whole may cost, which is what merging would, and a second piece. Cuts see a lower
      // cost of pieces where parts are short.
      Workload work;
      for (const std::int32_t seqlen : seqlens) work.add(seqlen);
      const SplitPlan split(work, num_parts);
      const auto bound = [&](std::int64_t total_cost, std::int64_t piece_cost) {
        const std::int64_t share = total_cost / split.num_parts();
        return share + piece_cost + 1 + merge_cost(tiles, share) + kMaxPieceCost;
      };
      for (const Part& part : plan.parts) {
        std::int64_t cost = 0;
        std::int64_t full_cost = 0;
        for (std::int32_t i = part.begin_request; i <= part.end_request; ++i) {
          const std::int64_t begin = i == part.begin_request ? part.begin_block : 0;
          const std::int64_t end =
              i == part.end_request && part.end_block != kToEnd ? part.end_block : num_blocks(seqlens[i]);
          cost += seqlens[i] > 0 ? end - begin + split.piece_cost() : 1;
          full_cost += seqlens[i] > 0 ? end - begin + kMaxPieceCost : 1;
        }
        EXPECT_TRUE(cost <= bound(split.total_cost(), split.piece_cost()) ||
                    full_cost <= bound(split.full_cost(), kMaxPieceCost));
      }
      if (HasFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Lengths, SchedulerTest,
                         testing::Values("zero", "one", "equal", "short", "sparse", "long", "negative"),
                         [](const auto& info) { return info.param; });

// With cuts at equal distances, of 1.9 blocks, some parts had pieces of three requests, and took as long as ten blocks.
TEST(Scheduler, ShortRequestsHavePartsOfTheirOwn) {
  std::mt19937 random(8);
  for (int round = 0; round < 100; ++round) {
    std::vector<std::int32_t> seqlens(40);
    for (std::int32_t& seqlen : seqlens) seqlen = 1 + static_cast<std::int32_t>(random() % 800);
    const Plan plan = make_plan(seqlens, 132);
    check_cover(seqlens, plan);
    for (const Part& part : plan.parts) {
      ASSERT_LE(part.end_request - part.begin_request, 0) << "round " << round;
    }
  }
}

// What was measured: docs/kernels/dense_decode.md, "What a plan decides for short requests", "Whole, or split".
TEST(Scheduler, SplitsEqualRequestsWhereThatIsSooner) {
  struct Case {
    int batch_size;
    int blocks;  // of each request
    int num_parts;
    QueryTiles tiles;
    bool is_split;
  };
  for (const Case& c : {// Parts of their own.
                        Case{40, 4, 132, QueryTiles::k16Rows, false}, Case{48, 5, 132, QueryTiles::k32Rows, true},
                        Case{40, 4, 132, QueryTiles::k64Rows, false}, Case{30, 4, 132, QueryTiles::k64Rows, true},
                        Case{20, 5, 66, QueryTiles::kSeveral, true}, Case{20, 4, 66, QueryTiles::kSeveral, false},
                        Case{15, 4, 66, QueryTiles::kSeveral, true}, Case{64, 5, 132, QueryTiles::k64Rows, false},
                        Case{40, 3, 132, QueryTiles::k64Rows, false}, Case{30, 5, 66, QueryTiles::kSeveral, true},
                        Case{10, 3, 66, QueryTiles::kSeveral, true}, Case{10, 2, 66, QueryTiles::kSeveral, false},
                        Case{33, 2, 66, QueryTiles::kSeveral, false},
                        // A part for each, or cuts.
                        Case{121, 64, 132, QueryTiles::k16Rows, true}, Case{122, 64, 132, QueryTiles::k16Rows, false},
                        Case{109, 64, 132, QueryTiles::k64Rows, true}, Case{110, 64, 132, QueryTiles::k64Rows, false},
                        Case{120, 128, 132, QueryTiles::k64Rows, true}, Case{121, 128, 132, QueryTiles::k64Rows, false},
                        Case{92, 27, 132, QueryTiles::k64Rows, true}, Case{45, 24, 66, QueryTiles::kSeveral, true},
                        Case{62, 131, 66, QueryTiles::kSeveral, false}, Case{80, 8, 132, QueryTiles::k16Rows, true},
                        Case{124, 32, 132, QueryTiles::k16Rows, false}, Case{120, 64, 132, QueryTiles::k16Rows, true},
                        Case{74, 8, 132, QueryTiles::k32Rows, false}, Case{74, 12, 132, QueryTiles::k32Rows, true},
                        Case{120, 64, 132, QueryTiles::k32Rows, false}, Case{111, 96, 132, QueryTiles::k32Rows, true},
                        Case{80, 8, 132, QueryTiles::k64Rows, false}, Case{90, 13, 132, QueryTiles::k64Rows, false},
                        Case{102, 24, 132, QueryTiles::k64Rows, false}, Case{83, 24, 132, QueryTiles::k64Rows, true},
                        Case{111, 64, 132, QueryTiles::k64Rows, false}, Case{102, 64, 132, QueryTiles::k64Rows, true},
                        Case{128, 128, 132, QueryTiles::k64Rows, false}, Case{40, 8, 66, QueryTiles::kSeveral, false},
                        Case{20, 9, 33, QueryTiles::kSeveral, false}, Case{46, 24, 66, QueryTiles::kSeveral, false},
                        Case{42, 24, 66, QueryTiles::kSeveral, true}, Case{60, 128, 66, QueryTiles::kSeveral, true},
                        // Several for each, or cuts.
                        Case{220, 4, 132, QueryTiles::k16Rows, false}, Case{220, 8, 132, QueryTiles::k16Rows, true},
                        Case{180, 4, 132, QueryTiles::k32Rows, false}, Case{180, 8, 132, QueryTiles::k32Rows, true},
                        Case{220, 16, 132, QueryTiles::k64Rows, false}, Case{200, 16, 132, QueryTiles::k64Rows, true},
                        Case{264, 64, 132, QueryTiles::k64Rows, false}, Case{200, 64, 132, QueryTiles::k64Rows, true},
                        Case{100, 8, 66, QueryTiles::kSeveral, false}, Case{80, 8, 66, QueryTiles::kSeveral, true}}) {
    SCOPED_TRACE(std::to_string(c.batch_size) + " requests of " + std::to_string(c.blocks) + " blocks, " +
                 std::to_string(c.num_parts) + " parts, tiles " + std::to_string(static_cast<int>(c.tiles)));
    const std::vector<std::int32_t> seqlens(c.batch_size, c.blocks * kBlockN);
    const Plan plan = make_plan(seqlens, c.num_parts, c.tiles);
    check_cover(seqlens, plan);
    EXPECT_EQ(plan.num_splits[c.batch_size] > c.batch_size, c.is_split);
  }
}

TEST(Scheduler, HasAPartForEachCtaThatTheSmsHold) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  EXPECT_EQ(num_sm_parts(132, 1, 1), 132);
  EXPECT_EQ(num_sm_parts(132, 64, 1), 132);
  EXPECT_EQ(num_sm_parts(132, 65, 1), 66);
  EXPECT_EQ(num_sm_parts(132, 128, 2), 33);
  EXPECT_EQ(query_tiles(16), QueryTiles::k16Rows);
  EXPECT_EQ(query_tiles(17), QueryTiles::k32Rows);
  EXPECT_EQ(query_tiles(33), QueryTiles::k64Rows);
  EXPECT_EQ(query_tiles(65), QueryTiles::kSeveral);
  static_assert(num_sm_parts(132, kMost, 1) == 1, "a constant, which must not overflow");
  static_assert(num_sm_parts(132, 1, kMost) == 1);
}

TEST(Scheduler, BalancesOneLongRequestWithinOneBlock) {
  for (const std::int32_t seqlen : {64, 640, 8192, 65536, 1 << 20}) {
    for (const int num_parts : {2, 33, 66, 132}) {
      const Plan plan = make_plan({seqlen}, num_parts);
      std::vector<std::int64_t> costs = check_cover({seqlen}, plan);
      costs.erase(std::remove(costs.begin(), costs.end(), 0), costs.end());
      const std::int64_t quota = (num_blocks(seqlen) + num_parts - 1) / num_parts;
      EXPECT_EQ(static_cast<std::int64_t>(costs.size()), (num_blocks(seqlen) + quota - 1) / quota);
      const auto [low, high] = std::minmax_element(costs.begin(), costs.end());
      EXPECT_LE(*high - *low, 1) << seqlen << " tokens, " << num_parts << " parts";
    }
  }
}

TEST(Scheduler, PlansARequestThatIsAloneLikeAnyOther) {
  for (const std::int32_t seqlen : {-3, 0, 1, 64, 65, 1000, 8192, 65537, 1 << 20, INT32_MAX}) {
    for (const std::int32_t num_parts : {1, 2, 33, 66, 132, 160}) {
      SCOPED_TRACE(std::to_string(seqlen) + " tokens, " + std::to_string(num_parts) + " parts");
      const Plan plan = make_plan({seqlen}, num_parts);
      for (std::int32_t p = 0; p < num_parts; ++p) {
        Part row;
        EXPECT_EQ(SplitPlan::write_alone(row, seqlen, p, num_parts), plan.num_splits[1]);
        EXPECT_EQ(row.begin_request, plan.parts[p].begin_request);
        EXPECT_EQ(row.begin_block, plan.parts[p].begin_block);
        EXPECT_EQ(row.end_request, plan.parts[p].end_request);
        EXPECT_EQ(row.end_block, plan.parts[p].end_block);
        EXPECT_EQ(row.num_pieces, plan.parts[p].num_pieces);
        if (row.begin_block > 0) {
          EXPECT_EQ(row.first_part, plan.parts[p].first_part);
        }
      }
    }
  }
}

TEST(Scheduler, KeepsEqualRequestsWhole) {
  for (const auto& [batch_size, seqlen, num_parts] :
       std::vector<std::array<int, 3>>{{128, 4096, 66}, {64, 16384, 66}, {128, 8192, 132}, {64, 8192, 33}}) {
    const Plan plan = make_plan(std::vector<std::int32_t>(batch_size, seqlen), num_parts);
    EXPECT_EQ(plan.num_splits[batch_size], batch_size);
  }
}

TEST(Scheduler, SplitsAFewLongRequests) {
  const Plan plan = make_plan(std::vector<std::int32_t>(4, 4096), 132);
  EXPECT_EQ(plan.num_splits[4], 128);  // of two blocks each
}

/// WarpPlan takes it from the least quota for all.
TEST(Scheduler, KeepsNoFewerRequestsWholeWithALargerQuota) {
  for (const QueryTiles tiles : {QueryTiles::k16Rows, QueryTiles::k32Rows, QueryTiles::k64Rows, QueryTiles::kSeveral}) {
    for (std::int64_t quota = 1; quota < 100; ++quota) {
      EXPECT_LE(SplitPlan::longest_kept_whole(tiles, quota, quota),
                SplitPlan::longest_kept_whole(tiles, quota + 1, quota))
          << "quota " << quota;
    }
  }
}

TEST(Scheduler, GivesEqualRequestsPartsOfTheirOwn) {
  const Plan plan = make_plan(std::vector<std::int32_t>(16, 2048), 132);
  for (std::size_t p = 0; p < 128; ++p) {
    EXPECT_EQ(plan.parts[p].begin_request, plan.parts[p].end_request);
    EXPECT_EQ(plan.parts[p].begin_request, static_cast<std::int32_t>(p / 8));
    EXPECT_EQ(plan.parts[p].begin_block, static_cast<std::int32_t>(p % 8 * 4));
  }
}

TEST(Scheduler, CutsWhereOneRequestIsMuchLongerThanTheOthers) {
  std::vector<std::int32_t> seqlens(65, 64);
  seqlens.push_back(1000 * 64);
  const Plan plan = make_plan(seqlens, 66);
  const std::vector<std::int64_t> costs = check_cover(seqlens, plan);
  EXPECT_LE(*std::max_element(costs.begin(), costs.end()), 1065 / 66 + 6);
}

TEST(Scheduler, AnEmptyBatchLeavesEmptyParts) {
  const Plan plan = make_plan({}, 3);
  EXPECT_EQ(plan.num_splits[0], 0);
  for (const Part& part : plan.parts) EXPECT_GT(part.begin_request, part.end_request);
}

}  // namespace
}  // namespace flash_mla::scheduler

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <ostream>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dense_decode.h"
#include "flash_mla/flash_mla.h"

namespace flash_mla {
namespace {

constexpr std::uint16_t kNan16 = 0x7fff;  // NaN as bfloat16 and as float16
constexpr float kCanary = -12345.0F;
constexpr std::uint16_t kCanary16 = 0x5a5a;
constexpr std::int64_t kGuard = 32;  // elements before and after an array's own

double decode(std::uint16_t bits, DType dtype) {
  const int mantissa_bits = dtype == DType::kBFloat16 ? 7 : 10;
  const int bias = dtype == DType::kBFloat16 ? 127 : 15;
  const int magnitude = bits & 0x7fff;
  const int exponent = magnitude >> mantissa_bits;
  const int mantissa = magnitude & ((1 << mantissa_bits) - 1);
  const int max_exponent = 0x7fff >> mantissa_bits;
  double value =
      std::ldexp(mantissa + (exponent > 0 ? 1 << mantissa_bits : 0), std::max(exponent, 1) - bias - mantissa_bits);
  if (exponent == max_exponent) value = mantissa != 0 ? std::nan("") : HUGE_VAL;
  return (bits & 0x8000) != 0 ? -value : value;
}

/// An array with guard elements around it and, if asked, gaps between its rows.
template <class T>
struct Array {
  template <class... Extents>
  Array(DType dtype, std::int64_t gap, T fill, Extents... shape)
      : view(make_tensor(nullptr, dtype, Device{}, shape...)) {
    std::int64_t stride = 1;
    for (int i = view.rank - 1; i >= 0; --i) {
      view.strides[i] = stride;
      stride = stride * std::max<std::int64_t>(view.shape[i], 1) + gap;
    }
    values.assign(static_cast<std::size_t>(stride + 2 * kGuard), fill);
    view.data = values.data() + kGuard;
  }
  template <class... Indices>
  T& at(Indices... indices) {
    const std::int64_t index[] = {static_cast<std::int64_t>(indices)...};
    std::int64_t offset = kGuard;
    for (int i = 0; i < view.rank; ++i) offset += index[i] * view.strides[i];
    return values.at(static_cast<std::size_t>(offset));
  }
  std::vector<T> values;
  Tensor view;
};

struct Case {
  std::string name;
  std::vector<std::int32_t> cache_seqlens;
  std::int64_t seqlen_q = 1;
  std::int64_t num_heads_q = 1;
  std::int64_t num_heads_k = 1;
  std::int64_t page_size = 64;
  std::int64_t max_pages = 3;
  bool causal = false;
  std::int64_t gap = 0;  // elements between rows of q, k_cache, block_table, out and lse
  float softmax_scale = kDefaultSoftmaxScale;
};

std::ostream& operator<<(std::ostream& stream, const Case& c) { return stream << c.name; }

/// A call whose every dead cell and unused table entry is poison, with its oracle in float64.
struct Problem {
  const Case spec;
  const DType dtype;
  const std::int64_t batch_size;
  const std::int64_t num_pages;
  std::mt19937 random{20260101};
  Array<std::uint16_t> q;
  Array<std::uint16_t> k_cache;
  Array<std::int32_t> block_table;
  Array<std::int32_t> cache_seqlens;
  Array<std::uint16_t> out;
  Array<float> lse;

  Problem(const Case& c, DType element)
      : spec(c),
        dtype(element),
        batch_size(static_cast<std::int64_t>(c.cache_seqlens.size())),
        num_pages(batch_size * c.max_pages + 1),
        q(dtype, c.gap, kNan16, batch_size, c.seqlen_q, c.num_heads_q, kHeadDimQk),
        k_cache(dtype, c.gap, kNan16, num_pages, c.page_size, c.num_heads_k, kHeadDimQk),
        block_table(DType::kInt32, c.gap, std::numeric_limits<std::int32_t>::min(), batch_size, c.max_pages),
        cache_seqlens(DType::kInt32, 0, 0, batch_size),
        out(dtype, c.gap, kCanary16, batch_size, c.seqlen_q, c.num_heads_q, kHeadDimV),
        lse(DType::kFloat32, c.gap, kCanary, batch_size, c.num_heads_q, c.seqlen_q) {
    std::vector<std::int32_t> pages(static_cast<std::size_t>(num_pages));
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), random);
    for (std::int64_t b = 0; b < batch_size; ++b) {
      cache_seqlens.at(b) = c.cache_seqlens[b];
      for (std::int64_t i = 0; i * c.page_size < seqlen_k(b); ++i) {
        block_table.at(b, i) = pages.back();
        pages.pop_back();
      }
      for (std::int64_t t = 0; t < seqlen_k(b); ++t) {
        for (std::int64_t h = 0; h < c.num_heads_k; ++h) fill_row(&key(b, t, h));
      }
      for (std::int64_t i = 0; i < c.seqlen_q; ++i) {
        for (std::int64_t h = 0; h < c.num_heads_q; ++h) fill_row(&q.at(b, i, h, 0));
      }
    }
  }

  DenseDecodeArguments arguments() const {
    DenseDecodeArguments args;
    args.q = q.view;
    args.k_cache = k_cache.view;
    args.block_table = block_table.view;
    args.cache_seqlens = cache_seqlens.view;
    args.out = out.view;
    args.lse = lse.view;
    args.softmax_scale = spec.softmax_scale;
    args.causal = spec.causal;
    return args;
  }

  /// Compares the outputs with the oracle, then the memory around them with what it was.
  void check() {
    for (std::int64_t b = 0; b < batch_size; ++b) {
      for (std::int64_t h = 0; h < spec.num_heads_q; ++h) {
        for (std::int64_t i = 0; i < spec.seqlen_q; ++i) check_row(b, h, i);
      }
    }
    for (const std::uint16_t value : out.values) ASSERT_EQ(value, kCanary16) << "out: written outside of the array";
    for (const float value : lse.values) ASSERT_EQ(value, kCanary) << "lse: written outside of the array";
  }

  std::int64_t seqlen_k(std::int64_t b) const {
    return std::clamp<std::int64_t>(spec.cache_seqlens[b], 0, spec.max_pages * spec.page_size);
  }
  std::uint16_t& key(std::int64_t b, std::int64_t token, std::int64_t head) {
    return k_cache.at(block_table.at(b, token / spec.page_size), token % spec.page_size, head, 0);
  }
  /// Random signs and mantissas, magnitudes from 2^-5 to 4.
  void fill_row(std::uint16_t* row) {
    const int mantissa_bits = dtype == DType::kBFloat16 ? 7 : 10;
    const int bias = dtype == DType::kBFloat16 ? 127 : 15;
    std::uniform_int_distribution<int> magnitude((bias - 5) << mantissa_bits, ((bias + 2) << mantissa_bits) - 1);
    for (int d = 0; d < kHeadDimQk; ++d) {
      row[d] = static_cast<std::uint16_t>(magnitude(random) | (random() % 2 == 0 ? 0x8000 : 0));
    }
  }

  void check_row(std::int64_t b, std::int64_t h, std::int64_t i) {
    SCOPED_TRACE("batch " + std::to_string(b) + ", head " + std::to_string(h) + ", query " + std::to_string(i));
    const std::int64_t head_k = h / (spec.num_heads_q / spec.num_heads_k);
    std::int64_t visible = seqlen_k(b);
    if (spec.causal) visible = std::max<std::int64_t>(visible - (spec.seqlen_q - 1 - i), 0);
    std::vector<double> weights;
    for (std::int64_t t = 0; t < visible; ++t) {
      double score = 0;
      for (int d = 0; d < kHeadDimQk; ++d) {
        score += decode(q.at(b, i, h, d), dtype) * decode((&key(b, t, head_k))[d], dtype);
      }
      weights.push_back(score * spec.softmax_scale);
    }
    const double max = weights.empty() ? 0 : *std::max_element(weights.begin(), weights.end());
    double sum = 0;
    std::vector<double> expected(kHeadDimV, 0.0);
    for (std::int64_t t = 0; t < visible; ++t) {
      const double weight = std::exp(weights[t] - max);
      sum += weight;
      for (int d = 0; d < kHeadDimV; ++d) expected[d] += weight * decode((&key(b, t, head_k))[d], dtype);
    }
    for (int d = 0; d < kHeadDimV; ++d) {
      const double want = visible > 0 ? expected[d] / sum : 0;
      const double tolerance = visible > 0 ? std::max(8e-4, std::abs(want) * 2.01 / 128) : 0;
      ASSERT_NEAR(decode(out.at(b, i, h, d), dtype), want, tolerance) << "out, dimension " << d;
      out.at(b, i, h, d) = kCanary16;
    }
    if (visible > 0) {
      const double want = max + std::log(sum);
      ASSERT_NEAR(lse.at(b, h, i), want, std::max(1e-6, std::abs(want) * 8.01 / 65536));
    } else {
      ASSERT_EQ(lse.at(b, h, i), std::numeric_limits<float>::infinity());
    }
    lse.at(b, h, i) = kCanary;
  }
};

void decode_on_cpu(const DenseDecodeArguments& args) { cpu::dense_decode(args, check_dense_decode(args, true)); }

/// The message of the InvalidArgument that the call must throw.
std::string error_of(const DenseDecodeArguments& args) {
  try {
    decode_on_cpu(args);
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "no error";
}

/// Sets FLASH_MLA_NUM_THREADS within a scope.
class NumThreads {
 public:
  explicit NumThreads(const char* value) { setenv("FLASH_MLA_NUM_THREADS", value, 1); }
  ~NumThreads() { unsetenv("FLASH_MLA_NUM_THREADS"); }
  NumThreads(const NumThreads&) = delete;
  NumThreads& operator=(const NumThreads&) = delete;
};

class CpuDenseDecode : public ::testing::TestWithParam<std::tuple<Case, DType>> {};

TEST_P(CpuDenseDecode, MatchesTheOracle) {
  const auto& [test_case, dtype] = GetParam();
  Problem problem(test_case, dtype);
  const DenseDecodeArguments args = problem.arguments();
  ASSERT_EQ(dense_decode_workspace_size(args), 0U);
  dense_decode(args, nullptr, 0, nullptr);
  problem.check();
}

std::vector<Case> cases() {
  constexpr std::int32_t kMin = std::numeric_limits<std::int32_t>::min();
  constexpr std::int32_t kMax = std::numeric_limits<std::int32_t>::max();
  return {
      // name, cache_seqlens, seqlen_q, num_heads_q, num_heads_k, page_size, max_pages, causal, gap, softmax_scale
      {"LengthsAroundPagesAndBlocks", {1, 31, 32, 33, 63, 64, 65, 192}, 1, 3},
      {"PageSize1", {5, 40, 1}, 1, 2, 1, 1, 40},
      {"PageSize16CausalTwoHeadsK", {33, 48, 2}, 4, 6, 2, 16, 3, true},
      {"PageSize128ThreeHeadsKManyRows", {140, 20}, 2, 27, 3, 128, 2, false, 8},
      {"EmptyRequestsAndNegativeLengths", {0, 7, -3, 0, kMin}, 3, 2, 1, 64, 3, true},
      {"TableWithoutColumns", {0, 100}, 1, 1, 1, 64, 0},
      {"LengthIsCutAtTheTable", {kMax, 100}, 2, 1, 1, 16, 3, true, 24},
      {"LargeScale", {70}, 1, 17, 1, 64, 3, false, 0, 2.0F},
      {"NoQueries", {3}, 0},
      {"NoRequests", {}},
  };
}

INSTANTIATE_TEST_SUITE_P(Cases, CpuDenseDecode,
                         ::testing::Combine(::testing::ValuesIn(cases()),
                                            ::testing::Values(DType::kBFloat16, DType::kFloat16)),
                         [](const auto& info) {
                           return std::get<0>(info.param).name + "_" + dtype_name(std::get<1>(info.param));
                         });

Case small_case() {
  Case c;
  c.cache_seqlens = {100, 65};
  c.num_heads_q = 40;
  return c;
}

TEST(CpuDenseDecodeThreads, SameBitsOnAnyNumber) {
  Problem alone(small_case(), DType::kBFloat16);
  Problem shared(small_case(), DType::kBFloat16);
  {
    const NumThreads one("1");
    decode_on_cpu(alone.arguments());
  }
  {
    const NumThreads many("7");
    decode_on_cpu(shared.arguments());
  }
  EXPECT_EQ(alone.out.values, shared.out.values);
  EXPECT_EQ(alone.lse.values, shared.lse.values);
  shared.check();
}

TEST(CpuDenseDecodeThreads, RefusesWhatIsNoNumber) {
  Problem problem(small_case(), DType::kBFloat16);
  for (const char* const text : {"0", "-1", "two", "2x"}) {
    const NumThreads variable(text);
    EXPECT_EQ(error_of(problem.arguments()),
              std::string("FLASH_MLA_NUM_THREADS: expected a whole number above 0, got ") + text);
  }
}

TEST(CpuDenseDecodePages, RefusesOnesOutsideTheCacheBeforeItWrites) {
  for (const std::int32_t page : {-1, 7}) {
    Problem problem(small_case(), DType::kFloat16);
    const auto out_before = problem.out.values;
    const auto lse_before = problem.lse.values;
    problem.block_table.at(1, 1) = page;
    EXPECT_EQ(error_of(problem.arguments()), "block_table: expected page numbers from 0 to num_pages - 1 = 6, got " +
                                                 std::to_string(page) + " at [1, 1]");
    EXPECT_EQ(problem.out.values, out_before);
    EXPECT_EQ(problem.lse.values, lse_before);
  }
}

TEST(CpuDenseDecodeValues, NanInAQueryStaysInItsRow) {
  Problem problem(small_case(), DType::kBFloat16);
  problem.q.at(0, 0, 5, 100) = kNan16;
  decode_on_cpu(problem.arguments());
  for (std::int64_t h = 0; h < 40; ++h) {
    EXPECT_EQ(std::isnan(decode(problem.out.at(0, 0, h, 0), DType::kBFloat16)), h == 5);
    EXPECT_EQ(std::isnan(problem.lse.at(0, h, 0)), h == 5);
  }
}

TEST(CpuDenseDecodeValues, AScoreOfMinusInfinityHasNoWeight) {
  Problem problem(small_case(), DType::kBFloat16);
  constexpr std::uint16_t kMinusInfinity = 0xff80;
  constexpr std::uint16_t kOne = 0x3f80;
  for (std::int64_t h = 0; h < 40; ++h) problem.q.at(1, 0, h, kHeadDimQk - 1) = kOne;
  for (std::int64_t t = 0; t < 64; ++t) {  // two blocks of tokens, all of the first page
    problem.k_cache.at(problem.block_table.at(1, 0), t, 0, kHeadDimQk - 1) = kMinusInfinity;
  }
  decode_on_cpu(problem.arguments());
  for (int d = 0; d < kHeadDimV; ++d) {
    EXPECT_EQ(problem.out.at(1, 0, 3, d), problem.k_cache.at(problem.block_table.at(1, 1), 0, 0, d));
  }
}

}  // namespace
}  // namespace flash_mla

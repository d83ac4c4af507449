// merge_states on the CPU and, where there is a Hopper GPU, there: both against float64.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/half.h"
#include "flash_mla/flash_mla.h"
#include "on_device.h"

namespace flash_mla {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kBatch = 3;
constexpr int kSeqlenQ = 2;
constexpr int kNumHeads = 5;
constexpr int kNumRows = kBatch * kSeqlenQ * kNumHeads;
constexpr std::size_t kGap = 64;  // bytes between and behind arrays, which nothing may write

struct Types {
  DType in;
  DType out;
  int num_states;
};

std::string name_of(const testing::TestParamInfo<Types>& info) {
  return std::to_string(info.param.num_states) + "_states_" + dtype_name(info.param.in) + "_to_" +
         dtype_name(info.param.out);
}

double load(const unsigned char* at, DType dtype) {
  if (dtype == DType::kFloat32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  return dtype == DType::kBFloat16 ? to_float(cpu::BFloat16{bits}) : to_float(cpu::Float16{bits});
}

void store(float value, DType dtype, unsigned char* at) {
  if (dtype == DType::kFloat32) {
    std::memcpy(at, &value, sizeof(value));
  } else if (dtype == DType::kBFloat16) {
    cpu::BFloat16 rounded;
    cpu::from_float(value, rounded);
    std::memcpy(at, &rounded, sizeof(rounded));
  } else {
    cpu::Float16 rounded;
    cpu::from_float(value, rounded);
    std::memcpy(at, &rounded, sizeof(rounded));
  }
}

/// All arrays of a merge in one piece of memory: outs, lses, out and lse, each with a gap behind. A row of lse is
/// (head, query); of every state's rows, about every third has no key, and its out is NaN.
struct Problem {
  Types types;
  std::size_t out_row, state_out, state_lse, lses, out, lse, size;  // bytes
  std::vector<unsigned char> bytes;

  explicit Problem(const Types& t)
      : types(t),
        out_row(kHeadDimV * dtype_size(t.in)),
        state_out(kNumRows * out_row + kGap),
        state_lse(kNumRows * sizeof(float) + kGap),
        lses(t.num_states * state_out),
        out((lses + t.num_states * state_lse + 15) / 16 * 16),
        lse(out + kNumRows * kHeadDimV * dtype_size(t.out) + kGap),
        size(lse + kNumRows * sizeof(float) + kGap),
        bytes(size, 0x5a) {
    std::mt19937 random(t.num_states);
    std::normal_distribution<float> normal;
    for (int s = 0; s < t.num_states; ++s) {
      for (int row = 0; row < kNumRows; ++row) {
        const bool is_empty = row == 0 || random() % 3 == 0;
        const float empty_lse = random() % 2 == 0 ? kInfinity : -kInfinity;
        const float value = is_empty ? empty_lse : 3.0F * normal(random) + (row == 1 ? 3e38F : 0.0F);
        std::memcpy(&bytes[lses + s * state_lse + lse_row(row) * sizeof(float)], &value, sizeof(value));
        for (int d = 0; d < kHeadDimV; ++d) {
          store(is_empty ? std::nanf("") : normal(random), t.in,
                &bytes[s * state_out + row * out_row + d * dtype_size(t.in)]);
        }
      }
    }
  }

  /// Queries the library with the arrays at `base`.
  void merge(unsigned char* base, Device device, CUstream_st* stream) const {
    Tensor stacked = make_tensor(base, types.in, device, types.num_states, kBatch, kSeqlenQ, kNumHeads, kHeadDimV);
    stacked.strides[0] = static_cast<std::int64_t>(state_out / dtype_size(types.in));
    Tensor stacked_lse =
        make_tensor(base + lses, DType::kFloat32, device, types.num_states, kBatch, kNumHeads, kSeqlenQ);
    stacked_lse.strides[0] = static_cast<std::int64_t>(state_lse / sizeof(float));
    const std::vector<Tensor> outs = unstack(stacked);
    const std::vector<Tensor> lse_list = unstack(stacked_lse);
    MergeStatesArguments args;
    args.outs = outs.data();
    args.lses = lse_list.data();
    args.num_states = types.num_states;
    args.out = make_tensor(base + out, types.out, device, kBatch, kSeqlenQ, kNumHeads, kHeadDimV);
    args.lse = make_tensor(base + lse, DType::kFloat32, device, kBatch, kNumHeads, kSeqlenQ);
    merge_states(args, stream);
  }

  /// Where a row of outs, which go by (batch, query, head), has its lse: those go by (batch, head, query).
  static int lse_row(int row) {
    const int head = row % kNumHeads, query = row / kNumHeads % kSeqlenQ, request = row / kNumHeads / kSeqlenQ;
    return (request * kNumHeads + head) * kSeqlenQ + query;
  }

  /// Holds `result`, all bytes after a merge, against float64.
  void check(const std::vector<unsigned char>& result) const {
    const double tolerance = types.out == DType::kFloat32    ? 1e-6
                             : types.out == DType::kBFloat16 ? 1.0 / 256
                                                             : 1.0 / 2048;
    const double smallest = types.out == DType::kFloat16 ? 0x1p-24 : 0.0;  // subnormal
    std::vector<unsigned char> untouched = result;
    for (int row = 0; row < kNumRows; ++row) {
      std::vector<double> logs(types.num_states);
      double max = -HUGE_VAL;
      for (int s = 0; s < types.num_states; ++s) {
        logs[s] = load(&bytes[lses + s * state_lse + lse_row(row) * sizeof(float)], DType::kFloat32);
        if (!std::isinf(logs[s])) max = std::max(max, logs[s]);
      }
      double weight_sum = 0.0;
      for (const double log : logs) weight_sum += std::isinf(log) ? 0.0 : std::exp(log - max);
      for (int d = 0; d < kHeadDimV; ++d) {
        double expected = 0.0, magnitude = 0.0;
        for (int s = 0; s < types.num_states; ++s) {
          if (std::isinf(logs[s])) continue;
          const double weighted = std::exp(logs[s] - max) / weight_sum *
                                  load(&bytes[s * state_out + row * out_row + d * dtype_size(types.in)], types.in);
          expected += weighted;
          magnitude += std::abs(weighted);
        }
        const double got = load(&result[out + (row * kHeadDimV + d) * dtype_size(types.out)], types.out);
        ASSERT_NEAR(got, expected, tolerance * std::abs(expected) + 1e-6 * magnitude + smallest)
            << "row " << row << ", " << d;
      }
      const double got = load(&result[lse + lse_row(row) * sizeof(float)], DType::kFloat32);
      if (weight_sum == 0.0) {
        ASSERT_EQ(got, HUGE_VAL) << "lse of row " << row;
      } else {
        const double expected = max + std::log(weight_sum);
        ASSERT_NEAR(got, expected, 1e-6 * std::max(1.0, std::abs(expected))) << "lse of row " << row;
      }
    }
    std::copy_n(&bytes[out], kNumRows * kHeadDimV * dtype_size(types.out), &untouched[out]);
    std::copy_n(&bytes[lse], kNumRows * sizeof(float), &untouched[lse]);
    EXPECT_EQ(untouched, bytes) << "written beside the results";
  }
};

class MergeStates : public testing::TestWithParam<Types> {};

TEST_P(MergeStates, OnTheCpu) {
  const Problem problem(GetParam());
  std::vector<unsigned char> result = problem.bytes;
  problem.merge(result.data(), Device{}, nullptr);
  problem.check(result);
  std::vector<unsigned char> again = problem.bytes;
  problem.merge(again.data(), Device{}, nullptr);
  EXPECT_EQ(again, result) << "not the same bits twice";
}

TEST_P(MergeStates, OnAGpu) {
  if (!has_hopper()) GTEST_SKIP() << "needs a Hopper GPU (compute capability 9.0)";
  const Problem problem(GetParam());
  const OnDevice<unsigned char> memory(problem.bytes);
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  problem.merge(memory.data(), Device{DeviceType::kCuda, 0}, stream);
  ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  const std::vector<unsigned char> result = memory.to_host();
  problem.check(result);
  problem.merge(memory.data(), Device{DeviceType::kCuda, 0}, stream);
  ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  ASSERT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  EXPECT_EQ(memory.to_host(), result) << "not the same bits twice";
}

std::vector<Types> all_types() {
  std::vector<Types> all;
  for (const int num_states : {1, 2, 3, 8, 9, 16, 17, 128}) {
    for (const DType in : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
      all.push_back({in, in, num_states});
      if (in != DType::kFloat32) all.push_back({in, DType::kFloat32, num_states});
    }
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Types, MergeStates, testing::ValuesIn(all_types()), name_of);

TEST(MergeStatesWithoutGpu, SaysWhatIsMissing) {
  if (has_hopper()) GTEST_SKIP() << "this machine has a Hopper GPU";
  Problem problem({DType::kBFloat16, DType::kBFloat16, 2});
  // Addresses of the host stand in for the GPU's: nothing may be read before the error.
  try {
    problem.merge(problem.bytes.data(), Device{DeviceType::kCuda, 0}, nullptr);
    FAIL() << "expected Unsupported";
  } catch (const Unsupported& error) {
    EXPECT_NE(std::string(error.what()).find("Hopper"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace flash_mla

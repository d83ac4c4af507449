#include "api/check_merge_states.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "flash_mla/error.h"

// Validation never touches memory, so these calls claim a CUDA device and addresses where nothing is.

namespace flash_mla {
namespace {

constexpr Device kGpu{DeviceType::kCuda, 1};
constexpr Device kCpu{};
constexpr std::int64_t kTwoTo31 = std::int64_t{1} << 31;

/// A made-up address: each argument gets a region of 2^40 bytes of its own.
void* address(int region, std::uintptr_t offset = 0) {
  return reinterpret_cast<void*>((static_cast<std::uintptr_t>(region) << 40) + offset);
}

/// A right call: 3 states of batch 4, seqlen_q 2, 16 heads.
struct Call {
  std::vector<Tensor> outs;
  std::vector<Tensor> lses;
  MergeStatesArguments args;

  explicit Call(Device device = kGpu)
      : outs(unstack(make_tensor(address(1), DType::kBFloat16, device, 3, 4, 2, 16, 512))),
        lses(unstack(make_tensor(address(2), DType::kFloat32, device, 3, 4, 16, 2))) {
    args.out = make_tensor(address(3), DType::kBFloat16, device, 4, 2, 16, 512);
    args.lse = make_tensor(address(4), DType::kFloat32, device, 4, 16, 2);
    point();
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  void point() {
    args.outs = outs.data();
    args.lses = lses.data();
    args.num_states = static_cast<std::int64_t>(outs.size());
  }
};

template <class... Extents>
void reshape(Tensor& t, Extents... shape) {
  t = make_tensor(t.data, t.dtype, t.device, shape...);
}

/// "type: message" of what checking a call throws.
std::string error_of(const Call& call) {
  try {
    check_merge_states(call.args);
  } catch (const InvalidType& error) {
    return std::string("InvalidType: ") + error.what();
  } catch (const InvalidArgument& error) {
    return std::string("InvalidArgument: ") + error.what();
  }
  return "no error";
}

struct WrongCall {
  void (*spoil)(Call&);
  const char* error;
};

void expect_errors(const std::vector<WrongCall>& calls) {
  for (const WrongCall& wrong : calls) {
    Call call;
    wrong.spoil(call);
    EXPECT_EQ(error_of(call), wrong.error);
  }
}

TEST(Unstack, GivesTheTensorsAlongTheFirstDimension) {
  Tensor stacked = make_tensor(address(1), DType::kBFloat16, kGpu, 3, 4, 2, 16, 512);
  stacked.strides[0] = 1'000'000;
  const std::vector<Tensor> tensors = unstack(stacked);
  ASSERT_EQ(tensors.size(), 3U);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(tensors[i].data, address(1, i * 2'000'000));
    EXPECT_EQ(tensors[i].dtype, DType::kBFloat16);
    EXPECT_EQ(tensors[i].device, kGpu);
    EXPECT_EQ(tensors[i].rank, 4);
    EXPECT_EQ(tensors[i].shape, (std::array<std::int64_t, kMaxRank>{4, 2, 16, 512, 0}));
    EXPECT_EQ(tensors[i].strides, (std::array<std::int64_t, kMaxRank>{16384, 8192, 512, 1, 0}));
  }
  stacked.strides[0] = -16384;
  EXPECT_EQ(unstack(stacked)[2].data, address(1, std::uintptr_t{0} - 2 * 2 * 16384));
  stacked.data = nullptr;
  EXPECT_EQ(unstack(stacked)[2].data, nullptr);
  EXPECT_TRUE(unstack(Tensor{}).empty());
  EXPECT_TRUE(unstack(make_tensor(address(1), DType::kInt8, kGpu, 0, 4)).empty());
  stacked.rank = kMaxRank + 1;
  EXPECT_THROW(unstack(stacked), InvalidArgument);
}

TEST(CheckMergeStates, ReturnsTheExtentsOfARightCall) {
  const Call call;
  const MergeStatesShape shape = check_merge_states(call.args);
  EXPECT_EQ(shape.num_states, 3);
  EXPECT_EQ(shape.batch_size, 4);
  EXPECT_EQ(shape.seqlen_q, 2);
  EXPECT_EQ(shape.num_heads_q, 16);
  EXPECT_EQ(shape.num_rows(), 128);
}

TEST(CheckMergeStates, TakesShapes) {
  expect_errors({
      {[](Call& c) { c.args.num_states = 0; }, "InvalidArgument: outs: expected 1 to 128 states, got 0"},
      {[](Call& c) { c.args.num_states = 129; }, "InvalidArgument: outs: expected 1 to 128 states, got 129"},
      {[](Call& c) { c.args.outs = nullptr; }, "InvalidArgument: outs: expected 3 tensors, got a null pointer"},
      {[](Call& c) { c.lses[1].rank = 6; }, "InvalidArgument: lses[1]: expected rank 0 to 5, got 6"},
      {[](Call& c) { c.args.lses = nullptr; }, "InvalidArgument: lses: expected 3 tensors, got a null pointer"},
      {[](Call& c) { reshape(c.outs[0], 4, 2, 16, 576); },
       "InvalidArgument: outs[0]: expected shape (batch_size, seqlen_q, num_heads_q, 512), got (4, 2, 16, 576)"},
      {[](Call& c) { reshape(c.outs[0], 2, 16, 512); },
       "InvalidArgument: outs[0]: expected shape (batch_size, seqlen_q, num_heads_q, 512), got (2, 16, 512)"},
      {[](Call& c) { reshape(c.outs[0], 4, -2, 16, 512); },
       "InvalidArgument: outs[0]: expected shape (batch_size, seqlen_q, num_heads_q, 512), got (4, -2, 16, 512)"},
      {[](Call& c) { c.outs[2] = {}; }, "InvalidArgument: outs[2]: expected shape (4, 2, 16, 512), got ()"},
      {[](Call& c) { reshape(c.outs[2], 4, 2, 8, 512); },
       "InvalidArgument: outs[2]: expected shape (4, 2, 16, 512), got (4, 2, 8, 512)"},
      {[](Call& c) { reshape(c.lses[1], 4, 2, 16); },
       "InvalidArgument: lses[1]: expected shape (4, 16, 2), got (4, 2, 16)"},
      {[](Call& c) { c.args.out = {}; }, "InvalidArgument: out: expected shape (4, 2, 16, 512), got ()"},
      {[](Call& c) { reshape(c.args.lse, 4, 16); }, "InvalidArgument: lse: expected shape (4, 16, 2), got (4, 16)"},
      {[](Call& c) { reshape(c.outs[0], kTwoTo31, 1, 1, 512); },
       "InvalidArgument: outs[0]: expected shape (batch_size, seqlen_q, num_heads_q: 2^31 - 1 rows at most, 512), got "
       "(2147483648, 1, 1, 512)"},
      {[](Call& c) { reshape(c.outs[0], 1 << 30, 1 << 30, 1 << 30, 512); },
       "InvalidArgument: outs[0]: expected shape (batch_size, seqlen_q, num_heads_q: 2^31 - 1 rows at most, 512), got "
       "(1073741824, 1073741824, 1073741824, 512)"},
  });
}

TEST(CheckMergeStates, TakesTypesAndDevices) {
  expect_errors({
      {[](Call& c) { c.outs[0].dtype = DType::kFloat64; },
       "InvalidType: outs[0]: expected dtype bfloat16, float16 or float32, got float64"},
      {[](Call& c) { c.outs[1].dtype = DType::kFloat16; },
       "InvalidType: outs[1]: expected dtype bfloat16 as outs[0], got float16"},
      {[](Call& c) { c.lses[2].dtype = DType::kBFloat16; },
       "InvalidType: lses[2]: expected dtype float32, got bfloat16"},
      {[](Call& c) { c.args.out.dtype = DType::kFloat16; },
       "InvalidType: out: expected dtype bfloat16 as outs, or float32, got float16"},
      {[](Call& c) { c.args.lse.dtype = DType::kFloat64; }, "InvalidType: lse: expected dtype float32, got float64"},
      {[](Call& c) { c.outs[1].device = kCpu; },
       "InvalidArgument: outs[1]: expected device cuda:1 as outs[0], got cpu"},
      {[](Call& c) { c.lses[1].device.index = 2; },
       "InvalidArgument: lses[1]: expected device cuda:1 as outs[0], got cuda:2"},
      {[](Call& c) { c.args.out.device = kCpu; }, "InvalidArgument: out: expected device cuda:1 as outs[0], got cpu"},
      {[](Call& c) { c.args.lse.device = kCpu; }, "InvalidArgument: lse: expected device cuda:1 as outs[0], got cpu"},
  });
}

TEST(CheckMergeStates, TakesStrides) {
  expect_errors({
      {[](Call& c) { c.outs[1].strides[3] = 2; },
       "InvalidArgument: outs[1]: expected a contiguous last dimension (stride 1), got strides (16384, 8192, 512, 2)"},
      {[](Call& c) { c.outs[1].strides[0] = -16384; },
       "InvalidArgument: outs[1]: expected strides of at least 0, got (-16384, 8192, 512, 1)"},
      {[](Call& c) { c.outs[1].strides[2] = 516; },
       "InvalidArgument: outs[1]: expected strides that are multiples of 8 elements, but for the last, got "
       "(16384, 8192, 516, 1)"},
      {[](Call& c) { c.lses[0].strides[1] = -2; },
       "InvalidArgument: lses[0]: expected strides of at least 0, got (32, -2, 1)"},
      {[](Call& c) { c.lses[0].strides[0] = std::numeric_limits<std::int64_t>::max(); },
       "InvalidArgument: lses[0]: expected fewer than 2^56 elements from its first to its last, got strides "
       "(9223372036854775807, 2, 1)"},
      {[](Call& c) { c.args.out.strides[1] = 0; },
       "InvalidArgument: out: expected strides that keep its elements apart, got strides (16384, 0, 512, 1) for shape "
       "(4, 2, 16, 512)"},
      {[](Call& c) { c.args.lse.strides[0] = 1; },
       "InvalidArgument: lse: expected strides that keep its elements apart, got strides (1, 2, 1) for shape "
       "(4, 16, 2)"},
  });
}

TEST(CheckMergeStates, TakesAddresses) {
  expect_errors({
      {[](Call& c) { c.outs[2].data = nullptr; }, "InvalidArgument: outs[2]: expected data, got a null pointer"},
      {[](Call& c) { c.lses[0].data = nullptr; }, "InvalidArgument: lses[0]: expected data, got a null pointer"},
      {[](Call& c) { c.outs[2].data = address(7, 8); },
       "InvalidArgument: outs[2]: expected an address that is a multiple of 16, got 0x70000000008"},
      {[](Call& c) { c.lses[2].data = address(7, 2); },
       "InvalidArgument: lses[2]: expected an address that is a multiple of 4, got 0x70000000002"},
      {[](Call& c) { c.args.out.data = address(7, 4); },
       "InvalidArgument: out: expected an address that is a multiple of 16, got 0x70000000004"},
      {[](Call& c) { c.args.lse.data = nullptr; }, "InvalidArgument: lse: expected data, got a null pointer"},
  });
}

TEST(CheckMergeStates, KeepsResultsApart) {
  expect_errors({
      {[](Call& c) { c.args.lse.data = c.args.out.data; },
       "InvalidArgument: out: expected memory apart from lse, got bytes 0x30000000000 to 0x30000020000 that overlap "
       "it"},
      {[](Call& c) { c.args.out.data = c.outs[1].data; },
       "InvalidArgument: out: expected memory apart from outs[1], got bytes 0x10000020000 to 0x10000040000 that "
       "overlap it"},
      {[](Call& c) { c.args.lse.data = c.lses[2].data; },
       "InvalidArgument: lse: expected memory apart from lses[2], got bytes 0x20000000400 to 0x20000000600 that "
       "overlap it"},
      {[](Call& c) { c.args.lse.data = c.outs[0].data; },
       "InvalidArgument: lse: expected memory apart from outs[0], got bytes 0x10000000000 to 0x10000000200 that "
       "overlap it"},
  });
}

TEST(CheckMergeStates, AllowsWhatIsUnusualButRight) {
  const std::vector<void (*)(Call&)> changes = {
      [](Call& c) { c.args.out.dtype = DType::kFloat32; },
      [](Call& c) {
        for (Tensor& t : c.outs) t.dtype = DType::kFloat16;
        c.args.out.dtype = DType::kFloat16;
      },
      [](Call& c) { c.outs[1] = c.outs[2] = c.outs[0]; },         // states may share memory
      [](Call& c) { c.outs[1].strides = {0, 1 << 20, 520, 1}; },  // and have strides of their own
      [](Call& c) { c.lses[1].strides = {1, 8, 4}; },
      [](Call& c) { c.args.lse.strides = {1, 8, 4}; },
      [](Call& c) {
        c.outs[1].strides[0] = std::int64_t{1} << 45;
        c.outs[1].data = address(100);
      },
      [](Call& c) {
        c.outs.resize(1);
        c.lses.resize(1);
        c.point();
      },
      [](Call& c) {
        const Tensor out = c.outs[0];
        const Tensor lse = c.lses[0];
        c.outs.assign(128, out);
        c.lses.assign(128, lse);
        c.point();
      },
      [](Call& c) {  // nothing to merge: strides and addresses mean nothing
        for (Tensor& t : c.outs) reshape(t, 4, 0, 16, 512);
        for (Tensor& t : c.lses) reshape(t, 4, 16, 0);
        reshape(c.args.out, 4, 0, 16, 512);
        reshape(c.args.lse, 4, 16, 0);
        for (Tensor* t : {&c.outs[1], &c.lses[2], &c.args.out, &c.args.lse}) {
          t->strides = {-1, 3, 0, 2};
          t->data = nullptr;
        }
      },
  };
  for (std::size_t i = 0; i < changes.size(); ++i) {
    Call call;
    changes[i](call);
    EXPECT_EQ(error_of(call), "no error") << "change " << i;
  }
}

TEST(CheckMergeStates, AsksForLessOnTheCpu) {
  Call call(kCpu);
  call.outs[1].data = address(7, 2);
  call.outs[1].strides = {2 * 16 * 513, 16 * 513, 513, 1};
  EXPECT_EQ(error_of(call), "no error");
  call.outs[1].data = address(7, 1);
  EXPECT_EQ(error_of(call), "InvalidArgument: outs[1]: expected an address that is a multiple of 2, got 0x70000000001");
}

}  // namespace
}  // namespace flash_mla

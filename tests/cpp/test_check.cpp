#include "api/check.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "flash_mla/error.h"
#include "flash_mla/plan.h"

// Validation never touches memory, so these calls claim a CUDA device and addresses where nothing is.

namespace flash_mla {
namespace {

constexpr Device kGpu{DeviceType::kCuda, 1};
constexpr Device kCpu{};
constexpr std::int64_t kMaxInt32 = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kTwoTo38 = std::int64_t{1} << 38;

/// A made-up address: each argument gets a region of 2^40 bytes of its own.
void* address(int region, std::uintptr_t offset = 0) {
  return reinterpret_cast<void*>((static_cast<std::uintptr_t>(region) << 40) + offset);
}

/// A right call: batch 4, seqlen_q 2, 128 query heads, 2 KV heads, 100 pages of 64 tokens, 16 pages a request, 66
/// parts.
DenseDecodeArguments right_call(Device device = kGpu) {
  DenseDecodeArguments args;
  args.q = make_tensor(address(1), DType::kBFloat16, device, 4, 2, 128, 576);
  args.k_cache = make_tensor(address(2), DType::kBFloat16, device, 100, 64, 2, 576);
  args.block_table = make_tensor(address(3), DType::kInt32, device, 4, 16);
  args.cache_seqlens = make_tensor(address(4), DType::kInt32, device, 4);
  args.out = make_tensor(address(5), DType::kBFloat16, device, 4, 2, 128, 512);
  args.lse = make_tensor(address(6), DType::kFloat32, device, 4, 128, 2);
  args.tile_scheduler_metadata = make_tensor(address(7), DType::kInt32, device, 66, 8);
  args.num_splits = make_tensor(address(8), DType::kInt32, device, 5);
  return args;
}

template <class... Extents>
void reshape(Tensor& t, Extents... shape) {
  t = make_tensor(t.data, t.dtype, t.device, shape...);
}

/// "type: message" of what the call throws.
template <class Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const InvalidType& error) {
    return std::string("InvalidType: ") + error.what();
  } catch (const InvalidArgument& error) {
    return std::string("InvalidArgument: ") + error.what();
  }
  return "no error";
}

std::string error_of(const DenseDecodeArguments& args, bool with_pointers = true) {
  return error_of([&] { check_dense_decode(args, with_pointers); });
}

struct WrongCall {
  void (*spoil)(DenseDecodeArguments&);
  const char* error;
};

/// Each wrong call comes after a right one, of which the library remembers what it has checked, and before another.
void expect_errors(const std::vector<WrongCall>& calls) {
  for (const WrongCall& call : calls) {
    EXPECT_EQ(error_of(right_call()), "no error");
    DenseDecodeArguments args = right_call();
    call.spoil(args);
    EXPECT_EQ(error_of(args), call.error);
    EXPECT_EQ(error_of(args), call.error);
  }
  EXPECT_EQ(error_of(right_call()), "no error");
}

using Args = DenseDecodeArguments;

/// Of a call with a plan.
void make_batch_of_0(Args& a) {
  reshape(a.q, 0, 2, 128, 576);
  reshape(a.block_table, 0, 16);
  reshape(a.cache_seqlens, 0);
  reshape(a.out, 0, 2, 128, 512);
  reshape(a.lse, 0, 128, 2);
  reshape(a.num_splits, 1);
}

TEST(CheckDenseDecode, ReturnsTheExtentsOfARightCall) {
  const DenseDecodeShape shape = check_dense_decode(right_call(), true);
  EXPECT_EQ(shape.batch_size, 4);
  EXPECT_EQ(shape.seqlen_q, 2);
  EXPECT_EQ(shape.num_heads_q, 128);
  EXPECT_EQ(shape.num_heads_k, 2);
  EXPECT_EQ(shape.num_pages, 100);
  EXPECT_EQ(shape.page_size, 64);
  EXPECT_EQ(shape.max_pages, 16);
  EXPECT_EQ(shape.num_sm_parts, 66);
}

TEST(CheckDenseDecode, TakesShapes) {
  expect_errors({
      {[](Args& a) { a.q = {}; },
       "InvalidArgument: q: expected shape (batch_size, seqlen_q, num_heads_q, 576), got ()"},
      {[](Args& a) { reshape(a.q, 2, 128, 576); },
       "InvalidArgument: q: expected shape (batch_size, seqlen_q, num_heads_q, 576), got (2, 128, 576)"},
      {[](Args& a) { reshape(a.q, 4, 2, 128, 512); },
       "InvalidArgument: q: expected shape (batch_size, seqlen_q, num_heads_q, 576), got (4, 2, 128, 512)"},
      {[](Args& a) { reshape(a.q, -4, 2, 128, 576); },
       "InvalidArgument: q: expected shape (batch_size, seqlen_q, num_heads_q, 576), got (-4, 2, 128, 576)"},
      {[](Args& a) { reshape(a.k_cache, 100, 64, 576); },
       "InvalidArgument: k_cache: expected shape (num_pages, page_size, num_heads_k, 576), got (100, 64, 576)"},
      {[](Args& a) { reshape(a.block_table, 3, 16); },
       "InvalidArgument: block_table: expected shape (4, max_pages), got (3, 16)"},
      {[](Args& a) { reshape(a.cache_seqlens, 5); }, "InvalidArgument: cache_seqlens: expected shape (4,), got (5,)"},
      {[](Args& a) { reshape(a.out, 4, 2, 128, 576); },
       "InvalidArgument: out: expected shape (4, 2, 128, 512), got (4, 2, 128, 576)"},
      {[](Args& a) { a.out = {}; }, "InvalidArgument: out: expected shape (4, 2, 128, 512), got ()"},
      {[](Args& a) { reshape(a.lse, 4, 2, 128); }, "InvalidArgument: lse: expected shape (4, 128, 2), got (4, 2, 128)"},
      {[](Args& a) { reshape(a.tile_scheduler_metadata, 66, 9); },
       "InvalidArgument: tile_scheduler_metadata: expected shape (num_sm_parts, 8), got (66, 9)"},
      {[](Args& a) { reshape(a.num_splits, 4); }, "InvalidArgument: num_splits: expected shape (5,), got (4,)"},
      {[](Args& a) { a.num_splits = {}; },
       "InvalidArgument: num_splits: expected both parts of a plan or neither, got one alone"},
      {[](Args& a) { a.tile_scheduler_metadata = {}; },
       "InvalidArgument: tile_scheduler_metadata: expected both parts of a plan or neither, got one alone"},
      {[](Args& a) { a.q.rank = 6; }, "InvalidArgument: q: expected rank 0 to 5, got 6"},
      {[](Args& a) { a.num_splits.rank = -1; }, "InvalidArgument: num_splits: expected rank 0 to 5, got -1"},
  });
}

TEST(CheckDenseDecode, TakesAPlanLeftOutWhateverItsType) {
  Args args = right_call();
  args.tile_scheduler_metadata = args.num_splits = {};
  args.num_splits.dtype = DType::kInt32;
  EXPECT_NO_THROW(check_dense_decode(args, true));
}

TEST(CheckDenseDecode, TakesExtents) {
  expect_errors({
      {[](Args& a) { reshape(a.q, (1 << 30) + 1, 2, 128, 576); },
       "InvalidArgument: q: expected batch_size from 0 to 1073741824, got 1073741825"},
      {[](Args& a) { reshape(a.q, 4, 2, 0, 576); },
       "InvalidArgument: q: expected num_heads_q from 1 to 2147483647, got 0"},
      {[](Args& a) { reshape(a.q, 4, 1 << 24, 128, 576); },
       "InvalidArgument: q: expected seqlen_q from 0 to 16777215, got 16777216"},
      {[](Args& a) { reshape(a.k_cache, kMaxInt32 + 1, 64, 2, 576); },
       "InvalidArgument: k_cache: expected num_pages from 0 to 2147483647, got 2147483648"},
      {[](Args& a) { reshape(a.k_cache, 100, 0, 2, 576); },
       "InvalidArgument: k_cache: expected page_size from 1 to 2147483647, got 0"},
      {[](Args& a) { reshape(a.k_cache, 100, 48, 2, 576); },
       "InvalidArgument: k_cache: expected page_size that is a power of two, got 48"},
      {[](Args& a) { reshape(a.k_cache, 100, 64, 0, 576); },
       "InvalidArgument: k_cache: expected num_heads_k from 1 to 65535, got 0"},
      {[](Args& a) { reshape(a.k_cache, 100, 64, 3, 576); },
       "InvalidArgument: k_cache: expected num_heads_k that divides num_heads_q 128, got 3"},
      {[](Args& a) { reshape(a.block_table, 4, 1 << 25); },
       "InvalidArgument: block_table: expected max_pages * page_size below 2^31, which is max_pages up to 33554431, "
       "got "
       "33554432"},
      {[](Args& a) { reshape(a.tile_scheduler_metadata, 0, 8); },
       "InvalidArgument: tile_scheduler_metadata: expected num_sm_parts from 1 to 160, got 0"},
      {[](Args& a) { a.softmax_scale = 0.0F; },
       "InvalidArgument: softmax_scale: expected a finite number above 0, got 0"},
      {[](Args& a) { a.softmax_scale = -0.5F; },
       "InvalidArgument: softmax_scale: expected a finite number above 0, got -0.5"},
      {[](Args& a) { a.softmax_scale = INFINITY; },
       "InvalidArgument: softmax_scale: expected a finite number above 0, got inf"},
      {[](Args& a) { a.softmax_scale = NAN; },
       "InvalidArgument: softmax_scale: expected a finite number above 0, got nan"},
  });
}

TEST(CheckDenseDecode, TakesDtypesAndDevices) {
  expect_errors({
      {[](Args& a) { a.q.dtype = DType::kFloat32; }, "InvalidType: q: expected dtype bfloat16 or float16, got float32"},
      {[](Args& a) { a.k_cache.dtype = DType::kFloat16; },
       "InvalidType: k_cache: expected dtype bfloat16 as q, got float16"},
      {[](Args& a) { a.block_table.dtype = DType::kInt64; },
       "InvalidType: block_table: expected dtype int32, got int64"},
      {[](Args& a) { a.cache_seqlens.dtype = DType::kUInt32; },
       "InvalidType: cache_seqlens: expected dtype int32, got uint32"},
      {[](Args& a) { a.out.dtype = DType::kFloat8E4M3; },
       "InvalidType: out: expected dtype bfloat16 as q, got float8_e4m3fn"},
      {[](Args& a) { a.lse.dtype = DType::kBFloat16; }, "InvalidType: lse: expected dtype float32, got bfloat16"},
      {[](Args& a) { a.tile_scheduler_metadata.dtype = DType::kBool; },
       "InvalidType: tile_scheduler_metadata: expected dtype int32, got bool"},
      {[](Args& a) { a.num_splits.dtype = DType::kOther; },
       "InvalidType: num_splits: expected dtype int32, got an unknown dtype"},
      {[](Args& a) { a.q.device = kCpu; }, "InvalidArgument: k_cache: expected device cpu as q, got cuda:1"},
      {[](Args& a) { a.block_table.device.index = 0; },
       "InvalidArgument: block_table: expected device cuda:1 as q, got cuda:0"},
      {[](Args& a) { a.cache_seqlens.device = kCpu; },
       "InvalidArgument: cache_seqlens: expected device cuda:1 as q, got cpu"},
      {[](Args& a) { a.lse.device = kCpu; }, "InvalidArgument: lse: expected device cuda:1 as q, got cpu"},
      {[](Args& a) { a.num_splits.device = kCpu; },
       "InvalidArgument: num_splits: expected device cuda:1 as q, got cpu"},
  });
}

TEST(CheckDenseDecode, TakesStrides) {
  expect_errors({
      {[](Args& a) { a.q.strides[3] = 2; },
       "InvalidArgument: q: expected a contiguous last dimension (stride 1), got strides (147456, 73728, 576, 2)"},
      {[](Args& a) { a.k_cache.strides[1] = -1152; },
       "InvalidArgument: k_cache: expected strides of at least 0, got (73728, -1152, 576, 1)"},
      {[](Args& a) { a.k_cache.strides[0] = 73732; },
       "InvalidArgument: k_cache: expected strides that are multiples of 8 elements, but for the last, got (73732, "
       "1152, "
       "576, 1)"},
      {[](Args& a) { a.k_cache.strides[0] = std::int64_t{1} << 40; },
       "InvalidArgument: k_cache: expected strides up to 549755813887 elements, got (1099511627776, 1152, 576, 1)"},
      {[](Args& a) { a.k_cache.strides[0] = std::numeric_limits<std::int64_t>::max(); },
       "InvalidArgument: k_cache: expected fewer than 2^56 elements from its first to its last, got strides "
       "(9223372036854775807, 1152, 576, 1)"},
      {[](Args& a) { a.block_table.strides = {1, 4}; },
       "InvalidArgument: block_table: expected a contiguous last dimension (stride 1), got strides (1, 4)"},
      {[](Args& a) { a.cache_seqlens.strides[0] = 2; },
       "InvalidArgument: cache_seqlens: expected a contiguous array, got strides (2,)"},
      {[](Args& a) { a.out.strides[1] = 0; },
       "InvalidArgument: out: expected strides that keep its elements apart, got strides (131072, 0, 512, 1) for shape "
       "(4, 2, 128, 512)"},
      {[](Args& a) { a.out.strides[2] = 504; },
       "InvalidArgument: out: expected strides that keep its elements apart, got strides (131072, 65536, 504, 1) for "
       "shape (4, 2, 128, 512)"},
      {[](Args& a) { a.lse.strides = {0, 2, 1}; },
       "InvalidArgument: lse: expected strides that keep its elements apart, got strides (0, 2, 1) for shape (4, 128, "
       "2)"},
      {[](Args& a) { a.tile_scheduler_metadata.strides[0] = 16; },
       "InvalidArgument: tile_scheduler_metadata: expected a contiguous array, got strides (16, 1)"},
  });
}

TEST(CheckDenseDecode, TakesAddresses) {
  expect_errors({
      {[](Args& a) { a.q.data = nullptr; }, "InvalidArgument: q: expected data, got a null pointer"},
      {[](Args& a) { a.lse.data = nullptr; }, "InvalidArgument: lse: expected data, got a null pointer"},
      {[](Args& a) { a.num_splits.data = nullptr; }, "InvalidArgument: num_splits: expected data, got a null pointer"},
      {[](Args& a) { a.q.data = address(1, 8); },
       "InvalidArgument: q: expected an address that is a multiple of 16, got 0x10000000008"},
      {[](Args& a) { a.out.data = address(5, 2); },
       "InvalidArgument: out: expected an address that is a multiple of 16, got 0x50000000002"},
      {[](Args& a) { a.block_table.data = address(3, 2); },
       "InvalidArgument: block_table: expected an address that is a multiple of 4, got 0x30000000002"},
      {[](Args& a) { a.tile_scheduler_metadata.data = address(7, 4); },
       "InvalidArgument: tile_scheduler_metadata: expected an address that is a multiple of 16, got 0x70000000004"},
      {[](Args& a) { a.out.data = a.q.data; },
       "InvalidArgument: out: expected memory apart from q, got bytes 0x10000000000 to 0x10000100000 that overlap it"},
      {[](Args& a) { a.lse.data = address(2, 4); },
       "InvalidArgument: lse: expected memory apart from k_cache, got bytes 0x20000000004 to 0x20000001004 that "
       "overlap "
       "it"},
      {[](Args& a) { a.lse.data = address(5, 1024); },
       "InvalidArgument: out: expected memory apart from lse, got bytes 0x50000000000 to 0x50000100000 that overlap "
       "it"},
      {[](Args& a) { a.lse.data = a.num_splits.data; },
       "InvalidArgument: lse: expected memory apart from num_splits, got bytes 0x80000000000 to 0x80000001000 that "
       "overlap it"},
  });
}

TEST(CheckDenseDecode, LeavesPointersAloneWhereShapesCount) {
  Args args = right_call();
  for (Tensor* t : {&args.q, &args.k_cache, &args.block_table, &args.cache_seqlens, &args.out, &args.lse,
                    &args.tile_scheduler_metadata, &args.num_splits}) {
    t->data = nullptr;
  }
  EXPECT_EQ(error_of(args, /*with_pointers=*/false), "no error");
  args.lse.shape[0] = 3;
  EXPECT_EQ(error_of(args, /*with_pointers=*/false),
            "InvalidArgument: lse: expected shape (4, 128, 2), got (3, 128, 2)");
}

TEST(CheckDenseDecode, AllowsWhatIsUnusualButRight) {
  const std::vector<void (*)(Args&)> changes = {
      [](Args& a) { a.tile_scheduler_metadata = a.num_splits = {}; },
      [](Args& a) { a.q.dtype = a.k_cache.dtype = a.out.dtype = DType::kFloat16; },
      [](Args& a) { a.q.strides = {128 * 584, 4 * 128 * 584, 584, 1}; },
      [](Args& a) { a.lse.strides = {1, 8, 4}; },
      [](Args& a) { a.q.strides[1] = 0; },            // an input may be expanded
      [](Args& a) { a.block_table.strides[0] = 0; },  // the same
      [](Args& a) {
        a.k_cache.strides = {kTwoTo38, 1152, 576, 1};
        a.k_cache.data = address(100);
      },
      [](Args& a) { reshape(a.k_cache, 100, 1, 128, 576); },
      [](Args& a) {
        reshape(a.block_table, 4, 0);
        a.block_table.data = nullptr;
      },
      [](Args& a) {
        reshape(a.k_cache, 0, 64, 2, 576);
        a.k_cache.data = nullptr;
      },
      [](Args& a) {  // strides of extent-1 dimensions mean nothing
        reshape(a.k_cache, 1, 64, 2, 576);
        reshape(a.block_table, 4, 1);
        a.k_cache.strides[0] = -7;
        a.block_table.strides[1] = 5;
      },
      [](Args& a) {  // nor do those of empty tensors
        reshape(a.q, 4, 0, 128, 576);
        reshape(a.out, 4, 0, 128, 512);
        reshape(a.lse, 4, 128, 0);
        a.q.strides = a.out.strides = a.lse.strides = {-1, 3, 0, 2};
        a.q.data = a.out.data = a.lse.data = nullptr;
      },
      make_batch_of_0,
  };
  for (std::size_t i = 0; i < changes.size(); ++i) {
    Args args = right_call();
    changes[i](args);
    EXPECT_EQ(error_of(args), "no error") << "change " << i;
  }
}

TEST(CheckDenseDecode, TakesAnyIndexOfTheCpu) {
  Args args = right_call(kCpu);
  args.k_cache.device.index = -1;
  args.num_splits.device.index = 3;
  EXPECT_EQ(error_of(args), "no error");
}

TEST(CheckDenseDecode, AsksForLessOnTheCpu) {
  Args args = right_call(kCpu);
  args.q.data = address(1, 2);
  args.q.strides = {2 * 128 * 577, 128 * 577, 577, 1};
  EXPECT_EQ(error_of(args), "no error");
  args.q.data = address(1, 1);
  EXPECT_EQ(error_of(args), "InvalidArgument: q: expected an address that is a multiple of 2, got 0x10000000001");
}

struct PlanArguments {
  Tensor cache_seqlens = make_tensor(address(1), DType::kInt32, kGpu, 4);
  Tensor metadata = make_tensor(address(2), DType::kInt32, kGpu, 66, 8);
  Tensor num_splits = make_tensor(address(3), DType::kInt32, kGpu, 5);
};

TEST(MaxWorkspaceSize, AsksForNoDevice) {
  DenseDecodeArguments args = right_call();  // on a device that isn't there
  const std::size_t planned = dense_decode_max_workspace_size(args);
  EXPECT_GT(planned, std::size_t{2} * 66 * 2 * 128 * 512 * sizeof(std::uint16_t));  // two slots a part
  args.tile_scheduler_metadata = {};
  args.num_splits = {};
  const std::size_t unplanned = dense_decode_max_workspace_size(args);
  // 2 KV heads of 128 rows: 4 CTAs a part. 144 SMs take 36 parts, and their plan lies in the workspace.
  // A tile of 64 rows has values in float16, and 16 bytes for each row of two consumers.
  const std::size_t tile = 64 * 512 * sizeof(std::uint16_t) + std::size_t{64} * 2 * 16;
  EXPECT_EQ(unplanned, 36 * 32 + 4 * 5 * 36 * sizeof(std::uint64_t) + std::size_t{2} * 36 * 4 * tile);
}

TEST(MaxWorkspaceSize, GrowsWithTheRows) {
  const auto size = [](std::int64_t seqlen_q, std::int64_t num_heads_q) {
    Args args;
    args.q = make_tensor(nullptr, DType::kBFloat16, kGpu, 1, seqlen_q, num_heads_q, 576);
    args.k_cache = make_tensor(nullptr, DType::kBFloat16, kGpu, 1, 64, 1, 576);
    args.block_table = make_tensor(nullptr, DType::kInt32, kGpu, 1, 1);
    args.cache_seqlens = make_tensor(nullptr, DType::kInt32, kGpu, 1);
    args.out = make_tensor(nullptr, DType::kBFloat16, kGpu, 1, seqlen_q, num_heads_q, 512);
    args.lse = make_tensor(nullptr, DType::kFloat32, kGpu, 1, num_heads_q, seqlen_q);
    return dense_decode_max_workspace_size(args);
  };
  // As many tiles of 64 rows, the last of them full or not.
  EXPECT_EQ(size(1, kMaxInt32), size(1, kMaxInt32 - 62));
  EXPECT_EQ(size(kMaxInt32, 1), size(kMaxInt32 - 62, 1));
  EXPECT_EQ(size(1, kMaxInt32), size(kMaxInt32, 1));
  EXPECT_GT(size(1, kMaxInt32), size(1, kMaxInt32 - 63));
}

TEST(MaxWorkspaceSize, NeedsNoSlotsWhereNothingIsSplit) {
  DenseDecodeArguments args = right_call();
  args.tile_scheduler_metadata = {};
  args.num_splits = {};
  constexpr std::int64_t kQueries = 4096;  // 2 KV heads of 4096 tiles
  reshape(args.q, 4, kQueries, 128, 576);
  reshape(args.out, 4, kQueries, 128, 512);
  reshape(args.lse, 4, 128, kQueries);
  // The plan's row and the tiles' flags, filled up to a line.
  EXPECT_EQ(dense_decode_max_workspace_size(args), 32 + 2 * kQueries * 5 * sizeof(std::uint64_t) + 96);
}

TEST(MaxWorkspaceSize, IsNothingForNothingAndRefusesWrongShapes) {
  DenseDecodeArguments args = right_call();
  reshape(args.q, 4, 2, 128, 512);
  EXPECT_EQ(error_of([&] { dense_decode_max_workspace_size(args); }),
            "InvalidArgument: q: expected shape (batch_size, seqlen_q, num_heads_q, 576), got (4, 2, 128, 512)");
  DenseDecodeArguments empty = right_call();
  make_batch_of_0(empty);
  EXPECT_EQ(dense_decode_max_workspace_size(empty), 0U);
}

TEST(CheckPlan, TakesArraysThatAgree) {
  struct WrongPlan {
    void (*spoil)(PlanArguments&);
    const char* error;
  };
  const std::vector<WrongPlan> plans = {
      {[](PlanArguments&) {}, "no error"},
      {[](PlanArguments& a) { reshape(a.cache_seqlens, 4, 1); },
       "InvalidArgument: cache_seqlens: expected shape (batch_size,), got (4, 1)"},
      {[](PlanArguments& a) { reshape(a.cache_seqlens, (1 << 30) + 1); },
       "InvalidArgument: cache_seqlens: expected batch_size from 0 to 1073741824, got 1073741825"},
      {[](PlanArguments& a) { a.cache_seqlens.dtype = DType::kInt64; },
       "InvalidType: cache_seqlens: expected dtype int32, got int64"},
      {[](PlanArguments& a) { reshape(a.metadata, 66, 4); },
       "InvalidArgument: tile_scheduler_metadata: expected shape (num_sm_parts, 8), got (66, 4)"},
      {[](PlanArguments& a) { reshape(a.num_splits, 4); },
       "InvalidArgument: num_splits: expected shape (5,), got (4,)"},
      {[](PlanArguments& a) { a.num_splits.device = kCpu; },
       "InvalidArgument: num_splits: expected device cuda:1 as cache_seqlens, got cpu"},
      {[](PlanArguments& a) { a.metadata.data = nullptr; },
       "InvalidArgument: tile_scheduler_metadata: expected data, got a null pointer"},
      {[](PlanArguments& a) { a.num_splits.data = a.cache_seqlens.data; },
       "InvalidArgument: num_splits: expected memory apart from cache_seqlens, got bytes 0x10000000000 to "
       "0x10000000014 that overlap it"},
  };
  for (const WrongPlan& plan : plans) {
    PlanArguments args;
    plan.spoil(args);
    EXPECT_EQ(error_of([&] { check_plan(args.cache_seqlens, args.metadata, args.num_splits); }), plan.error);
  }
}

TEST(DtypeName, NamesEachType) {
  EXPECT_STREQ(dtype_name(DType::kBFloat16), "bfloat16");
  EXPECT_STREQ(dtype_name(DType::kFloat8E4M3), "float8_e4m3fn");
  EXPECT_STREQ(dtype_name(DType::kFloat8E5M2), "float8_e5m2");
  EXPECT_STREQ(dtype_name(DType::kUInt16), "uint16");
}

}  // namespace
}  // namespace flash_mla

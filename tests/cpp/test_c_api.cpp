// What the C interface adds to the C++ one: statuses for exceptions, structs of other versions, values out of range.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "flash_mla/c_api.h"
#include "flash_mla/flash_mla.h"

namespace flash_mla {
namespace {

template <class... Extents>
flash_mla_tensor make_c_tensor(void* data, flash_mla_dtype dtype, Extents... shape) {
  flash_mla_tensor t{data, dtype, FLASH_MLA_CPU, 0, sizeof...(shape), {static_cast<std::int64_t>(shape)...}, {}};
  EXPECT_EQ(flash_mla_set_contiguous_strides(&t), FLASH_MLA_OK);
  return t;
}

/// One query of 8 heads over 5 tokens; `more` is what a newer header would add to the arguments.
struct Call {
  std::vector<std::uint16_t> q = std::vector<std::uint16_t>(8 * kHeadDimQk, 0x3f80);
  std::vector<std::uint16_t> k_cache = std::vector<std::uint16_t>(64 * kHeadDimQk, 0x3f00);
  std::int32_t page = 0;
  std::int32_t seqlen = 5;
  std::vector<std::uint16_t> out = std::vector<std::uint16_t>(8 * kHeadDimV);
  std::vector<float> lse = std::vector<float>(8);
  struct {
    flash_mla_dense_decode_arguments args{};
    std::uint64_t more = 0;
  } given;

  Call() {
    flash_mla_dense_decode_arguments& args = given.args;
    args.struct_size = sizeof(args);
    args.q = make_c_tensor(q.data(), FLASH_MLA_BFLOAT16, 1, 1, 8, kHeadDimQk);
    args.k_cache = make_c_tensor(k_cache.data(), FLASH_MLA_BFLOAT16, 1, 64, 1, kHeadDimQk);
    args.block_table = make_c_tensor(&page, FLASH_MLA_INT32, 1, 1);
    args.cache_seqlens = make_c_tensor(&seqlen, FLASH_MLA_INT32, 1);
    args.out = make_c_tensor(out.data(), FLASH_MLA_BFLOAT16, 1, 1, 8, kHeadDimV);
    args.lse = make_c_tensor(lse.data(), FLASH_MLA_FLOAT32, 1, 8, 1);
  }
  flash_mla_status run() { return flash_mla_dense_decode(&given.args, nullptr, 0, nullptr); }
};

constexpr int kNumRows = 2 * 3;  // of a state: 2 requests, 1 query, 3 heads

/// A merge of 3 states, whose lse lie side by side; `more` as above.
struct MergeCall {
  std::vector<float> values = std::vector<float>(3 * kNumRows * kHeadDimV);
  std::vector<float> logs = std::vector<float>(3 * kNumRows);
  std::vector<float> out = std::vector<float>(kNumRows * kHeadDimV, -1.0F);
  std::vector<float> lse = std::vector<float>(kNumRows, -1.0F);
  std::vector<flash_mla_tensor> outs, lses;
  struct {
    flash_mla_merge_states_arguments args{};
    std::uint64_t more = 0;
  } given;

  MergeCall() {
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i * i % 101);
    for (std::size_t i = 0; i < logs.size(); ++i) logs[i] = static_cast<float>(i % 5);
    logs[0] = std::numeric_limits<float>::infinity();
    for (int s = 0; s < 3; ++s) {
      outs.push_back(make_c_tensor(&values[s * kNumRows * kHeadDimV], FLASH_MLA_FLOAT32, 2, 1, 3, kHeadDimV));
      lses.push_back(make_c_tensor(&logs[s], FLASH_MLA_FLOAT32, 2, 3, 1));
      for (std::int64_t& stride : lses[s].strides) stride *= 3;
    }
    flash_mla_merge_states_arguments& args = given.args;
    args.struct_size = sizeof(args);
    args.outs = outs.data();
    args.lses = lses.data();
    args.num_states = 3;
    args.out = make_c_tensor(out.data(), FLASH_MLA_FLOAT32, 2, 1, 3, kHeadDimV);
    args.lse = make_c_tensor(lse.data(), FLASH_MLA_FLOAT32, 2, 3, 1);
  }
  flash_mla_status run() { return flash_mla_merge_states(&given.args, nullptr); }
  bool is_unwritten() const {
    const auto is_initial = [](float value) { return value == -1.0F; };
    return std::all_of(out.begin(), out.end(), is_initial) && std::all_of(lse.begin(), lse.end(), is_initial);
  }
};

TEST(CApi, VersionIsTheProjects) {
  const std::string version = flash_mla_version();
  EXPECT_EQ(version, FLASH_MLA_TEST_VERSION);
}

TEST(CApi, ScaleOfZeroIsTheDefault) {
  Call by_default, by_value;
  by_value.given.args.softmax_scale = kDefaultSoftmaxScale;
  ASSERT_EQ(by_default.run(), FLASH_MLA_OK);
  ASSERT_EQ(by_value.run(), FLASH_MLA_OK);
  EXPECT_EQ(by_default.lse, by_value.lse);
  by_value.given.args.softmax_scale = 0.5F;
  ASSERT_EQ(by_value.run(), FLASH_MLA_OK);
  EXPECT_NE(by_default.lse, by_value.lse);
}

TEST(CApi, CausalReachesTheLibrary) {
  Call call;
  call.given.args.q.shape[1] = 2;  // 2 queries of 4 heads
  call.given.args.q.shape[2] = 4;
  call.given.args.out.shape[1] = 2;
  call.given.args.out.shape[2] = 4;
  call.given.args.lse.shape[1] = 4;
  call.given.args.lse.shape[2] = 2;
  for (flash_mla_tensor* t : {&call.given.args.q, &call.given.args.out, &call.given.args.lse}) {
    ASSERT_EQ(flash_mla_set_contiguous_strides(t), FLASH_MLA_OK);
  }
  ASSERT_EQ(call.run(), FLASH_MLA_OK);
  EXPECT_EQ(call.lse[0], call.lse[1]);
  call.given.args.causal = 1;
  ASSERT_EQ(call.run(), FLASH_MLA_OK);
  EXPECT_LT(call.lse[0], call.lse[1]);  // the first query sees 4 of the 5 tokens
}

TEST(CApi, WorkspaceForEveryGpuIsTheLibrarys) {
  const Call call;
  DenseDecodeArguments args;
  args.q = make_tensor(nullptr, DType::kBFloat16, {}, 1, 1, 8, kHeadDimQk);
  args.k_cache = make_tensor(nullptr, DType::kBFloat16, {}, 1, 64, 1, kHeadDimQk);
  args.block_table = make_tensor(nullptr, DType::kInt32, {}, 1, 1);
  args.cache_seqlens = make_tensor(nullptr, DType::kInt32, {}, 1);
  args.out = make_tensor(nullptr, DType::kBFloat16, {}, 1, 1, 8, kHeadDimV);
  args.lse = make_tensor(nullptr, DType::kFloat32, {}, 1, 8, 1);
  std::size_t bytes = 0;
  ASSERT_EQ(flash_mla_dense_decode_max_workspace_size(&call.given.args, &bytes), FLASH_MLA_OK);
  EXPECT_GT(bytes, 0U);
  EXPECT_EQ(bytes, dense_decode_max_workspace_size(args));
}

TEST(CApi, MergesAsTheLibraryDoes) {
  MergeCall call;
  ASSERT_EQ(call.run(), FLASH_MLA_OK) << flash_mla_last_error();

  const std::vector<Tensor> outs = unstack(make_tensor(call.values.data(), DType::kFloat32, {}, 3, 2, 1, 3, kHeadDimV));
  std::vector<Tensor> lses;
  for (float* first : {&call.logs[0], &call.logs[1], &call.logs[2]}) {
    lses.push_back(make_tensor(first, DType::kFloat32, {}, 2, 3, 1));
    lses.back().strides = {9, 3, 3};
  }
  std::vector<float> out(call.out.size()), lse(call.lse.size());
  MergeStatesArguments args;
  args.outs = outs.data();
  args.lses = lses.data();
  args.num_states = 3;
  args.out = make_tensor(out.data(), DType::kFloat32, {}, 2, 1, 3, kHeadDimV);
  args.lse = make_tensor(lse.data(), DType::kFloat32, {}, 2, 3, 1);
  merge_states(args, nullptr);
  EXPECT_EQ(call.out, out);
  EXPECT_EQ(call.lse, lse);
  EXPECT_FALSE(call.is_unwritten());
}

TEST(CApi, MergesAsManyStatesAsTheLibrary) {
  MergeCall call;
  call.outs.resize(kMaxMergeStates, call.outs[0]);
  call.lses.resize(kMaxMergeStates, call.lses[0]);
  call.given.args.outs = call.outs.data();
  call.given.args.lses = call.lses.data();
  call.given.args.num_states = kMaxMergeStates;
  ASSERT_EQ(call.run(), FLASH_MLA_OK) << flash_mla_last_error();
  call.lses.back().rank = -1;
  EXPECT_EQ(call.run(), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_mla_last_error(), "lses[127]: expected rank 0 to 5, got -1");
}

TEST(CApi, NamesTheStateThatIsWrong) {
  const struct {
    void (*spoil)(MergeCall&);
    flash_mla_status status;
    const char* message;
  } mistakes[] = {
      {[](MergeCall& c) { c.given.args.outs = nullptr; }, FLASH_MLA_INVALID_ARGUMENT,
       "outs: expected 3 tensors, got a null pointer"},
      {[](MergeCall& c) { c.given.args.lses = nullptr; }, FLASH_MLA_INVALID_ARGUMENT,
       "lses: expected 3 tensors, got a null pointer"},
      {[](MergeCall& c) { c.given.args.num_states = 0; }, FLASH_MLA_INVALID_ARGUMENT,
       "outs: expected 1 to 128 states, got 0"},
      {[](MergeCall& c) { c.given.args.num_states = -1; }, FLASH_MLA_INVALID_ARGUMENT,
       "outs: expected 1 to 128 states, got -1"},
      {[](MergeCall& c) { c.given.args.num_states = 129; }, FLASH_MLA_INVALID_ARGUMENT,  // of which 126 do not exist
       "outs: expected 1 to 128 states, got 129"},
      {[](MergeCall& c) { c.outs[2].dtype = FLASH_MLA_FLOAT16; }, FLASH_MLA_INVALID_TYPE,
       "outs[2]: expected dtype float32 as outs[0], got float16"},
      {[](MergeCall& c) { c.outs[0].dtype = 99; }, FLASH_MLA_INVALID_TYPE,
       "outs[0]: expected dtype bfloat16, float16 or float32, got an unknown dtype"},
      {[](MergeCall& c) { c.lses[1].dtype = FLASH_MLA_FLOAT64; }, FLASH_MLA_INVALID_TYPE,
       "lses[1]: expected dtype float32, got float64"},
      {[](MergeCall& c) { c.given.args.lse.dtype = FLASH_MLA_BFLOAT16; }, FLASH_MLA_INVALID_TYPE,
       "lse: expected dtype float32, got bfloat16"},
      {[](MergeCall& c) { c.given.args.out = {}; }, FLASH_MLA_INVALID_ARGUMENT,
       "out: expected shape (2, 1, 3, 512), got ()"},
      {[](MergeCall& c) { c.outs[1].rank = 6; }, FLASH_MLA_INVALID_ARGUMENT, "outs[1]: expected rank 0 to 5, got 6"},
      {[](MergeCall& c) { c.lses[2].device_type = 2; }, FLASH_MLA_INVALID_ARGUMENT,
       "lses[2]: expected device_type 0 (CPU) or 1 (CUDA), got 2"},
      {[](MergeCall& c) { c.lses[1].data = nullptr; }, FLASH_MLA_INVALID_ARGUMENT,
       "lses[1]: expected data, got a null pointer"},
  };
  for (const auto& mistake : mistakes) {
    MergeCall call;
    mistake.spoil(call);
    EXPECT_EQ(call.run(), mistake.status) << mistake.message;
    EXPECT_STREQ(flash_mla_last_error(), mistake.message);
    EXPECT_TRUE(call.is_unwritten()) << mistake.message;
  }
}

/// The message of a struct that is one byte too small.
std::string too_small(std::size_t size) {
  return "arguments: expected struct_size of at least " + std::to_string(size) + ", got " + std::to_string(size - 1);
}

TEST(CApi, RefusesStructsThatAreTooSmall) {
  Call call;
  call.given.args.struct_size = sizeof(call.given.args) - 1;
  EXPECT_EQ(call.run(), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(flash_mla_last_error()), too_small(sizeof(call.given.args)));
  MergeCall merge;
  merge.given.args.struct_size = sizeof(merge.given.args) - 1;
  EXPECT_EQ(merge.run(), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(flash_mla_last_error()), too_small(sizeof(merge.given.args)));
}

/// Of either operation.
template <class AnyCall>
void expect_new_fields_are_zero() {
  AnyCall call;
  call.given.args.struct_size = sizeof(call.given);
  ASSERT_EQ(call.run(), FLASH_MLA_OK);
  call.given.more = std::uint64_t{1} << 63;
  EXPECT_EQ(call.run(), FLASH_MLA_UNSUPPORTED);
  EXPECT_NE(std::strstr(flash_mla_last_error(), "newer version"), nullptr) << flash_mla_last_error();
}

TEST(CApi, TakesStructsOfANewerHeaderWhoseNewFieldsAreZero) {
  expect_new_fields_are_zero<Call>();
  expect_new_fields_are_zero<MergeCall>();
}

TEST(CApi, NamesTheTensorWhoseFieldsAreOutOfRange) {
  const struct {
    flash_mla_tensor flash_mla_dense_decode_arguments::* tensor;
    std::int32_t flash_mla_tensor::* field;
    std::int32_t value;
    flash_mla_status status;
    const char* message;
  } mistakes[] = {
      {&flash_mla_dense_decode_arguments::q, &flash_mla_tensor::rank, 6, FLASH_MLA_INVALID_ARGUMENT,
       "q: expected rank 0 to 5, got 6"},
      {&flash_mla_dense_decode_arguments::lse, &flash_mla_tensor::rank, -1, FLASH_MLA_INVALID_ARGUMENT,
       "lse: expected rank 0 to 5, got -1"},
      {&flash_mla_dense_decode_arguments::out, &flash_mla_tensor::rank, 0, FLASH_MLA_INVALID_ARGUMENT,
       "out: expected shape (1, 1, 8, 512), got ()"},
      {&flash_mla_dense_decode_arguments::block_table, &flash_mla_tensor::device_type, 2, FLASH_MLA_INVALID_ARGUMENT,
       "block_table: expected device_type 0 (CPU) or 1 (CUDA), got 2"},
      {&flash_mla_dense_decode_arguments::cache_seqlens, &flash_mla_tensor::dtype, 99, FLASH_MLA_INVALID_TYPE,
       "cache_seqlens: expected dtype int32, got an unknown dtype"},
      {&flash_mla_dense_decode_arguments::k_cache, &flash_mla_tensor::dtype, -1, FLASH_MLA_INVALID_TYPE,
       "k_cache: expected dtype bfloat16 as q, got an unknown dtype"},
      {&flash_mla_dense_decode_arguments::num_splits, &flash_mla_tensor::rank, 1, FLASH_MLA_INVALID_ARGUMENT,
       "tile_scheduler_metadata: expected both parts of a plan or neither, got one alone"},
  };
  for (const auto& mistake : mistakes) {
    Call call;
    call.given.args.*mistake.tensor.*mistake.field = mistake.value;
    EXPECT_EQ(call.run(), mistake.status) << mistake.message;
    EXPECT_STREQ(flash_mla_last_error(), mistake.message);
  }
}

TEST(CApi, TakesAnyIndexOfTheCpu) {
  Call call;
  call.given.args.q.device_index = -1;
  call.given.args.k_cache.device_index = 3;
  EXPECT_EQ(call.run(), FLASH_MLA_OK) << flash_mla_last_error();
}

TEST(CApi, PlansForOneQueryRowAtLeast) {
  const Call call;
  const flash_mla_tensor& lengths = call.given.args.cache_seqlens;
  EXPECT_EQ(flash_mla_plan_dense_decode(&lengths, 0, &lengths, &lengths, nullptr), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_mla_last_error(), "num_q_tokens_per_head_k: expected at least 1, got 0");
}

TEST(CApi, NamesPointersThatAreNull) {
  const Call call;
  EXPECT_EQ(flash_mla_dense_decode_workspace_size(&call.given.args, nullptr), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_mla_last_error(), "bytes: expected an address, got a null pointer");
  EXPECT_EQ(flash_mla_dense_decode_max_workspace_size(&call.given.args, nullptr), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_mla_last_error(), "bytes: expected an address, got a null pointer");
  EXPECT_EQ(flash_mla_merge_states(nullptr, nullptr), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_mla_last_error(), "arguments: expected an address, got a null pointer");
  EXPECT_EQ(flash_mla_dense_decode_num_sm_parts(1, 1, FLASH_MLA_CPU, 0, nullptr), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_mla_last_error(), "num_sm_parts: expected an address, got a null pointer");
  EXPECT_EQ(flash_mla_plan_dense_decode(&call.given.args.cache_seqlens, 1, nullptr, nullptr, nullptr),
            FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_mla_last_error(), "tile_scheduler_metadata: expected an address, got a null pointer");
  EXPECT_EQ(flash_mla_set_contiguous_strides(nullptr), FLASH_MLA_INVALID_ARGUMENT);
}

TEST(CApi, RefusesExtentsWithoutStrides) {
  constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();
  flash_mla_tensor t{nullptr, FLASH_MLA_INT32, FLASH_MLA_CPU, 0, 3, {kHuge, 2, 3}, {7, 8, 9}};
  EXPECT_EQ(flash_mla_set_contiguous_strides(&t), FLASH_MLA_INVALID_ARGUMENT);
  t.shape[1] = -1;
  EXPECT_EQ(flash_mla_set_contiguous_strides(&t), FLASH_MLA_INVALID_ARGUMENT);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(t.strides[i], 7 + i) << "stride " << i;
  t.rank = 6;
  EXPECT_EQ(flash_mla_set_contiguous_strides(&t), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_mla_last_error(), "tensor: expected rank 0 to 5, got 6");
}

TEST(CApi, EveryThreadHasItsOwnLastError) {
  EXPECT_EQ(flash_mla_dense_decode(nullptr, nullptr, 0, nullptr), FLASH_MLA_INVALID_ARGUMENT);
  const std::string mine = flash_mla_last_error();
  std::string before = "unset", after;
  std::thread([&] {
    before = flash_mla_last_error();
    flash_mla_dense_decode_num_sm_parts(0, 1, FLASH_MLA_CPU, 0, nullptr);
    after = flash_mla_last_error();
  }).join();
  EXPECT_EQ(before, "");
  EXPECT_EQ(after, "num_sm_parts: expected an address, got a null pointer");
  EXPECT_EQ(flash_mla_last_error(), mine);
}

TEST(CApi, NoSuchGpuIsUnsupported) {
  std::int64_t parts = 0;
  EXPECT_EQ(flash_mla_dense_decode_num_sm_parts(1, 1, FLASH_MLA_CUDA, 1000, &parts), FLASH_MLA_UNSUPPORTED);
  EXPECT_EQ(flash_mla_last_cuda_error(), 0);
  EXPECT_EQ(std::string(flash_mla_last_error()).rfind("device: ", 0), 0U) << flash_mla_last_error();
}

}  // namespace
}  // namespace flash_mla

#include "api/check_merge_states.h"

#include <string>

#include "api/argument.h"
#include "flash_mla/dense_decode.h"

namespace flash_mla {
namespace {

using namespace checks;

void check_states(const MergeStatesArguments& args) {
  if (args.num_states < 1 || args.num_states > kMaxMergeStates) {
    fail("outs", "1 to " + std::to_string(kMaxMergeStates) + " states", std::to_string(args.num_states));
  }
  if (args.outs == nullptr) fail("outs", std::to_string(args.num_states) + " tensors", "a null pointer");
  if (args.lses == nullptr) fail("lses", std::to_string(args.num_states) + " tensors", "a null pointer");
}

/// The first state's out, after which the others go.
MergeStatesShape check_first_out(Argument out, std::int64_t num_states) {
  check_shape(out, {"batch_size", "seqlen_q", "num_heads_q", kHeadDimV});
  const DType dtype = out.tensor.dtype;
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16 && dtype != DType::kFloat32) {
    fail_dtype(out, "bfloat16, float16 or float32");
  }
  std::int64_t num_rows = 1;
  for (int i = 0; i < 3 && num_rows > 0; ++i) {
    if (__builtin_mul_overflow(num_rows, out.tensor.shape[i], &num_rows) || num_rows > kMaxInt32) {
      fail_shape(out, {"batch_size", "seqlen_q", "num_heads_q: 2^31 - 1 rows at most", kHeadDimV});
    }
  }
  const auto& shape = out.tensor.shape;
  return {num_states, shape[0], shape[1], shape[2]};
}

void check_lse(Argument lse, const MergeStatesShape& shape) {
  check_shape(lse, {shape.batch_size, shape.num_heads_q, shape.seqlen_q});
  check_dtype(lse, DType::kFloat32);
  if (!is_empty(lse.tensor)) check_strides(lse);
}

/// The results' types, shapes and strides.
void check_results(Argument out, Argument lse, const MergeStatesShape& shape, DType dtype) {
  check_shape(out, {shape.batch_size, shape.seqlen_q, shape.num_heads_q, kHeadDimV});
  if (out.tensor.dtype != dtype && out.tensor.dtype != DType::kFloat32) {
    fail_dtype(out, std::string(dtype_name(dtype)) + " as outs, or float32");
  }
  check_rows(out);
  check_lse(lse, shape);
  if (shape.num_rows() == 0) return;
  check_no_self_overlap(out);
  check_no_self_overlap(lse);
}

}  // namespace

MergeStatesShape check_merge_states(const MergeStatesArguments& args) {
  check_states(args);
  const Argument out{"out", args.out};
  const Argument lse{"lse", args.lse};
  const Tensor& first = args.outs[0];
  const MergeStatesShape shape = check_first_out({"outs", first, 0}, args.num_states);
  for (std::int64_t i = 0; i < args.num_states; ++i) {
    const Argument state_out{"outs", args.outs[i], i};
    check_shape(state_out, {shape.batch_size, shape.seqlen_q, shape.num_heads_q, kHeadDimV});
    check_dtype(state_out, first.dtype, " as outs[0]");
    check_rows(state_out);
    check_lse({"lses", args.lses[i], i}, shape);
  }
  check_results(out, lse, shape, first.dtype);

  const auto check_place = [&](Argument arg, std::int64_t alignment) {
    check_device(arg, first.device, "outs[0]");
    check_address(arg, alignment);
  };
  for (std::int64_t i = 0; i < args.num_states; ++i) {
    check_place({"outs", args.outs[i], i}, row_alignment(first));
    check_place({"lses", args.lses[i], i}, sizeof(float));
  }
  check_place(out, row_alignment(args.out));
  check_place(lse, sizeof(float));

  const Span out_span(out);
  const Span lse_span(lse);
  check_apart(out_span, lse_span);
  for (std::int64_t i = 0; i < args.num_states; ++i) {
    for (const Span& state : {Span({"outs", args.outs[i], i}), Span({"lses", args.lses[i], i})}) {
      check_apart(out_span, state);
      check_apart(lse_span, state);
    }
  }
  return shape;
}

}  // namespace flash_mla

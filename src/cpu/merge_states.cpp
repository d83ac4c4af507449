#include "cpu/merge_states.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/half.h"
#include "cpu/parallel.h"
#include "flash_mla/dense_decode.h"

namespace flash_mla::cpu {
namespace {

constexpr std::int64_t kRowsPerItem = 32;  // rows that a thread takes at a time: 16 KiB of each state, and more
constexpr float kInfinity = std::numeric_limits<float>::infinity();

float to_float(float value) { return value; }
void from_float(float value, float& result) { result = value; }

/// A row: one head of one query of one request.
struct Row {
  std::int64_t batch_idx;
  std::int64_t query;
  std::int64_t head;

  template <class Element>
  Element* of_out(const Tensor& t) const {
    return static_cast<Element*>(t.data) + batch_idx * t.strides[0] + query * t.strides[1] + head * t.strides[2];
  }
  float* of_lse(const Tensor& t) const {
    return static_cast<float*>(t.data) + batch_idx * t.strides[0] + head * t.strides[1] + query * t.strides[2];
  }
};

template <class In, class Out>
class RowMerger {
 public:
  RowMerger(const MergeStatesArguments& args, const MergeStatesShape& shape)
      : args_(args), shape_(shape), lses_(static_cast<std::size_t>(shape.num_states)) {}

  void operator()(std::int64_t item) {
    const std::int64_t end = std::min((item + 1) * kRowsPerItem, shape_.num_rows());
    for (std::int64_t i = item * kRowsPerItem; i < end; ++i) {
      const std::int64_t token = i / shape_.num_heads_q;
      merge({token / shape_.seqlen_q, token % shape_.seqlen_q, i % shape_.num_heads_q});
    }
  }

 private:
  void merge(const Row& row) {
    bool has_keys = false;
    float max = -kInfinity;  // NaN never becomes the maximum: it reaches the sums as a weight
    for (std::int64_t s = 0; s < shape_.num_states; ++s) {
      lses_[s] = *row.of_lse(args_.lses[s]);
      if (std::isinf(lses_[s])) continue;
      has_keys = true;
      if (lses_[s] > max) max = lses_[s];
    }
    std::array<float, kHeadDimV> sums{};
    float weight_sum = 0.0F;
    for (std::int64_t s = 0; s < shape_.num_states; ++s) {
      if (std::isinf(lses_[s])) continue;
      const float weight = std::exp(lses_[s] - max);
      const In* const values = row.of_out<const In>(args_.outs[s]);
      for (int d = 0; d < kHeadDimV; ++d) sums[d] += weight * to_float(values[d]);
      weight_sum += weight;
    }
    const float inverse = has_keys ? 1.0F / weight_sum : 0.0F;
    Out* const out = row.of_out<Out>(args_.out);
    for (int d = 0; d < kHeadDimV; ++d) from_float(sums[d] * inverse, out[d]);
    *row.of_lse(args_.lse) = has_keys ? max + std::log(weight_sum) : kInfinity;
  }

  const MergeStatesArguments& args_;
  const MergeStatesShape& shape_;
  std::vector<float> lses_;  // of the states, for the row at hand
};

template <class In, class Out>
void run(const MergeStatesArguments& args, const MergeStatesShape& shape) {
  parallel_for((shape.num_rows() + kRowsPerItem - 1) / kRowsPerItem, [&] { return RowMerger<In, Out>(args, shape); });
}

template <class In>
void run_to(const MergeStatesArguments& args, const MergeStatesShape& shape) {
  if (args.out.dtype == DType::kFloat32) {
    run<In, float>(args, shape);
  } else {
    run<In, In>(args, shape);
  }
}

}  // namespace

void merge_states(const MergeStatesArguments& args, const MergeStatesShape& shape) {
  switch (args.outs[0].dtype) {
    case DType::kBFloat16:
      return run_to<BFloat16>(args, shape);
    case DType::kFloat16:
      return run_to<Float16>(args, shape);
    default:
      return run_to<float>(args, shape);
  }
}

}  // namespace flash_mla::cpu

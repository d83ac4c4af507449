#include "flash_mla/plan.h"

#include "bindings/dlpack.h"
#include "bindings/register.h"
#include "bindings/torch_tensor.h"

namespace flash_mla::bindings {
namespace {

std::int64_t num_sm_parts(nb::handle cache_seqlens, std::int64_t num_q_tokens_per_head_k, std::int64_t num_heads_k) {
  return dense_decode_num_sm_parts(num_q_tokens_per_head_k, num_heads_k,
                                   ArrayView("cache_seqlens", cache_seqlens).tensor().device);
}

std::int64_t num_sm_parts_of_gpu(int index, std::int64_t num_q_tokens_per_head_k, std::int64_t num_heads_k) {
  return dense_decode_num_sm_parts(num_q_tokens_per_head_k, num_heads_k, {DeviceType::kCuda, index});
}

void plan(nb::handle cache_seqlens, nb::handle tile_scheduler_metadata, nb::handle num_splits,
          std::int64_t num_q_tokens_per_head_k, nb::handle stream) {
  const ArrayView seqlens("cache_seqlens", cache_seqlens);
  const ArrayView metadata("tile_scheduler_metadata", tile_scheduler_metadata, Access::kWrite);
  const ArrayView splits("num_splits", num_splits, Access::kWrite);
  CUstream_st* const cuda_stream = seqlens.current_stream(stream);
  const nb::gil_scoped_release no_gil;
  plan_dense_decode(seqlens.tensor(), num_q_tokens_per_head_k, metadata.tensor(), splits.tensor(), cuda_stream);
}

/// Both arrays of a plan, for a tensor of PyTorch. None, with nothing done, where it isn't one, and where PyTorch
/// cannot allocate.
nb::object torch_plan(nb::handle cache_seqlens, std::int64_t num_q_tokens_per_head_k, std::int64_t num_heads_k) {
  Tensor seqlens;
  if (!torch::is_tensor(cache_seqlens) || torch::is_watched() ||
      !torch::view("cache_seqlens", cache_seqlens, seqlens)) {
    return nb::none();
  }
  const std::int64_t num_parts = dense_decode_num_sm_parts(num_q_tokens_per_head_k, num_heads_k, seqlens.device);
  CUstream_st* const stream = torch::current_stream(seqlens.device);
  torch::NewTensor metadata;
  torch::NewTensor splits;
  {
    const nb::gil_scoped_release no_gil;
    metadata = torch::NewTensor(DType::kInt32, seqlens.device, {num_parts, kTileSchedulerMetadataSize});
    splits = torch::NewTensor(DType::kInt32, seqlens.device, {seqlens.shape[0] + 1});
    if (metadata && splits) {
      plan_dense_decode(seqlens, num_q_tokens_per_head_k, metadata.view(), splits.view(), stream);
    }
  }
  if (!metadata || !splits) return nb::none();
  return nb::make_tuple(metadata.to_python(), splits.to_python());
}

}  // namespace

void register_plan(nb::module_& m) {
  using namespace nb::literals;
  m.def("dense_decode_num_sm_parts", num_sm_parts, "cache_seqlens"_a.none(), "num_q_tokens_per_head_k"_a,
        "num_heads_k"_a, "The first extent of tile_scheduler_metadata on the device of cache_seqlens.");
  m.def("dense_decode_num_sm_parts_of_gpu", num_sm_parts_of_gpu, "index"_a, "num_q_tokens_per_head_k"_a,
        "num_heads_k"_a, "The same for a CUDA device by its number.");
  m.def("plan_dense_decode", plan, "cache_seqlens"_a.none(), "tile_scheduler_metadata"_a.none(), "num_splits"_a.none(),
        "num_q_tokens_per_head_k"_a, "stream"_a = nb::none(),
        "Writes the plan of a step for cache_seqlens into the two other arrays.");
  m.def("torch_plan_dense_decode", torch_plan, "cache_seqlens"_a.none(), "num_q_tokens_per_head_k"_a, "num_heads_k"_a,
        "(tile_scheduler_metadata, num_splits) for a tensor of PyTorch. None where plan_dense_decode is to be called "
        "instead.");
}

}  // namespace flash_mla::bindings

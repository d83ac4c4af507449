#include "flash_mla/dense_decode.h"

#include <array>
#include <cstddef>
#include <cstdint>

#include "bindings/dlpack.h"
#include "bindings/register.h"
#include "bindings/torch_tensor.h"

namespace flash_mla::bindings {
namespace {

/// The views of a call and the arguments made of them.
struct Call {
  ArrayView q, k_cache, block_table, cache_seqlens, out, lse, tile_scheduler_metadata, num_splits;
  DenseDecodeArguments args;

  Call(nb::handle q_, nb::handle k_cache_, nb::handle block_table_, nb::handle cache_seqlens_, nb::handle out_,
       nb::handle lse_, nb::handle tile_scheduler_metadata_, nb::handle num_splits_, float softmax_scale, bool causal)
      : q("q", q_),
        k_cache("k_cache", k_cache_),
        block_table("block_table", block_table_),
        cache_seqlens("cache_seqlens", cache_seqlens_),
        out(ArrayView::optional("out", out_, Access::kWrite)),
        lse(ArrayView::optional("lse", lse_, Access::kWrite)),
        tile_scheduler_metadata(ArrayView::optional("tile_scheduler_metadata", tile_scheduler_metadata_)),
        num_splits(ArrayView::optional("num_splits", num_splits_)),
        args{q.tensor(),
             k_cache.tensor(),
             block_table.tensor(),
             cache_seqlens.tensor(),
             out.tensor(),
             lse.tensor(),
             tile_scheduler_metadata.tensor(),
             num_splits.tensor(),
             softmax_scale,
             causal} {}
};

/// Calls a function of the C++ library that only looks at shapes; results left out are what they would have to be.
template <std::size_t (*function)(const DenseDecodeArguments&)>
std::size_t workspace_size(nb::handle q, nb::handle k_cache, nb::handle block_table, nb::handle cache_seqlens,
                           nb::handle out, nb::handle lse, nb::handle tile_scheduler_metadata, nb::handle num_splits,
                           float softmax_scale, bool causal) {
  Call call(q, k_cache, block_table, cache_seqlens, out, lse, tile_scheduler_metadata, num_splits, softmax_scale,
            causal);
  DenseDecodeArguments& args = call.args;
  const std::int64_t batch_size = args.q.shape[0];
  const std::int64_t seqlen_q = args.q.shape[1];
  const std::int64_t num_heads_q = args.q.shape[2];
  if (!args.out) {
    args.out = make_tensor(nullptr, args.q.dtype, args.q.device, batch_size, seqlen_q, num_heads_q, kHeadDimV);
  }
  if (!args.lse) {
    args.lse = make_tensor(nullptr, DType::kFloat32, args.q.device, batch_size, num_heads_q, seqlen_q);
  }
  return function(args);
}

void decode(nb::handle q, nb::handle k_cache, nb::handle block_table, nb::handle cache_seqlens, nb::handle out,
            nb::handle lse, nb::handle tile_scheduler_metadata, nb::handle num_splits, float softmax_scale, bool causal,
            nb::handle stream, nb::handle allocate) {
  const Call call(q, k_cache, block_table, cache_seqlens, out, lse, tile_scheduler_metadata, num_splits, softmax_scale,
                  causal);
  const std::size_t workspace_bytes = dense_decode_workspace_size(call.args);
  const Workspace workspace(call.q, workspace_bytes, allocate);
  CUstream_st* const cuda_stream = call.q.current_stream(stream);
  const nb::gil_scoped_release no_gil;
  dense_decode(call.args, workspace.data(), workspace_bytes, cuda_stream);
}

/// Whether `extents`, where it isn't None, is (batch, seqlen_q, num_heads_q, num_heads_k) of the call.
bool agree(nb::handle extents, const DenseDecodeArguments& args) {
  if (extents.is_none()) return true;
  const std::int64_t found[] = {args.q.shape[0], args.q.shape[1], args.q.shape[2], args.k_cache.shape[2]};
  if (!nb::isinstance<nb::tuple>(extents) || nb::len(extents) != std::size(found)) return false;
  for (std::size_t i = 0; i < std::size(found); ++i) {
    if (nb::cast<std::int64_t>(extents[i]) != found[i]) return false;
  }
  return true;
}

/// Allocates the results that `args` leaves out, and the workspace; decodes. False, with nothing launched, where
/// PyTorch cannot allocate. Needs no GIL.
bool allocate_and_decode(DenseDecodeArguments& args, torch::NewTensor& out, torch::NewTensor& lse,
                         CUstream_st* stream) {
  const std::int64_t batch_size = args.q.shape[0];
  const std::int64_t seqlen_q = args.q.shape[1];
  const std::int64_t num_heads_q = args.q.shape[2];
  if (!args.out) {
    out = torch::NewTensor(args.q.dtype, args.q.device, {batch_size, seqlen_q, num_heads_q, kHeadDimV});
    if (!out) return false;
    args.out = out.view();
  }
  if (!args.lse) {
    lse = torch::NewTensor(DType::kFloat32, args.q.device, {batch_size, num_heads_q, seqlen_q});
    if (!lse) return false;
    args.lse = lse.view();
  }
  const std::size_t workspace_bytes = dense_decode_workspace_size(args);
  const torch::Workspace workspace(args.q.device, workspace_bytes);
  if (workspace_bytes > 0 && workspace.data() == nullptr) return false;
  dense_decode(args, workspace.data(), workspace_bytes, stream);
  return true;
}

struct NamedTensor {
  const char* name;
  nb::handle array;
  Tensor& tensor;
};

/// dense_decode on PyTorch's tensors, in one go from the arguments to the results. Returns None, with nothing done, for
/// what the longer way through Python serves, or explains the error of.
nb::object torch_decode(nb::handle q, nb::handle k_cache, nb::handle block_table, nb::handle cache_seqlens,
                        nb::handle out, nb::handle lse, nb::handle tile_scheduler_metadata, nb::handle num_splits,
                        float softmax_scale, bool causal, nb::handle extents) {
  DenseDecodeArguments args;
  const NamedTensor required[] = {{"q", q, args.q},
                                  {"k_cache", k_cache, args.k_cache},
                                  {"block_table", block_table, args.block_table},
                                  {"cache_seqlens", cache_seqlens, args.cache_seqlens}};
  const NamedTensor optional[] = {{"out", out, args.out},
                                  {"lse", lse, args.lse},
                                  {"tile_scheduler_metadata", tile_scheduler_metadata, args.tile_scheduler_metadata},
                                  {"num_splits", num_splits, args.num_splits}};
  for (const NamedTensor& argument : required) {
    if (!torch::is_tensor(argument.array)) return nb::none();
  }
  for (const NamedTensor& argument : optional) {
    if (!argument.array.is_none() && !torch::is_tensor(argument.array)) return nb::none();
  }
  if (torch::is_watched()) return nb::none();
  for (const NamedTensor& argument : required) {
    if (!torch::view(argument.name, argument.array, argument.tensor)) return nb::none();
  }
  for (const NamedTensor& argument : optional) {
    if (!argument.array.is_none() && !torch::view(argument.name, argument.array, argument.tensor)) return nb::none();
  }
  args.softmax_scale = softmax_scale;
  args.causal = causal;
  const bool is_16_bit = args.q.dtype == DType::kBFloat16 || args.q.dtype == DType::kFloat16;
  if (args.q.rank != 4 || !is_16_bit || args.k_cache.rank != 4 || !agree(extents, args)) return nb::none();

  torch::NewTensor new_out;
  torch::NewTensor new_lse;
  CUstream_st* const stream = torch::current_stream(args.q.device);
  bool is_done = false;
  {
    const nb::gil_scoped_release no_gil;
    is_done = allocate_and_decode(args, new_out, new_lse, stream);
  }
  if (!is_done) return nb::none();
  return nb::make_tuple(new_out ? new_out.to_python() : nb::borrow(out),
                        new_lse ? new_lse.to_python() : nb::borrow(lse));
}

}  // namespace

void register_dense_decode(nb::module_& m) {
  using namespace nb::literals;  // every array is .none(), so that ArrayView names the one that is missing
  m.def("dense_decode_workspace_size", workspace_size<dense_decode_workspace_size>, "q"_a.none(), "k_cache"_a.none(),
        "block_table"_a.none(), "cache_seqlens"_a.none(), "out"_a.none(), "lse"_a.none(),
        "tile_scheduler_metadata"_a.none(), "num_splits"_a.none(), "softmax_scale"_a, "causal"_a,
        "Checks the arguments of dense_decode; bytes of workspace that they need.");
  m.def("dense_decode_max_workspace_size", workspace_size<dense_decode_max_workspace_size>, "q"_a.none(),
        "k_cache"_a.none(), "block_table"_a.none(), "cache_seqlens"_a.none(), "out"_a.none(), "lse"_a.none(),
        "tile_scheduler_metadata"_a.none(), "num_splits"_a.none(), "softmax_scale"_a, "causal"_a,
        "The same, without asking a device: bytes that suffice on every GPU that the kernels run on.");
  m.def("dense_decode", decode, "q"_a.none(), "k_cache"_a.none(), "block_table"_a.none(), "cache_seqlens"_a.none(),
        "out"_a.none(), "lse"_a.none(), "tile_scheduler_metadata"_a.none(), "num_splits"_a.none(), "softmax_scale"_a,
        "causal"_a, "stream"_a = nb::none(), "allocate"_a = nb::none(),
        "Writes out and lse. `stream` and `allocate`, (num_bytes) -> uint8 array, serve array types without DLPack's "
        "exchange table; for others the stream and the workspace come from their library.");
  m.def("torch_dense_decode", torch_decode, "q"_a.none(), "k_cache"_a.none(), "block_table"_a.none(),
        "cache_seqlens"_a.none(), "out"_a.none(), "lse"_a.none(), "tile_scheduler_metadata"_a.none(),
        "num_splits"_a.none(), "softmax_scale"_a, "causal"_a, "extents"_a.none(),
        "dense_decode on tensors of PyTorch: makes what is None of out and lse, and returns both. None where "
        "dense_decode is to be called instead.");
}

}  // namespace flash_mla::bindings

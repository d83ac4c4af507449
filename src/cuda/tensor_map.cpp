#include "cuda/tensor_map.h"

#include <cuda_runtime_api.h>

#include <string>

#include "cuda/error.h"

namespace flash_mla::cuda {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result),
        "cudaGetDriverEntryPointByVersion");
  if (result != cudaDriverEntryPointSuccess || function == nullptr) {
    throw Unsupported("the CUDA driver is too old: it has no cuTensorMapEncodeTiled (12.0)");
  }
  return reinterpret_cast<EncodeTiled>(function);
}

}  // namespace

CUtensorMap make_tensor_map(const TensorMapArguments& args) {
  static const EncodeTiled encode = find_encode_tiled();
  constexpr int kRank = 4;
  constexpr cuuint64_t kElementBytes = 2;
  const CUtensorMapDataType dtype =
      args.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  cuuint64_t shape[kRank];
  cuuint64_t strides[kRank - 1];
  cuuint32_t box[kRank];
  cuuint32_t element_strides[kRank];
  for (int i = 0; i < kRank; ++i) {
    shape[i] = static_cast<cuuint64_t>(args.shape[i]);
    box[i] = static_cast<cuuint32_t>(args.box[i]);
    element_strides[i] = 1;
  }
  for (int i = 0; i < kRank - 1; ++i) strides[i] = static_cast<cuuint64_t>(args.strides[i]) * kElementBytes;

  // No L2 promotion: reading a paged cache with it reaches 4.1 TB/s where 4.4 are possible without.
  CUtensorMap map;
  const CUresult status =
      encode(&map, dtype, kRank, args.data, shape, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw CudaError(static_cast<int>(status), "cuTensorMapEncodeTiled failed with CUresult " + std::to_string(status));
  }
  return map;
}

}  // namespace flash_mla::cuda

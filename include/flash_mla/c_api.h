#pragma once

// The library for C, and for languages that call C: Rust, Go, Python's ctypes. C99 or newer, or C++. What arguments
// mean and which shapes they take is said in dense_decode.h, plan.h and merge_states.h, whose functions have the same
// names. No exception leaves these functions; all may be called from any thread.

#include <stddef.h>
#include <stdint.h>

#include "flash_mla/export.h"

// A cudaStream_t is a pointer to it.
struct CUstream_st;

#ifdef __cplusplus
extern "C" {
#endif

/// What every call returns. error.h says more about each.
typedef enum flash_mla_status {
  FLASH_MLA_OK = 0,
  FLASH_MLA_INVALID_ARGUMENT = 1,  ///< a wrong shape, stride, device, alignment or value
  FLASH_MLA_INVALID_TYPE = 2,      ///< a wrong data type
  FLASH_MLA_UNSUPPORTED = 3,       ///< well formed, but not for this build or machine (no Hopper GPU, for one)
  FLASH_MLA_CUDA_ERROR = 4,        ///< flash_mla_last_cuda_error says which
  FLASH_MLA_OUT_OF_MEMORY = 5,     ///< host memory
  FLASH_MLA_INTERNAL_ERROR = 6     ///< anything else
} flash_mla_status;

/// Values of flash_mla_tensor.dtype. The library computes on the first three; the others exist so that an error can
/// name them.
typedef enum flash_mla_dtype {
  FLASH_MLA_BFLOAT16 = 0,
  FLASH_MLA_FLOAT16 = 1,
  FLASH_MLA_FLOAT32 = 2,
  FLASH_MLA_FLOAT64 = 3,
  FLASH_MLA_FLOAT8_E4M3 = 4,
  FLASH_MLA_FLOAT8_E5M2 = 5,
  FLASH_MLA_INT8 = 6,
  FLASH_MLA_INT16 = 7,
  FLASH_MLA_INT32 = 8,
  FLASH_MLA_INT64 = 9,
  FLASH_MLA_UINT8 = 10,
  FLASH_MLA_UINT16 = 11,
  FLASH_MLA_UINT32 = 12,
  FLASH_MLA_UINT64 = 13,
  FLASH_MLA_BOOL = 14,
  FLASH_MLA_OTHER = 15
} flash_mla_dtype;

/// Values of flash_mla_tensor.device_type.
typedef enum flash_mla_device_type { FLASH_MLA_CPU = 0, FLASH_MLA_CUDA = 1 } flash_mla_device_type;

/// A view of memory that the caller owns, of `rank` dimensions. All zeros stand for an argument left out.
typedef struct flash_mla_tensor {
  void* data;
  int32_t dtype;         ///< a flash_mla_dtype
  int32_t device_type;   ///< a flash_mla_device_type
  int32_t device_index;  ///< CUDA device ordinal, 0 for the CPU
  int32_t rank;          ///< 1 to 5; 0 for an argument left out
  int64_t shape[5];
  int64_t strides[5];  ///< in elements
} flash_mla_tensor;

/// Arguments of dense decode; tensors as dense_decode.h describes them. Zero the struct, then set struct_size.
typedef struct flash_mla_dense_decode_arguments {
  size_t struct_size;  ///< sizeof(flash_mla_dense_decode_arguments): later versions add fields at the end
  flash_mla_tensor q;
  flash_mla_tensor k_cache;
  flash_mla_tensor block_table;
  flash_mla_tensor cache_seqlens;
  flash_mla_tensor out;
  flash_mla_tensor lse;
  flash_mla_tensor tile_scheduler_metadata;  ///< leave this and num_splits out, and the call plans by itself
  flash_mla_tensor num_splits;
  float softmax_scale;  ///< as in C++; 0 stands for 576 ** -0.5
  int32_t causal;       ///< 0: a query sees all keys; else bottom-right
} flash_mla_dense_decode_arguments;

/// Arguments of a merge, as merge_states.h describes them. Zero the struct, then set struct_size.
typedef struct flash_mla_merge_states_arguments {
  size_t struct_size;            ///< sizeof(flash_mla_merge_states_arguments): may grow at the end, too
  const flash_mla_tensor* outs;  ///< num_states tensors; the list itself may go when the call returns
  const flash_mla_tensor* lses;  ///< the same
  int64_t num_states;            ///< 1 to 128
  flash_mla_tensor out;
  flash_mla_tensor lse;
} flash_mla_merge_states_arguments;

/// The library's version: "major.minor.patch".
FLASH_MLA_API const char* flash_mla_version(void);

/// What the last call that failed on this thread has to say: names the argument, what it got and what it takes. ""
/// where none has failed. Valid until the next one fails on this thread.
FLASH_MLA_API const char* flash_mla_last_error(void);

/// The cudaError_t or CUresult of the last call that failed on this thread, 0 if it failed without one.
FLASH_MLA_API int32_t flash_mla_last_cuda_error(void);

/// Sets the strides of a row-major tensor from its rank and shape. Where it fails, none of them.
FLASH_MLA_API flash_mla_status flash_mla_set_contiguous_strides(flash_mla_tensor* tensor);

/// The first extent of tile_scheduler_metadata; see dense_decode_num_sm_parts in plan.h.
/// @param num_sm_parts  out
FLASH_MLA_API flash_mla_status flash_mla_dense_decode_num_sm_parts(int64_t num_q_tokens_per_head_k, int64_t num_heads_k,
                                                                   int32_t device_type, int32_t device_index,
                                                                   int64_t* num_sm_parts);

/// Plans a step, on the arrays' device and ordered on `stream`; see plan.h.
/// @param tile_scheduler_metadata, num_splits  what they point to is written
FLASH_MLA_API flash_mla_status flash_mla_plan_dense_decode(const flash_mla_tensor* cache_seqlens,
                                                           int64_t num_q_tokens_per_head_k,
                                                           const flash_mla_tensor* tile_scheduler_metadata,
                                                           const flash_mla_tensor* num_splits,
                                                           struct CUstream_st* stream);

/// Bytes of device memory that flash_mla_dense_decode needs as workspace, from shapes alone; see dense_decode.h.
/// @param bytes  out
FLASH_MLA_API flash_mla_status flash_mla_dense_decode_workspace_size(const flash_mla_dense_decode_arguments* arguments,
                                                                     size_t* bytes);

/// The same for memory that is laid out before there is a device to ask: bytes that suffice on every GPU.
/// @param bytes  out
FLASH_MLA_API flash_mla_status
flash_mla_dense_decode_max_workspace_size(const flash_mla_dense_decode_arguments* arguments, size_t* bytes);

/// Runs dense decode: on a GPU ordered on `stream`, without waiting; on the CPU done on return. See dense_decode.h.
FLASH_MLA_API flash_mla_status flash_mla_dense_decode(const flash_mla_dense_decode_arguments* arguments,
                                                      void* workspace, size_t workspace_bytes,
                                                      struct CUstream_st* stream);

/// Merges results of attention over parts of the keys: on a GPU ordered on `stream`, without waiting nor workspace; on
/// the CPU done on return. See merge_states.h.
FLASH_MLA_API flash_mla_status flash_mla_merge_states(const flash_mla_merge_states_arguments* arguments,
                                                      struct CUstream_st* stream);

#ifdef __cplusplus
}
#endif

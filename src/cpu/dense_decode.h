#pragma once

#include "api/check.h"
#include "flash_mla/dense_decode.h"

namespace flash_mla::cpu {

/// Dense decode on CPU memory, on up to FLASH_MLA_NUM_THREADS threads (default: all cores); done when it returns.
/// `shape` is what check_dense_decode returned for `args`. The plan, if any, is ignored.
/// @throws InvalidArgument where a request's pages lie outside k_cache, before anything is written
void dense_decode(const DenseDecodeArguments& args, const DenseDecodeShape& shape);

}  // namespace flash_mla::cpu

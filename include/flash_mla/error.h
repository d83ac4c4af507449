#pragma once

#include <stdexcept>
#include <string>

#include "flash_mla/export.h"

namespace flash_mla {

/// Base of every exception that this library throws.
class FLASH_MLA_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An argument has a wrong shape, stride, device, alignment or value. The message names the argument, what it got and
/// what it takes. Thrown before anything is launched. Python: ValueError.
class FLASH_MLA_API InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// An argument has a wrong data type. Python: TypeError.
class FLASH_MLA_API InvalidType : public InvalidArgument {
 public:
  using InvalidArgument::InvalidArgument;
};

/// The arguments are well formed, but this build or this machine cannot serve them (no Hopper GPU, for one).
/// Python: RuntimeError.
class FLASH_MLA_API Unsupported : public Error {
 public:
  using Error::Error;
};

/// A call of the CUDA runtime or driver failed. Python: RuntimeError.
class FLASH_MLA_API CudaError : public Error {
 public:
  CudaError(int code, const std::string& what) : Error(what), code_(code) {}
  /// The cudaError_t (or CUresult) as an integer.
  int code() const noexcept { return code_; }

 private:
  int code_;
};

}  // namespace flash_mla

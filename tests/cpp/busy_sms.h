#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

namespace flash_mla {

/// Keeps some SMs from other kernels, from its construction to its destruction: a kernel with as many CTAs, none of
/// which leaves shared memory to another.
class BusySms {
 public:
  explicit BusySms(int count);
  ~BusySms();
  BusySms(const BusySms&) = delete;
  BusySms& operator=(const BusySms&) = delete;

 private:
  volatile int* words_ = nullptr;  // that the GPU sees too: whether CTAs may end, and for each whether it has begun
  cudaStream_t stream_ = nullptr;
};

}  // namespace flash_mla

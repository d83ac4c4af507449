#pragma once

// PTX ISA, "ex2", "lg2": base-2 exponential and logarithm of the special function units.

namespace flash_mla::ptx {

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace flash_mla::ptx

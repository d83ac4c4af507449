#pragma once

#include <cstdint>

// Addresses of shared memory, and loads and stores through them: PTX ISA, "State spaces", "ld", "st".

namespace flash_mla::ptx {

/// The address that PTX instructions take.
__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void store_shared_v4(std::uint32_t address, std::uint32_t a, std::uint32_t b,
                                                std::uint32_t c, std::uint32_t d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ void store_shared_v4(std::uint32_t address, const float (&v)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
}

/// Orders this thread's ordinary accesses of shared memory before what the async proxy (wgmma, bulk copies) does with
/// it after a later barrier. PTX ISA, "membar / fence", proxy fences.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// The same for what other threads have written to global memory, and this one has been told of.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

/// Hides where `value` comes from: the compiler computes nothing from it ahead of this point, and cannot make it anew
/// behind it.
__device__ __forceinline__ void launder(std::uint32_t& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void launder(int& value) { asm volatile("" : "+r"(value)); }

}  // namespace flash_mla::ptx

#pragma once

#include <cstdint>

// Global memory between CTAs: PTX ISA, "ld", "st", "atom" with .relaxed, .acquire and .release. Relaxed is what tells
// of nothing but itself.

namespace flash_mla::ptx {

/// What this thread, and those of its CTA that it has synchronised with, wrote before is seen by whoever reads the
/// value with load_acquire.
__device__ __forceinline__ void store_release(std::uint64_t* address, std::uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ __forceinline__ std::uint64_t load_acquire(const std::uint64_t* address) {
  std::uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_relaxed(std::uint64_t* address, std::uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ __forceinline__ int load_relaxed(const int* address) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ std::uint64_t load_relaxed(const std::uint64_t* address) {
  std::uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

/// Returns the value before, which is another than `expected` if it was not replaced.
__device__ __forceinline__ std::uint64_t atomic_replace(std::uint64_t* address, std::uint64_t expected,
                                                        std::uint64_t value) {
  std::uint64_t before;
  asm volatile("atom.cas.relaxed.gpu.global.b64 %0, [%1], %2, %3;"
               : "=l"(before)
               : "l"(address), "l"(expected), "l"(value)
               : "memory");
  return before;
}

/// Returns the value before. Acquires, and does not release: a release waits for all that the SM has written.
__device__ __forceinline__ std::uint64_t atomic_add(std::uint64_t* address, std::uint64_t value) {
  std::uint64_t before;
  asm volatile("atom.add.acquire.gpu.global.u64 %0, [%1], %2;" : "=l"(before) : "l"(address), "l"(value) : "memory");
  return before;
}

/// 16 bytes as one: whoever loads them so sees all of a store or nothing.
__device__ __forceinline__ void store_relaxed(ulonglong2* address, ulonglong2 value) {
  asm volatile("{\n.reg .b128 v;\nmov.b128 v, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], v;\n}" ::"l"(address),
               "l"(value.x), "l"(value.y)
               : "memory");
}
__device__ __forceinline__ ulonglong2 load_relaxed(const ulonglong2* address) {
  ulonglong2 value;
  asm volatile("{\n.reg .b128 v;\nld.relaxed.gpu.global.b128 v, [%2];\nmov.b128 {%0, %1}, v;\n}"
               : "=l"(value.x), "=l"(value.y)
               : "l"(address)
               : "memory");
  return value;
}

/// PTX ISA, "prefetch".
__device__ __forceinline__ void prefetch_l1(const void* address) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(address) : "memory");
}

}  // namespace flash_mla::ptx

#pragma once

#include <cstdint>
#include <cstring>

// 16-bit floating point in memory, and its conversions from and to float: rounding to nearest, ties to even; NaN stays
// NaN. Written without branches, so that compilers vectorise them.

namespace flash_mla::cpu {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float to_float(BFloat16 value) { return float_of(std::uint32_t{value.bits} << 16); }

inline float to_float(Float16 value) {
  const std::uint32_t magnitude = value.bits & 0x7fffU;
  // Exponents differ by their biases, 127 and 15; the product also normalises what is subnormal as float16.
  const float finite = float_of(magnitude << 13) * 0x1p112F;
  const std::uint32_t all_ones = magnitude >= 0x7c00U ? 0x7f800000U : 0U;  // the exponent of infinity and NaN
  const std::uint32_t sign = (value.bits & 0x8000U) << 16;
  return float_of(bits_of(finite) | all_ones | sign);
}

inline void from_float(float value, BFloat16& result) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const std::uint32_t quiet_nan = (bits >> 16) | 0x40U;
  const bool is_nan = (bits & 0x7fffffffU) > 0x7f800000U;
  result.bits = static_cast<std::uint16_t>(is_nan ? quiet_nan : rounded);
}

inline void from_float(float value, Float16& result) {
  constexpr std::uint32_t kInfinity = 0x7f800000U;
  constexpr std::uint32_t kOverflow = 0x477ff000U;   // 65520: from here on, the nearest is infinity
  constexpr std::uint32_t kMinNormal = 0x38800000U;  // 2^-14
  const std::uint32_t magnitude = bits_of(value) & 0x7fffffffU;
  const std::uint32_t normal = (magnitude + 0xfffU + ((magnitude >> 13) & 1U) - (112U << 23)) >> 13;
  // In [0.5, 1) a float's unit is 2^-24, as a subnormal float16's: the sum rounds, and its low bits are the result.
  const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5F) - bits_of(0.5F);
  std::uint32_t bits = magnitude < kMinNormal ? subnormal : normal;
  bits = magnitude >= kOverflow ? 0x7c00U : bits;
  bits = magnitude > kInfinity ? 0x7e00U : bits;
  result.bits = static_cast<std::uint16_t>(bits | ((bits_of(value) >> 16) & 0x8000U));
}

}  // namespace flash_mla::cpu

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/half.h"

// Conversions between float and the 16-bit types, over every 16-bit pattern, against arithmetic by std::ldexp.

namespace flash_mla::cpu {
namespace {

struct Layout {
  int mantissa_bits;
  int bias;
};

constexpr Layout layout_of(BFloat16) { return {7, 127}; }
constexpr Layout layout_of(Float16) { return {10, 15}; }

double decode(int magnitude, Layout layout) {
  const int exponent = magnitude >> layout.mantissa_bits;
  const int mantissa = magnitude & ((1 << layout.mantissa_bits) - 1);
  const int implicit = exponent > 0 ? 1 << layout.mantissa_bits : 0;
  return std::ldexp(mantissa + implicit, (exponent > 0 ? exponent : 1) - layout.bias - layout.mantissa_bits);
}

template <class Element>
std::uint16_t encode(float value) {
  Element result;
  from_float(value, result);
  return result.bits;
}

template <class Element>
class HalfTest : public ::testing::Test {
 protected:
  static constexpr Layout kLayout = layout_of(Element{});
  static constexpr int kInfinityBits = 0x7fff >> kLayout.mantissa_bits << kLayout.mantissa_bits;
  static Element element(int bits) { return Element{static_cast<std::uint16_t>(bits)}; }
};
using Elements = ::testing::Types<BFloat16, Float16>;
TYPED_TEST_SUITE(HalfTest, Elements, );

TYPED_TEST(HalfTest, EveryFiniteValueSurvives) {
  for (int bits = 0; bits < this->kInfinityBits; ++bits) {
    const float value = to_float(this->element(bits));
    ASSERT_EQ(value, decode(bits, this->kLayout)) << bits;
    ASSERT_EQ(to_float(this->element(bits | 0x8000)), -value) << bits;
    ASSERT_EQ(encode<TypeParam>(value), bits);
    ASSERT_EQ(encode<TypeParam>(-value), bits | 0x8000);
  }
}

TYPED_TEST(HalfTest, RoundsToNearestTiesToEven) {
  for (int bits = 0; bits < this->kInfinityBits; ++bits) {
    // Beyond the largest finite value, rounding goes by the value that would follow it.
    const auto middle = static_cast<float>((decode(bits, this->kLayout) + decode(bits + 1, this->kLayout)) / 2);
    const int even = bits % 2 == 0 ? bits : bits + 1;
    ASSERT_EQ(encode<TypeParam>(middle), even) << bits;
    ASSERT_EQ(encode<TypeParam>(std::nextafter(middle, 0.0F)), bits);
    ASSERT_EQ(encode<TypeParam>(std::nextafter(middle, std::numeric_limits<float>::max())), bits + 1);
    ASSERT_EQ(encode<TypeParam>(-middle), even | 0x8000) << bits;
  }
}

TYPED_TEST(HalfTest, InfinityAndNanStay) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(to_float(this->element(this->kInfinityBits)), infinity);
  EXPECT_EQ(to_float(this->element(this->kInfinityBits | 0x8000)), -infinity);
  EXPECT_EQ(encode<TypeParam>(infinity), this->kInfinityBits);
  EXPECT_EQ(encode<TypeParam>(-infinity), this->kInfinityBits | 0x8000);
  EXPECT_EQ(encode<TypeParam>(std::numeric_limits<float>::max()), this->kInfinityBits);
  for (int bits = this->kInfinityBits + 1; bits < 0x8000; ++bits) {
    ASSERT_TRUE(std::isnan(to_float(this->element(bits)))) << bits;
    ASSERT_TRUE(std::isnan(to_float(this->element(bits | 0x8000)))) << bits;
  }
  for (const std::uint32_t nan : {0x7f800001U, 0x7fffffffU, 0xff800001U, 0xffffffffU}) {
    EXPECT_GT(encode<TypeParam>(float_of(nan)) & 0x7fff, this->kInfinityBits) << nan;
  }
}

}  // namespace
}  // namespace flash_mla::cpu

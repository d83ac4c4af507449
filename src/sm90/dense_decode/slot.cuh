#pragma once

#include <cstdint>

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/ptx/memory.cuh"

// What a piece of a split request leaves in the workspace, for a tile: sums that are not normalised. It consists of
// units: the columns that one consumer has of one or two rows, Traits::kRowsOfUnit.
//
//   values  (units, rows of a unit * 256) of float16, or of float32 for tiles of few rows: O, divided by a scale; in an
//           order that lets consumers write 16 bytes a thread and whole lines, Traits::unit_row and unit_column
//   totals  (units, rows of a unit) Total, 16 bytes
//
// Scales of float16 are powers of 2 that bring the largest of a consumer's values of a row to 2^10 at least, where
// float16 ends at 2^16. So a value is rounded to 11 bits, where the result will have 8 (bfloat16) or 11, whatever the
// size of V; bits are lost only of values below 2^-24 of that largest one.

namespace flash_mla::sm90 {

/// What is known of a unit's row before all of its values are written. It announces itself: 56 bits of the launch's
/// token are in it, and its 16 bytes are read and written as one. It has one reader, who clears it, as a replayed graph
/// launches with the same token.
struct Total {
  float max;    // of the row's scores times softmax_scale_log2
  float sum;    // of exp2(score - max), 0 where the row saw no key
  float scale;  // of the values: a power of 2

  __device__ __forceinline__ void announce(ulonglong2* to, std::uint64_t token) const {
    const std::uint64_t exponent = __float_as_uint(scale) >> 23;
    ptx::store_relaxed(to, {static_cast<std::uint64_t>(__float_as_uint(sum)) << 32 | __float_as_uint(max),
                            token ^ exponent << kTokenBits});
  }
  /// Waits for it.
  __device__ __forceinline__ static Total take(ulonglong2* from, std::uint64_t token) {
    ulonglong2 value;
    do {
      value = ptx::load_relaxed(from);
    } while ((value.y ^ token) << (64 - kTokenBits) != 0);
    ptx::store_relaxed(from, {0, 0});
    const auto exponent = static_cast<std::uint32_t>((value.y ^ token) >> kTokenBits);
    return {__uint_as_float(static_cast<std::uint32_t>(value.x)),
            __uint_as_float(static_cast<std::uint32_t>(value.x >> 32)), __uint_as_float(exponent << 23)};
  }

 private:
  static constexpr int kTokenBits = 56;  // of the token
};

/// A tile's memory in a slot of the workspace.
template <class Traits>
struct SlotTile {
  using Value = typename Traits::UnitValue;
  static constexpr int kRowsOfUnit = Traits::kRowsOfUnit;
  static constexpr int kNumUnits = Traits::kRows * Traits::kNumConsumers / kRowsOfUnit;
  static constexpr int kUnitValues = kRowsOfUnit * Traits::kColumnsPerConsumer;
  static constexpr int kUnitBytes = kUnitValues * sizeof(Value);
  static constexpr int kBytes = slot_bytes(Traits::kRows);
  static_assert(kTotalBytes == sizeof(ulonglong2) && kBytes % kSlotAlignment == 0);
  static_assert(kNumUnits * (kUnitBytes + kRowsOfUnit * kTotalBytes) == kBytes, "values and totals");

  unsigned char* begin;

  /// `tile` counts those of all KV heads.
  __device__ SlotTile(const DenseDecodeParams& params, int slot, int tile) {
    const std::int64_t idx = static_cast<std::int64_t>(slot) * params.num_heads_k * params.tiling.num_tiles + tile;
    begin = params.slots + idx * kBytes;
  }

  __device__ static int unit(int row, int consumer) { return row / kRowsOfUnit * Traits::kNumConsumers + consumer; }
  __device__ unsigned char* values(int unit) const { return begin + unit * kUnitBytes; }
  __device__ ulonglong2* totals(int unit) const {
    return reinterpret_cast<ulonglong2*>(values(kNumUnits)) + unit * kRowsOfUnit;
  }
};

/// What values of a row are multiplied with for float16: a power of 2.
struct RowScale {
  float inverse;

  /// `largest`: the largest magnitude of the values, NaN left out. The scale of an infinite one is 1. (Only a sum that
  /// has overflowed is infinite: an infinity in V is one in K, whose score is NaN or infinite.)
  __device__ __forceinline__ explicit RowScale(float largest) {
    constexpr int kMaxField = 250;  // so that both are normal numbers
    const int field = static_cast<int>(__float_as_uint(largest) >> 23);
    const int inverse_field = field == 255 ? kBias : min(kTop + 2 * kBias - field, kMaxField);
    inverse = __uint_as_float(inverse_field << 23);
  }
  /// What brings them back.
  __device__ __forceinline__ float scale() const {
    return __uint_as_float((2 * kBias << 23) - __float_as_uint(inverse));
  }
  /// Whether values of this magnitude fit.
  __device__ __forceinline__ bool fits(float value) const { return value * inverse < (2 << kTop); }

 private:
  static constexpr int kBias = 127;
  static constexpr int kTop = 14;  // scaled values are below 2^15
};

}  // namespace flash_mla::sm90

#pragma once

#include "scheduler/split_plan.h"
#include "sm90/dense_decode/slot.cuh"

namespace flash_mla::sm90 {

/// Units of a tile, which a CTA merges.
struct Slice {
  int first;
  int count;

  /// Begins at unit num_units * slice / num_slices, rounded down. By a reciprocal, which takes fewer instructions, and
  /// is exact: half a unit more of the dividend keeps the quotient away from whole numbers by more than rounding errs.
  __device__ __forceinline__ static Slice of_tile(int num_units, int slice, int num_slices) {
    const float inverse = __frcp_rn(static_cast<float>(num_slices));
    const auto begin_of = [&](int s) { return static_cast<int>((static_cast<float>(num_units * s) + 0.5F) * inverse); };
    const int first = begin_of(slice);
    return {first, begin_of(slice + 1) - first};
  }
};

/// What merging a slice keeps in shared memory.
template <class Traits>
struct SliceMemory {
  using Element = typename Traits::Element;
  using Slot = SlotTile<Traits>;

  /// Where a row of a unit goes, null where it is padding or another unit has it, and what is known of the row.
  struct alignas(16) Result {
    Element* out;
    float* lse;
    float max;
    float sum;
    float inverse_sum;
  };

  /// Weights of a row's pieces, in fours.
  static constexpr int kWeightVector = sizeof(float4) / sizeof(float);
  __host__ __device__ static constexpr int weights_of_row(int num_pieces) {
    return (num_pieces + kWeightVector - 1) / kWeightVector * kWeightVector;
  }

  unsigned char* const values;  // (pieces, units of the slice, their values)
  float4* totals;               // (rows of the slice's units, pieces)
  Result* results;              // (rows,)
  float* weights;               // (rows, weights_of_row(pieces))

  /// `shared`: kMinBytes, aligned to 16 bytes.
  __device__ explicit SliceMemory(unsigned char* shared) : values(shared) {}

  /// For two pieces, all units a slice.
  __device__ __forceinline__ static SliceMemory of_two_pieces(unsigned char* shared) {
    SliceMemory memory(shared);
    memory.lay_out(2, Slot::kNumUnits);
    return memory;
  }

  __device__ __forceinline__ void lay_out(int num_pieces, int num_units) {
    const int num_rows = num_units * Slot::kRowsOfUnit;
    totals = reinterpret_cast<float4*>(values + num_pieces * num_units * Slot::kUnitBytes);
    results = reinterpret_cast<Result*>(totals + num_pieces * num_rows);
    weights = reinterpret_cast<float*>(results + num_rows);
  }

  /// Of a slice. Of two pieces one CTA may merge all: SplitRequest::first_merges_all.
  static constexpr int max_units(int num_pieces) {
    return num_pieces == 2 ? Slot::kNumUnits : (Slot::kNumUnits + num_pieces - 1) / num_pieces;
  }

 private:
  static constexpr int bytes(int num_pieces) {
    const int units = max_units(num_pieces);
    const int rows = units * Slot::kRowsOfUnit;
    return num_pieces * (units * Slot::kUnitBytes + rows * static_cast<int>(sizeof(float4))) +
           rows * static_cast<int>(sizeof(Result) + weights_of_row(num_pieces) * sizeof(float));
  }
  static constexpr int max_bytes() {
    int most = 0;
    for (int pieces = 2; pieces <= scheduler::kMaxParts; ++pieces) {
      if (bytes(pieces) > most) most = bytes(pieces);
    }
    return most;
  }

 public:
  /// Enough for any number of pieces.
  static constexpr int kMinBytes = max_bytes();
};

}  // namespace flash_mla::sm90

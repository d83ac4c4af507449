#pragma once

#include <cstdint>

#include "sm90/dense_decode/slice_memory.cuh"
#include "sm90/primitives/fragment.cuh"

namespace flash_mla::sm90 {

/// Adds the pieces of a slice, whose values and weights are in shared memory, and writes results. Each thread adds all
/// pieces of some values of a unit: as few as let most warps take part. Where there are many pieces of a single unit,
/// that takes as long as reading them from shared memory: then each warp adds a share of the pieces, when that is
/// there, and what the warps have is added in the end.
template <class Traits>
class SliceSums {
  using Element = typename Traits::Element;
  using Slot = SlotTile<Traits>;
  using Value = typename Slot::Value;
  using Memory = SliceMemory<Traits>;
  using Result = typename Memory::Result;
  static constexpr int kWarps = Traits::kConsumerWarps;
  static constexpr int kWeightVector = Memory::kWeightVector;

  // Of a share, a lane has kVectors vectors of a unit's values. Their sums lie where the share's values were, in fours:
  // the first fours of all lanes' first vectors, then the next ones. Of these, a thread has two in the end.
  static constexpr int kVector = sizeof(uint4) / sizeof(Value);
  static constexpr int kVectors = Slot::kUnitValues / (32 * kVector);
  static constexpr int kFours = kVector / 4;
  static_assert(Slot::kUnitValues / 2 <= 32 * kWarps);
  static_assert(Traits::unit_row(32 * kVector) == 0, "all vectors of a lane are of one row");

  // Of two pieces, a thread adds kValuesOfTwo values of each of kUnitsOfTwo units at once, kStepOfTwo units apart.
  static constexpr int kValuesOfTwo = 8;
  static constexpr int kUnitsOfTwo = 4;
  static constexpr int kWarpsOfTwo = Slot::kUnitValues / (32 * kValuesOfTwo);  // of a unit
  static constexpr int kStepOfTwo = kWarps / kWarpsOfTwo;

 public:
  /// Pieces from which on they are added in shares. The sums of a share, of float, then fit where its values were.
  static constexpr int kMinPiecesInShares = 2 * kWarps;
  static_assert(kMinPiecesInShares / kWarps * Slot::kUnitBytes >= Slot::kUnitValues * static_cast<int>(sizeof(float)));
  /// Whether add_two can do half a tile's units.
  static constexpr bool kAddsTwo = Slot::kNumUnits / 2 % (kUnitsOfTwo * kStepOfTwo) == 0;
  /// Threads that add_sums takes.
  static constexpr int kSumThreads = Slot::kUnitValues / 2;

  __device__ explicit SliceSums(const Memory& memory) : memory_(memory) {}

  /// The first piece of a share.
  __device__ static int begin_of_share(int share, int num_pieces) {
    return static_cast<int>(static_cast<unsigned>(num_pieces * share) / kWarps);
  }

  /// All pieces of kValues values of a unit by one thread.
  template <int kValues>
  __device__ __forceinline__ void add(int num_units, int n) const {
    constexpr int kWarpsOfUnit = Slot::kUnitValues / (32 * kValues);
    const int step = num_units * Slot::kUnitBytes;
#pragma unroll 1
    for (int i = warp(); i < num_units * kWarpsOfUnit; i += kWarps) {
      const int unit = i / kWarpsOfUnit;
      const int first = (i % kWarpsOfUnit * 32 + lane()) * kValues;
      const int row = unit * Slot::kRowsOfUnit + Traits::unit_row(first);
      const float* const weights = memory_.weights + row * Memory::weights_of_row(n);
      const unsigned char* from = memory_.values + unit * Slot::kUnitBytes + first * sizeof(Value);
      float value[kValues] = {};
      int piece = 0;
#pragma unroll(kValues < kWeightVector ? kWeightVector / kValues : 1)
      for (; piece + kWeightVector <= n; piece += kWeightVector, from += kWeightVector * step) {
        const float4 four = *reinterpret_cast<const float4*>(weights + piece);
        const float weight[kWeightVector] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int k = 0; k < kWeightVector; ++k) accumulate(value, weight[k], from + k * step);
      }
#pragma unroll 1
      for (; piece < n; ++piece, from += step) accumulate(value, weights[piece], from);
      const Result& result = memory_.results[row];
      if (result.out != nullptr) write(result.out + Traits::unit_column(first), value, result.inverse_sum);
    }
  }

  /// The same for two pieces, in half a tile or a whole one. One unit after the other, a thread would mostly wait.
  __device__ __forceinline__ void add_two(int num_units) const {
    const int first = (warp() % kWarpsOfTwo * 32 + lane()) * kValuesOfTwo;
    const unsigned char* const values = memory_.values + first * sizeof(Value);
#pragma unroll 1
    for (int begin = warp() / kWarpsOfTwo; begin < num_units; begin += kUnitsOfTwo * kStepOfTwo) {
      float value[kUnitsOfTwo][kValuesOfTwo] = {};
#pragma unroll
      for (int k = 0; k < kUnitsOfTwo; ++k) {
        const int unit = begin + k * kStepOfTwo;
        const int row = unit * Slot::kRowsOfUnit + Traits::unit_row(first);
        const unsigned char* const from = values + unit * Slot::kUnitBytes;
        const float2 weight = *reinterpret_cast<const float2*>(memory_.weights + row * Memory::weights_of_row(2));
        accumulate(value[k], weight.x, from);
        accumulate(value[k], weight.y, from + num_units * Slot::kUnitBytes);
      }
#pragma unroll
      for (int k = 0; k < kUnitsOfTwo; ++k) {
        const int row = (begin + k * kStepOfTwo) * Slot::kRowsOfUnit + Traits::unit_row(first);
        const Result& result = memory_.results[row];
        if (result.out != nullptr) write(result.out + Traits::unit_column(first), value[k], result.inverse_sum);
      }
    }
  }

  /// Adds the pieces of a share. By a warp.
  __device__ __forceinline__ void add_share(int share, int n) const {
    const int begin = begin_of_share(share, n);
    const int num_pieces = begin_of_share(share + 1, n) - begin;
    const float* const weights =
        memory_.weights + Traits::unit_row(lane() * kVector) * Memory::weights_of_row(n) + begin;
    auto* const vectors = reinterpret_cast<uint4*>(values_of_share(share, n)) + lane();
    float sum[kVectors][kVector] = {};
#pragma unroll 4
    for (int piece = 0; piece < num_pieces; ++piece) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        accumulate(sum[v], weights[piece], reinterpret_cast<unsigned char*>(vectors + (piece * kVectors + v) * 32));
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kVectors * kFours; ++i) {
      const float* const four = &sum[i / kFours][i % kFours * 4];
      reinterpret_cast<float4*>(vectors)[i * 32] = make_float4(four[0], four[1], four[2], four[3]);
    }
  }

  /// The thread's two values of the unit: where they go, and what their sums are multiplied with.
  struct Output {
    Element* out;
    float inverse_sum;

    __device__ __forceinline__ explicit Output(const Result* results) {
      const int four = threadIdx.x / 64;
      const int of_lane = threadIdx.x / 2 % 32;
      const int first = (four / kFours * 32 + of_lane) * kVector + four % kFours * 4 + threadIdx.x % 2 * 2;
      const Result& result = results[Traits::unit_row(first)];
      out = result.out != nullptr ? result.out + Traits::unit_column(first) : nullptr;
      inverse_sum = result.inverse_sum;
    }
  };

  /// Adds the sums of all shares, and writes the unit. By the first kSumThreads threads.
  __device__ __forceinline__ void add_sums(int n, const Output& output) const {
    float value[2] = {};
#pragma unroll
    for (int share = 0; share < kWarps; ++share) {
      const float2 two = reinterpret_cast<const float2*>(values_of_share(share, n))[threadIdx.x];
      value[0] += two.x;
      value[1] += two.y;
    }
    if (output.out != nullptr) write(output.out, value, output.inverse_sum);
  }

 private:
  __device__ unsigned char* values_of_share(int share, int n) const {
    return memory_.values + begin_of_share(share, n) * Slot::kUnitBytes;
  }

  template <int kValues>
  __device__ __forceinline__ static void accumulate(float (&value)[kValues], float weight, const unsigned char* from) {
    float of_piece[kValues];
    read(from, of_piece);
#pragma unroll
    for (int j = 0; j < kValues; ++j) value[j] = fmaf(weight, of_piece[j], value[j]);
  }

  template <int kValues>
  __device__ __forceinline__ static void read(const unsigned char* from, float (&value)[kValues]) {
    struct alignas(kValues * sizeof(Value) < sizeof(uint4) ? kValues * sizeof(Value) : sizeof(uint4)) Vector {
      Value value[kValues];
    };
    const Vector vector = *reinterpret_cast<const Vector*>(from);
#pragma unroll
    for (int i = 0; i < kValues; ++i) value[i] = static_cast<float>(vector.value[i]);
  }

  template <int kValues>
  __device__ __forceinline__ static void write(Element* out, const float (&value)[kValues], float inverse_sum) {
#pragma unroll
    for (int i = 0; i < kValues; i += 2) {
      const float two[2] = {value[i] * inverse_sum, value[i + 1] * inverse_sum};
      Element* const to = out + Traits::unit_column(i);
      if constexpr (Traits::unit_column(1) == 1) {
        *reinterpret_cast<std::uint32_t*>(to) = pack<Element>(two[0], two[1]);
      } else {
        to[0] = convert<Element>(two[0]);
        to[Traits::unit_column(1)] = convert<Element>(two[1]);
      }
    }
  }

  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int lane() { return threadIdx.x % 32; }

  const Memory& memory_;
};

}  // namespace flash_mla::sm90

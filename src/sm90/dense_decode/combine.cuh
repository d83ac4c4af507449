#pragma once

#include <cstdint>

#include "sm90/dense_decode/epilogue.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/part_plan.cuh"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/slot.cuh"
#include "sm90/dense_decode/split_group.cuh"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/primitives/arrive.cuh"
#include "sm90/primitives/fragment.cuh"
#include "sm90/primitives/softmax.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/bulk.cuh"
#include "sm90/ptx/math.cuh"
#include "sm90/ptx/memory.cuh"
#include "sm90/ptx/shared.cuh"

// Merging the pieces of a split request, within the decode kernel. Parts merge a slice of the tile each: see
// SplitRequest. Who may wait for whom: see split_group.cuh.

namespace flash_mla::sm90 {

/// Merges one slice of a split request's tile. By all consumer threads. Half of their warps take the totals of the
/// slice's rows, as these announce themselves, and find weights, before the values are there. The other half's lanes
/// bring values into shared memory by bulk copies, which they issue as they see the pieces' flags. Each thread then
/// adds all pieces of some values of a unit: as few as let most warps take part. Where there are many pieces of a
/// single unit, adding takes as long as reading them from shared memory: then each warp adds a share of the pieces,
/// when that is there, and what the warps have is added in the end.
///
/// All of this runs once, so what counts is how many instructions follow on one another.
template <class Traits>
class Combine {
  using Element = typename Traits::Element;
  using Slot = SlotTile<Traits>;
  using Value = typename Slot::Value;
  static constexpr int kWarps = Traits::kConsumerWarps;
  static constexpr int kLastWarp = kWarps - 1;
  static constexpr int kWeighingWarps = kWarps / 2;
  static constexpr int kLoadingWarps = kWarps - kWeighingWarps;
  static_assert(kWeighingWarps == kLoadingWarps && kWarps == MergeBarriers::kNumShares, "what MergeBarriers counts");

  /// Pieces from which on they are added in shares. The sums of a share, of float, then fit where its values were.
  static constexpr int kMinPiecesInShares = 2 * kWarps;
  static_assert(kMinPiecesInShares / kWarps * Slot::kUnitBytes >= Slot::kUnitValues * static_cast<int>(sizeof(float)));

  /// Units of a tile.
  struct Slice {
    int first;
    int count;

    __device__ __forceinline__ Slice(int slice, int num_slices)
        : first(Slot::kNumUnits * slice / num_slices), count(Slot::kNumUnits * (slice + 1) / num_slices - first) {}
  };

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

  static constexpr int shared_bytes(int num_pieces) {
    const int units = (Slot::kNumUnits + num_pieces - 1) / num_pieces;
    const int rows = units * Slot::kRowsOfUnit;
    return num_pieces * (units * Slot::kUnitBytes + rows * static_cast<int>(sizeof(float4))) +
           rows * static_cast<int>(sizeof(Result) + weights_of_row(num_pieces) * sizeof(float));
  }
  static constexpr int max_shared_bytes() {
    int most = 0;
    for (int pieces = 2; pieces <= scheduler::kMaxParts; ++pieces) {
      if (shared_bytes(pieces) > most) most = shared_bytes(pieces);
    }
    return most;
  }

 public:
  /// Shared memory that is enough for any number of pieces.
  static constexpr int kMinSharedBytes = max_shared_bytes();

  /// `rows`: of the tile, outside of `shared`: shared memory that nothing else uses any more once all consumers are
  /// here, aligned to 16 bytes. `barriers`: not used before; clear_flags waits for `seen`.
  __device__ Combine(const DenseDecodeParams& params, const QueryTile& tile, int head_k, const RowCoordinate* rows,
                     unsigned char* shared, MergeBarriers& barriers)
      : params_(params),
        rows_(rows),
        tile_(tile),
        head_k_(head_k),
        values_(shared),
        met_(ptx::shared_address(&barriers.met)),
        gathered_(ptx::shared_address(&barriers.gathered)),
        loaded_(ptx::shared_address(&barriers.loaded)),
        rows_known_(ptx::shared_address(&barriers.rows_known)),
        share_loaded_(ptx::shared_address(&barriers.share_loaded)) {}

  /// `is_last`: of the slices of this request that the CTA merges, after which it looks at no flag any more.
  __device__ __forceinline__ void run(const SplitRequest& split, int slice_idx, bool is_last, std::uint64_t& seen) {
    const Slice slice(slice_idx, split.num_slices);
    const int n = split.num_pieces;
    const int num_rows = slice.count * Slot::kRowsOfUnit;
    totals_ = reinterpret_cast<float4*>(values_ + n * slice.count * Slot::kUnitBytes);
    results_ = reinterpret_cast<Result*>(totals_ + n * num_rows);
    weights_ = reinterpret_cast<float*>(results_ + num_rows);

    ptx::fence_proxy_async();
    sync();  // shared memory is free
    if (slice.count == 1 && n >= kMinPiecesInShares) {
      merge_shares(split, slice, is_last, seen);
    } else {
      merge(split, slice, num_rows, is_last, seen);
    }
  }

 private:
  __device__ TileFlags flags() const { return {params_, tile_.index(params_.tiling, head_k_)}; }

  /// All pieces of a value by one thread.
  __device__ __forceinline__ void merge(const SplitRequest& split, const Slice& slice, int num_rows, bool is_last,
                                        std::uint64_t& seen) {
    const int n = split.num_pieces;
    if (warp() < kWeighingWarps) {
      gather(split, slice, num_rows);
      weigh(num_rows, n);
    } else {
      if (lane() == 0 && warp() == kWeighingWarps) {
        ptx::mbarrier_arrive_expect(loaded_, n * slice.count * Slot::kUnitBytes);
      }
      place_rows(split.request, slice, num_rows);
      const int of_warp = (n + kLoadingWarps - 1) / kLoadingWarps;
      const int begin = (warp() - kWeighingWarps) * of_warp;
      const int end = min(begin + of_warp, n);
      load(split, slice, begin, end, end, loaded_, loaded_);
      if (is_last) arrive_of_warp(seen);
    }
    sync();
    if (warp() == kLastWarp) write_lse(num_rows);
    ptx::mbarrier_wait(loaded_, loaded_phase_);
    loaded_phase_ ^= 1;
    if (num_rows > 4) {
      add<8>(slice, n);
    } else if (num_rows > 2) {
      add<4>(slice, n);
    } else {
      add<2>(slice, n);
    }
  }

  /// The first piece of a share.
  __device__ static int begin_of_share(int share, int num_pieces) {
    return static_cast<int>(static_cast<unsigned>(num_pieces * share) / kWarps);
  }
  __device__ std::uint32_t share_loaded(int share) const {
    return share_loaded_ + share * static_cast<int>(sizeof(std::uint64_t));
  }

  /// Pieces of a slice of one unit, a share by each warp. A loading warp brings two shares: one that it adds itself,
  /// and the one before, which a weighing warp adds.
  __device__ __forceinline__ void merge_shares(const SplitRequest& split, const Slice& slice, bool is_last,
                                               std::uint64_t& seen) {
    int n = split.num_pieces;
    ptx::launder(n);  // what is computed from it, is here, and takes no registers before
    const int share = warp() % kLoadingWarps * 2 + warp() / kWeighingWarps;
    if (warp() < kWeighingWarps) {
      gather(split, slice, Slot::kRowsOfUnit);
      weigh(Slot::kRowsOfUnit, n);
      ptx::mbarrier_arrive(rows_known_);
    } else {
      if (warp() == kWeighingWarps && lane() < MergeBarriers::kNumShares) {
        const int pieces = begin_of_share(lane() + 1, n) - begin_of_share(lane(), n);
        ptx::mbarrier_arrive_expect(share_loaded(lane()), pieces * Slot::kUnitBytes);
      }
      place_rows(split.request, slice, Slot::kRowsOfUnit);
      ptx::mbarrier_arrive(rows_known_);
      load(split, slice, begin_of_share(share - 1, n), begin_of_share(share, n), begin_of_share(share + 1, n),
           share_loaded(share - 1), share_loaded(share));
      if (is_last) arrive_of_warp(seen);
    }
    ptx::mbarrier_wait(rows_known_, shares_phase_);
    __syncwarp();
    if (warp() == kLastWarp) write_lse(Slot::kRowsOfUnit);
    const Output output(results_);
    ptx::mbarrier_wait(share_loaded(share), shares_phase_);
    shares_phase_ ^= 1;
    add_share(share, n);
    sync();
    if (threadIdx.x < kSumThreads) add_sums(n, output);
  }

  /// Finds where the slice's rows go. By the threads that load.
  __device__ __forceinline__ void place_rows(int request, const Slice& slice, int num_rows) const {
    for (int row = threadIdx.x - 32 * kWeighingWarps; row < num_rows; row += 32 * kLoadingWarps) {
      place(request, slice, row);
    }
  }

  /// Where row `row` of the slice goes.
  __device__ __forceinline__ void place(int request, const Slice& slice, int row) const {
    const int unit = slice.first + row / Slot::kRowsOfUnit;
    const int consumer = unit % Traits::kNumConsumers;
    const int row_of_tile = unit / Traits::kNumConsumers * Slot::kRowsOfUnit + row % Slot::kRowsOfUnit;
    const RowCoordinate& at = rows_[row_of_tile];
    const FinalOutput<Element> output{params_, request};
    results_[row].out = at.is_valid() ? output.row(at) + consumer * Traits::kColumnsPerConsumer : nullptr;
    results_[row].lse = at.is_valid() && consumer == 0 ? output.lse(at) : nullptr;
  }

  /// Waits for some of the pieces, a lane for each, and brings what they have of the slice. A warp's pieces follow one
  /// another, so that it asks for one line for eight flags and not for one each: all CTAs of a tile ask for the same.
  /// Copies report to `loaded`, from piece `middle` on to `loaded_behind`.
  __device__ __forceinline__ void load(const SplitRequest& split, const Slice& slice, int begin, int middle, int end,
                                       std::uint32_t loaded, std::uint32_t loaded_behind) const {
    const int bytes = slice.count * Slot::kUnitBytes;
#pragma unroll 1
    for (int first = begin; first < end; first += 32) {
      const int piece = first + lane();
      const Slot slot(params_, split.slot(piece), tile_.index(params_.tiling, head_k_));
      const unsigned char* const from = slot.values(slice.first);
      const std::uint32_t to = ptx::shared_address(values_) + piece * bytes;
      const std::uint32_t barrier = piece < middle ? loaded : loaded_behind;
      const std::uint64_t* const flag = flags().written(split.slot(piece));
      // All lanes together: those that wait must not hold back the copies of the others.
      for (bool waits = piece < end; __any_sync(~0U, waits);) {
        if (!waits || ptx::load_acquire(flag) != params_.token) continue;
        waits = false;
        ptx::fence_proxy_async_global();
        if (bytes > 0) ptx::bulk_load(to, from, bytes, barrier);
      }
    }
    __syncwarp();
  }

  /// Brings the totals of the slice's rows, as they come, into shared memory. By the threads that weigh.
  __device__ __forceinline__ void gather(const SplitRequest& split, const Slice& slice, int num_rows) {
    const int n = split.num_pieces;
    const int tile = tile_.index(params_.tiling, head_k_);
#pragma unroll 1
    for (int i = threadIdx.x; i < n * num_rows; i += 32 * kWeighingWarps) {
      const int piece = i / num_rows;
      const int row = i % num_rows;
      const Slot slot(params_, split.slot(piece), tile);
      const Total total = Total::take(slot.totals(slice.first) + row, params_.token);
      totals_[row * n + piece] = make_float4(total.max, total.sum, total.scale, 0.0F);
    }
    ptx::mbarrier_arrive(gathered_);
    ptx::mbarrier_wait(gathered_, gathered_phase_);
    gathered_phase_ ^= 1;
    __syncwarp();
  }

  /// Finds the weights of each row's pieces. Some lanes look after a row, a lane for each piece if there are enough.
  __device__ __forceinline__ void weigh(int num_rows, int n) const {
    const int lanes_log2 = min(32 - __clz(n - 1), 5);
    const int lanes = 1 << lanes_log2;
#pragma unroll 1
    for (int first = warp() * 32 >> lanes_log2; first < num_rows; first += kWeighingWarps * 32 >> lanes_log2) {
      const int row = first + (lane() >> lanes_log2);
      const int begin = row * n + (lane() & (lanes - 1));
      const int end = row < num_rows ? (row + 1) * n : 0;
      float max = kNoScaledMax;
#pragma unroll 1
      for (int i = begin; i < end; i += lanes) max = fmaxf(max, totals_[i].x);
#pragma unroll
      for (int other = 16; other > 0; other /= 2) {
        const float its = __shfl_xor_sync(~0U, max, other);
        if (other < lanes) max = fmaxf(max, its);
      }
      float sum = 0.0F;
#pragma unroll 1
      for (int i = begin; i < end; i += lanes) {
        const float4 of_piece = totals_[i];
        const float weight = ptx::exp2_approx(of_piece.x - max);
        sum = fmaf(weight, of_piece.y, sum);
        weights_[i + row * (weights_of_row(n) - n)] = weight * of_piece.z;
      }
#pragma unroll
      for (int other = 16; other > 0; other /= 2) {
        const float its = __shfl_xor_sync(~0U, sum, other);
        if (other < lanes) sum += its;
      }
      if (begin == row * n && end > 0) {
        results_[row].max = max;
        results_[row].sum = sum;
        results_[row].inverse_sum = inverse_sum(sum);
      }
    }
  }

  __device__ __forceinline__ void write_lse(int num_rows) const {
#pragma unroll 1
    for (int row = lane(); row < num_rows; row += 32) {
      const Result& result = results_[row];
      if (result.lse != nullptr) *result.lse = log_sum_exp(result.max, result.sum);
    }
  }

  /// Adds the pieces of the slice, kValues of a unit a thread.
  template <int kValues>
  __device__ __forceinline__ void add(const Slice& slice, int n) const {
    constexpr int kWarpsOfUnit = Slot::kUnitValues / (32 * kValues);
    const int step = slice.count * Slot::kUnitBytes;
#pragma unroll 1
    for (int i = warp(); i < slice.count * kWarpsOfUnit; i += kWarps) {
      const int unit = i / kWarpsOfUnit;
      const int first = (i % kWarpsOfUnit * 32 + lane()) * kValues;
      const int row = unit * Slot::kRowsOfUnit + Traits::unit_row(first);
      const float* const weights = weights_ + row * weights_of_row(n);
      const unsigned char* from = values_ + unit * Slot::kUnitBytes + first * sizeof(Value);
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
      const Result& result = results_[row];
      if (result.out != nullptr) write(result.out + Traits::unit_column(first), value, result.inverse_sum);
    }
  }

  // Of a share, a lane has kVectors vectors of a unit's values. Their sums lie where the share's values were, in fours:
  // the first fours of all lanes' first vectors, then the next ones. Of these, a thread has two in the end.
  static constexpr int kVector = sizeof(uint4) / sizeof(Value);
  static constexpr int kVectors = Slot::kUnitValues / (32 * kVector);
  static constexpr int kFours = kVector / 4;
  static constexpr int kSumThreads = Slot::kUnitValues / 2;
  static_assert(kSumThreads <= 32 * kWarps);
  static_assert(Traits::unit_row(32 * kVector) == 0, "all vectors of a lane are of one row");

  __device__ unsigned char* values_of_share(int share, int n) const {
    return values_ + begin_of_share(share, n) * Slot::kUnitBytes;
  }

  /// Adds the pieces of a share. By a warp.
  __device__ __forceinline__ void add_share(int share, int n) const {
    const int begin = begin_of_share(share, n);
    const int num_pieces = begin_of_share(share + 1, n) - begin;
    const float* const weights = weights_ + Traits::unit_row(lane() * kVector) * weights_of_row(n) + begin;
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

  /// Waits for all consumer threads. A named barrier would do; racecheck of compute-sanitizer does not follow one.
  __device__ __forceinline__ void sync() {
    ptx::mbarrier_arrive(met_);
    ptx::mbarrier_wait(met_, met_phase_);
    met_phase_ ^= 1;
    __syncwarp();
  }

  const DenseDecodeParams& params_;
  const RowCoordinate* const rows_;  // of the tile
  const QueryTile& tile_;
  const int head_k_;
  unsigned char* const values_;  // (pieces, units of the slice, their values), in shared memory as what follows
  float4* totals_;               // (rows of the slice's units, pieces)
  Result* results_;              // (rows,)
  float* weights_;               // (rows, weights_of_row(pieces))
  const std::uint32_t met_;
  const std::uint32_t gathered_;
  const std::uint32_t loaded_;
  const std::uint32_t rows_known_;
  const std::uint32_t share_loaded_;
  std::uint32_t met_phase_ = 0;
  std::uint32_t gathered_phase_ = 0;
  std::uint32_t loaded_phase_ = 0;
  std::uint32_t shares_phase_ = 0;
};

/// Merges the part's slices of split requests, which a warp has found meanwhile. By all consumer threads, when the
/// part's pieces are done.
template <class Traits, class Storage>
__device__ __forceinline__ void merge_splits(const DenseDecodeParams& params, Storage& shared, const QueryTile& tile,
                                             int head_k) {
  Combine<Traits> combine(params, tile, head_k, shared.rows, reinterpret_cast<unsigned char*>(&shared),
                          shared.merge_barriers);
  ptx::mbarrier_wait(ptx::shared_address(&shared.plan.splits_ready), 0);
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const SplitRequest split = shared.plan.splits[i];
    if (split.num_pieces == 0) continue;
    ptx::mbarrier_wait(ptx::shared_address(&shared.plan.slices_known[i]), 0);
    const SliceRange slices = shared.plan.slices[i];
#pragma unroll 1
    for (int slice = slices.begin; slice < slices.end; ++slice) {
      combine.run(split, slice, slice == slices.end - 1, shared.merge_barriers.seen[i]);
    }
  }
}

}  // namespace flash_mla::sm90

#pragma once

#include <cmath>
#include <cstdint>

#include "sm90/dense_decode/epilogue.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/part_plan.cuh"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/primitives/fragment.cuh"
#include "sm90/primitives/softmax.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/bulk.cuh"
#include "sm90/ptx/math.cuh"
#include "sm90/ptx/memory.cuh"
#include "sm90/ptx/shared.cuh"

// Merging the pieces of a split request, within the decode kernel. Parts merge a slice of the tile each: see
// SplitRequest. Who may wait for whom: see launch.cuh.

namespace flash_mla::sm90 {

/// The flags of one tile of one KV head. A flag holds the launch's token once its piece is in the workspace. Tokens are
/// unique among launches, but a replayed graph launches with the same one again: so the last reader of a request's
/// flags clears them.
struct TileFlags {
  std::uint64_t* flags;    // (2 * num_parts,): one for each slot
  std::uint64_t* readers;  // (num_parts,): CTAs that have all pieces of the request that the part begins

  __device__ TileFlags(const DenseDecodeParams& params, int tile) {
    flags = params.flags + static_cast<std::int64_t>(tile) * kFlagsPerPart * params.num_parts;
    readers = flags + 2 * params.num_parts;
  }
  /// By one thread, after all threads of the piece have written and synchronised, and with the splits found. Only where
  /// somebody reads the flag, and so clears it: one that stays up would tell a replayed graph that the piece is there.
  __device__ void publish(const DenseDecodeParams& params, const PartPlan& plan, int slot) const {
    const SplitRequest& split = plan.splits[slot % 2];
    if (split.num_pieces == 0 || !split.has_piece(slot / 2)) return;
    if (slot % 2 == 1) readers[slot / 2] = 0;  // a slot of a first piece
    ptx::store_release(&flags[slot], params.token);
  }
};

/// Tells the others which pieces of split requests are in the workspace. By one thread, while the consumers go on.
template <class Traits>
__device__ inline void publish_pieces(const DenseDecodeParams& params, const TileFlags& flags, PartPlan& plan,
                                      int part_idx) {
  PieceWalk walk(params, plan.part, part_idx);
  Piece piece;
  while (walk.next(piece)) {
    if (piece.is_whole) continue;
    ptx::mbarrier_wait(ptx::shared_address(&plan.piece_written[piece.slot % 2]), 0);
    flags.publish(params, plan, piece.slot);
  }
}

/// A weighted sum of pieces in a quad: two rows by two columns. Maxima in base 2.
struct QuadSum {
  float max[2] = {kNoMax, kNoMax};
  float total[2] = {0.0F, 0.0F};
  float value[4] = {0.0F, 0.0F, 0.0F, 0.0F};
};

/// Merges one slice of a split request's tile. By all consumer threads. The slice of all pieces comes into shared
/// memory by bulk copies, which lanes issue as they see the pieces' flags. A unit is a quad of each lane of a
/// warp; each unit has a warp, or several that share its pieces where the slice has few units.
///
/// All of this runs once, so what counts is how many instructions follow on one another.
template <class Traits>
class Combine {
  using Element = typename Traits::Element;
  static constexpr int kWarps = Traits::kConsumerWarps;
  static constexpr int kVectorBytes = sizeof(float4);
  static constexpr int kUnitBytes = 32 * kVectorBytes;
  static constexpr int kPairsBytes = Traits::kRows / 2 * kVectorBytes;

 public:
  /// Shared memory that is enough: for all pieces where a warp has several units, for one where it has one.
  static constexpr int kMinSharedBytes = (Traits::kNumUnits + 4 * kWarps) * kUnitBytes + 4 * kWarps * kPairsBytes;

  /// `shared`: `num_bytes` of shared memory that nothing else uses any more once all consumers are here, aligned to 16
  /// bytes. `barriers`: what nothing else uses.
  __device__ Combine(const DenseDecodeParams& params, const QueryTile& tile, int head_k, std::uint32_t shared,
                     int num_bytes, MergeBarriers& barriers)
      : params_(params),
        tile_(tile),
        head_k_(head_k),
        shared_(shared),
        num_bytes_(num_bytes),
        met_(ptx::shared_address(&barriers.met)),
        loaded_(ptx::shared_address(&barriers.loaded)) {}

  __device__ __forceinline__ void run(const SplitRequest& split, int slice) {
    const int n = split.num_pieces;
    const int first = Traits::kNumUnits * slice / split.num_slices;
    const int count = Traits::kNumUnits * (slice + 1) / split.num_slices - first;
    int sharers = 1;
    while (sharers < kWarps && 2 * sharers * count <= kWarps) sharers *= 2;
    const int sharer = warp() % sharers;
    const int unit = warp() / sharers;  // of the slice
    const Quad quad = quad_of(first + unit);
    const Result result(*this, split, quad.row);
    QuadSum sum;
    std::uint64_t readers = 0;

    static_assert(scheduler::kMaxParts <= 32 * kWarps, "a lane for each piece");
    const int piece_bytes = count * kUnitBytes + kPairsBytes;
    const int max_pieces = num_bytes_ / piece_bytes;
#pragma unroll 1
    for (int begin = 0; begin < n; begin += max_pieces) {
      const int pieces = min(max_pieces, n - begin);
      ptx::fence_proxy_async();
      sync();  // shared memory is free
      if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(loaded_, pieces * piece_bytes);
      const int piece = begin + warp() + lane() * kWarps;
      if (piece < begin + pieces) load(split, piece, first, count, shared_ + (piece - begin) * piece_bytes);
      ptx::mbarrier_wait(loaded_, loaded_phase_);
      loaded_phase_ ^= 1;
      // All pieces are here, so this CTA has seen all flags: loads that this depends on, so nothing need be released.
      // And this thread has seen the first piece's, before which the count was reset. Not waited for before it is
      // needed.
      if (begin + pieces >= n && threadIdx.x == 0) readers = ptx::atomic_add(reader_count(split), 1);
      if (count > kWarps) {
        merge_units(split, first, count, piece_bytes);  // all pieces are there at once: kMinSharedBytes
      } else if (unit < count) {
        const std::uint32_t from = shared_ + sharer * piece_bytes;
        const int own_pieces = (pieces - sharer + sharers - 1) / sharers;
        add(sum, quads_of(from, unit), pairs_of(from, count, first + unit), sharers * piece_bytes, own_pieces);
      }
    }
    if (sharers > 1) {
      sync();
      give(sum);
      sync();
      if (sharer == 0) {
#pragma unroll 1
        for (int other = 1; other < sharers; ++other) take(sum, other);
      }
    }
    if (count <= kWarps && unit < count && sharer == 0) result.write(sum, quad.column);
    clear_flags(split, readers);
  }

 private:
  /// Where a thread's two rows of a unit go.
  struct Result {
    Element* out[2] = {};  // null where the row is padding
    float* lse[2] = {};

    Result() = default;
    __device__ __forceinline__ Result(const Combine& combine, const SplitRequest& split, int row) {
      const FinalOutput<Element> output{combine.params_, split.request};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const RowCoordinate at(combine.params_, combine.tile_, combine.head_k_, row + r * Traits::kQuadRowStep);
        out[r] = at.is_valid ? output.row(at) : nullptr;
        lse[r] = output.lse(at);
      }
    }
    /// The quad's first column says which thread writes the rows' log-sum-exp: the one that has column 0.
    __device__ __forceinline__ void write(const QuadSum& sum, int column) const {
      const float inverse[2] = {inverse_sum(sum.total[0]), inverse_sum(sum.total[1])};
      write(sum, column, inverse);
    }
    __device__ __forceinline__ void write(const QuadSum& sum, int column, const float (&inverse)[2]) const {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (out[r] == nullptr) continue;
        if constexpr (Traits::kQuadColumnStep == 1) {
          *reinterpret_cast<std::uint32_t*>(out[r] + column) =
              pack<Element>(sum.value[2 * r] * inverse[r], sum.value[2 * r + 1] * inverse[r]);
        } else {
          out[r][column] = convert<Element>(sum.value[r] * inverse[r]);
          out[r][column + Traits::kQuadColumnStep] = convert<Element>(sum.value[r + 2] * inverse[r]);
        }
        if (column == 0) *lse[r] = log_sum_exp(sum.max[r], sum.total[r]);
      }
    }
  };

  /// This lane's quad of a unit of the tile, and where it lies in a piece of the slice; where the sums of its rows do.
  __device__ static Quad quad_of(int unit) {
    return Traits::quad(unit / Traits::kQuadsPerThread, lane(), unit % Traits::kQuadsPerThread);
  }
  __device__ static std::uint32_t quads_of(std::uint32_t piece, int unit_of_slice) {
    return piece + unit_of_slice * kUnitBytes + lane() * kVectorBytes;
  }
  __device__ static std::uint32_t pairs_of(std::uint32_t piece, int count, int unit) {
    const int pair = Traits::first_pair(unit / Traits::kQuadsPerThread, unit % Traits::kQuadsPerThread) +
                     Traits::pair_of_lane(lane());
    return piece + count * kUnitBytes + pair * kVectorBytes;
  }

  __device__ TileFlags flags() const { return {params_, tile_.index(params_.tiling, head_k_)}; }
  __device__ std::uint64_t* reader_count(const SplitRequest& split) const { return &flags().readers[split.first_part]; }
  __device__ __forceinline__ void clear_flags(const SplitRequest& split, std::uint64_t readers) const {
    if (warp() != 0 || static_cast<int>(__shfl_sync(~0U, readers, 0)) + 1 < split.num_slices) return;
    for (int piece = lane(); piece < split.num_pieces; piece += 32) flags().flags[split.slot(piece)] = 0;
  }

  /// Waits for a piece, and brings its share of the slice to `to`: units, then the sums of all rows. By one thread.
  __device__ __forceinline__ void load(const SplitRequest& split, int piece, int first, int count,
                                       std::uint32_t to) const {
    const SlotTile<Traits> slot(params_, split.slot(piece), tile_.index(params_.tiling, head_k_));
    const std::uint64_t* const flag = &flags().flags[split.slot(piece)];
    while (ptx::load_acquire(flag) != params_.token) {
    }
    ptx::fence_proxy_async_global();
    if (count > 0) ptx::bulk_load(to, slot.quads + first * 32, count * kUnitBytes, loaded_);
    ptx::bulk_load(to + count * kUnitBytes, slot.pairs, kPairsBytes, loaded_);
  }
  /// All of a warp's units, where it has several: in a row, so that few of them have other rows than the one before.
  __device__ __forceinline__ void merge_units(const SplitRequest& split, int first, int count, int step) const {
    Result result;
    QuadSum sum;
    float inverse[2] = {};
    int row = -1;
#pragma unroll 1
    for (int unit = count * warp() / kWarps; unit < count * (warp() + 1) / kWarps; ++unit) {
      const Quad quad = quad_of(first + unit);
      const std::uint32_t quads = quads_of(shared_, unit);
      const std::uint32_t pairs = pairs_of(shared_, count, first + unit);
      if (quad.row != row) {
        row = quad.row;
        result = Result(*this, split, row);
        sum = QuadSum();
        add(sum, pairs, pairs, step, split.num_pieces);  // for the maxima and totals
        inverse[0] = inverse_sum(sum.total[0]);
        inverse[1] = inverse_sum(sum.total[1]);
      }
#pragma unroll
      for (float& value : sum.value) value = 0.0F;
#pragma unroll 4
      for (int piece = 0; piece < split.num_pieces; ++piece) {
        const float4 rows = ptx::load_shared_v4(pairs + piece * step);
        const float weight[2] = {ptx::exp2_approx(rows.x - sum.max[0]), ptx::exp2_approx(rows.z - sum.max[1])};
        add_values(sum, ptx::load_shared_v4(quads + piece * step), weight);
      }
      result.write(sum, quad.column, inverse);
    }
  }

  /// Adds `count` pieces of a unit, whose quads and sums lie at these addresses, and `step` bytes further for the next.
  __device__ __forceinline__ void add(QuadSum& sum, std::uint32_t quads, std::uint32_t pairs, int step,
                                      int count) const {
    float max[2] = {sum.max[0], sum.max[1]};
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const float4 rows = ptx::load_shared_v4(pairs + i * step);
      max[0] = fmaxf(max[0], rows.x);
      max[1] = fmaxf(max[1], rows.z);
    }
    raise_max(sum, max[0], max[1]);
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      add(sum, ptx::load_shared_v4(quads + i * step), ptx::load_shared_v4(pairs + i * step));
    }
  }
  /// `rows`: (maximum, sum) of two rows; no maximum above those of `sum`.
  __device__ __forceinline__ static void add(QuadSum& sum, const float4& quad, const float4& rows) {
    const float weight[2] = {ptx::exp2_approx(rows.x - sum.max[0]), ptx::exp2_approx(rows.z - sum.max[1])};
    sum.total[0] = fmaf(weight[0], rows.y, sum.total[0]);
    sum.total[1] = fmaf(weight[1], rows.w, sum.total[1]);
    add_values(sum, quad, weight);
  }
  __device__ __forceinline__ static void add_values(QuadSum& sum, const float4& quad, const float (&weight)[2]) {
    sum.value[0] = fmaf(weight[Traits::quad_row(0)], quad.x, sum.value[0]);
    sum.value[1] = fmaf(weight[Traits::quad_row(1)], quad.y, sum.value[1]);
    sum.value[2] = fmaf(weight[Traits::quad_row(2)], quad.z, sum.value[2]);
    sum.value[3] = fmaf(weight[Traits::quad_row(3)], quad.w, sum.value[3]);
  }
  __device__ __forceinline__ static void raise_max(QuadSum& sum, float max0, float max1) {
    const float scale[2] = {ptx::exp2_approx(sum.max[0] - max0), ptx::exp2_approx(sum.max[1] - max1)};
    sum.max[0] = max0;
    sum.max[1] = max1;
    sum.total[0] *= scale[0];
    sum.total[1] *= scale[1];
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.value[i] *= scale[Traits::quad_row(i)];
  }

  // The sum of a warp's pieces on its way to the first of the sharers.
  __device__ std::uint32_t shared_sum(int warp) const {
    return shared_ + 2 * warp * kUnitBytes + lane() * kVectorBytes;
  }
  __device__ __forceinline__ void give(const QuadSum& sum) const {
    const float rows[4] = {sum.max[0], sum.total[0], sum.max[1], sum.total[1]};
    ptx::store_shared_v4(shared_sum(warp()), sum.value);
    ptx::store_shared_v4(shared_sum(warp()) + kUnitBytes, rows);
  }
  __device__ __forceinline__ void take(QuadSum& sum, int other) const {
    const std::uint32_t from = shared_sum(warp() + other);
    const float4 rows = ptx::load_shared_v4(from + kUnitBytes);
    raise_max(sum, fmaxf(sum.max[0], rows.x), fmaxf(sum.max[1], rows.z));
    add(sum, ptx::load_shared_v4(from), rows);  // a sum is weighed like a piece
  }

  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int lane() { return threadIdx.x % 32; }

  /// Waits for all consumer threads. A named barrier would do; racecheck of compute-sanitizer does not follow one.
  __device__ __forceinline__ void sync() {
    ptx::mbarrier_arrive(met_);
    ptx::mbarrier_wait(met_, met_phase_);
    met_phase_ ^= 1;
  }

  const DenseDecodeParams& params_;
  const QueryTile& tile_;
  const int head_k_;
  const std::uint32_t shared_;
  const int num_bytes_;
  const std::uint32_t met_;
  const std::uint32_t loaded_;
  std::uint32_t met_phase_ = 0;
  std::uint32_t loaded_phase_ = 0;
};

/// Merges the part's slices of split requests, which find_splits has found meanwhile. By all consumer threads, when the
/// part's pieces are done.
template <class Traits, class Storage>
__device__ __forceinline__ void merge_splits(const DenseDecodeParams& params, Storage& shared, const QueryTile& tile,
                                             int head_k, int part_idx) {
  Combine<Traits> combine(params, tile, head_k, ptx::shared_address(&shared), Storage::kMergeBytes,
                          shared.merge_barriers);
  ptx::mbarrier_wait(ptx::shared_address(&shared.plan.splits_ready), 0);
#pragma unroll 1
  for (const SplitRequest& found : shared.plan.splits) {
    const SplitRequest split = found;
    if (split.num_pieces > 0) combine.run(split, part_idx - split.first_part);
  }
}

}  // namespace flash_mla::sm90

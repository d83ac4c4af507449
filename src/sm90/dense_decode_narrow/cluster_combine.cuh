#pragma once

#include <cstdint>

#include "sm90/dense_decode/epilogue.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/row_coordinate.cuh"
#include "sm90/dense_decode_narrow/cluster_share.cuh"
#include "sm90/dense_decode_narrow/mainloop.cuh"
#include "sm90/dense_decode_narrow/traits.cuh"
#include "sm90/primitives/fragment.cuh"
#include "sm90/primitives/softmax.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/cluster.cuh"
#include "sm90/ptx/math.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/shared.cuh"

namespace flash_mla::sm90 {

/// Where the CTAs of a cluster leave their pieces for the one that merges some chunks of O.
template <class Traits>
struct ClusterStorage : NarrowStorage<Traits> {
  float4 values[Traits::kRows * kHeadDimV / 4];
  float2 totals[Traits::kRows][kMaxClusterSize];  // maxima and sums of each piece
  float weights[kMaxClusterSize][Traits::kRows];  // what its values are multiplied with
  ClusterShare guess;                             // before the grid before has ended
  ClusterShare share;
  std::uint64_t guess_gone;  // an mbarrier for one arrival: copies by a wrong guess are over
  std::uint64_t staged[2];   // ones for an arrival by each consumer thread: a half of each one's columns can be given
  std::uint64_t weighed;  // for one by each consumer and scorer thread: the own piece is staged, and weights are found
  std::uint64_t rows_received;  // ones for one arrival, with the bytes of all other pieces
  std::uint64_t values_received;

  __device__ void init_cluster_barriers() {
    ptx::mbarrier_init(ptx::shared_address(&guess_gone), 1);
    for (auto& barrier : staged) ptx::mbarrier_init(ptx::shared_address(&barrier), Traits::kConsumerThreads);
    ptx::mbarrier_init(ptx::shared_address(&weighed), Traits::kConsumerThreads + Traits::kWarpgroupThreads);
    ptx::mbarrier_init(ptx::shared_address(&rows_received), 1);
    ptx::mbarrier_init(ptx::shared_address(&values_received), 1);
  }
};

/// Merges the pieces of a request whose CTAs are a cluster. Each CTA merges some chunks of O: the others copy theirs
/// into its shared memory. Rows go first, by the scorer, while PV goes on: so weights are there before the values.
template <class Traits>
class ClusterCombine {
  using Element = typename Traits::Element;
  using Consumer = NarrowConsumer<Traits>;
  static constexpr int kHalfChunks = Traits::kOwnChunks / 2;
  static constexpr int kVectorsPerChunk = Traits::kAccumulators / 4;
  static constexpr int kChunkVectors = kVectorsPerChunk * Traits::kWarpgroupThreads;
  static_assert(kChunkVectors == Traits::kConsumerThreads, "a thread has the same rows of each chunk");

 public:
  __device__ ClusterCombine(const DenseDecodeParams& params, ClusterStorage<Traits>& shared, const Piece& piece)
      : params_(params),
        shared_(shared),
        request_(piece.request),
        size_(params.cluster_size),
        chunks_(chunks_of(params.cluster_size)),
        staging_(shared.kv[piece.end_block - piece.begin_block == Traits::kNumSlots ? 0 : 1][0]) {}

  /// Gives each CTA of the cluster its chunks. By the warps of the producers, numbered from the first, when all CTAs
  /// have begun; each looks after some CTAs, as a warp issues copies one after another.
  __device__ __forceinline__ void give(int warp) const {
    const int to = warp + threadIdx.x % 32 * Traits::kWarpgroupWarps;
    if (to >= size_) return;
    const int rank = ptx::cta_rank_in_cluster();
    const std::uint32_t received = ptx::shared_address(&shared_.values_received);
    const int bytes = chunks_ * kChunkVectors * static_cast<int>(sizeof(float4));
    if (to == rank) {
      ptx::mbarrier_arrive_expect(received, (size_ - 1) * bytes);
      return;
    }
    const std::uint32_t barrier = ptx::map_to_cta(received, to);
    const std::uint32_t values = ptx::map_to_cta(ptx::shared_address(shared_.values) + rank * bytes, to);
    const int first = to * chunks_ % Traits::kOwnChunks;
    if (first < kHalfChunks) ptx::mbarrier_wait(ptx::shared_address(&shared_.staged[0]), 0);
    if (first + chunks_ > kHalfChunks) ptx::mbarrier_wait(ptx::shared_address(&shared_.staged[1]), 0);
    ptx::bulk_copy_to_cta(values, ptx::shared_address(staging_) + to * bytes, bytes, barrier);
  }

  /// Lays half `half` of the consumer's columns where other CTAs can be given them from. By all consumer threads, when
  /// nothing uses that slot any more.
  __device__ __forceinline__ void stage(const Consumer& consumer, int warpgroup, int half) const {
    const std::uint32_t to = ptx::shared_address(staging_);
    const int thread = threadIdx.x % Traits::kWarpgroupThreads;
#pragma unroll
    for (int j = half * kHalfChunks; j < (half + 1) * kHalfChunks; ++j) {
#pragma unroll
      for (int v = 0; v < kVectorsPerChunk; ++v) {
        const float* const o = &consumer.o[j][4 * v];
        const int idx = (warpgroup * Traits::kOwnChunks + j) * kChunkVectors + v * Traits::kWarpgroupThreads + thread;
        ptx::store_shared_v4(to + idx * static_cast<int>(sizeof(float4)), {o[0], o[1], o[2], o[3]});
      }
    }
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(ptx::shared_address(&shared_.staged[half]));
  }

  /// Merges this CTA's chunks. By all consumer threads, when all is staged.
  __device__ __forceinline__ void run() const {
    ptx::cluster_wait();  // not for long: all CTAs have begun
    const int vector = threadIdx.x / Traits::kWarpgroupThreads;
    const int thread = threadIdx.x % Traits::kWarpgroupThreads;
    const int row = 8 * vector + thread % 4 * 2;
    const RowCoordinate& at = shared_.rows[8 * vector + thread % 32 / 4];
    const int rank = ptx::cta_rank_in_cluster();
    const auto* const own = reinterpret_cast<const float4*>(staging_) + rank * chunks_ * kChunkVectors;
    Element* to = FinalOutput<Element>{params_, request_}.row(at) + rank * chunks_ * Traits::kChunkColumns +
                  thread / 32 * 16 + thread % 4 * 2;
    ptx::mbarrier_arrive(ptx::shared_address(&shared_.weighed));
    ptx::mbarrier_wait(ptx::shared_address(&shared_.weighed), 0);
    ptx::mbarrier_wait(ptx::shared_address(&shared_.values_received), 0);
    __syncwarp();
    ptx::cluster_arrive();  // this CTA has received everything, so the others' memory may go
    if (size_ == kMaxClusterSize) {
      add<kMaxClusterSize>(own, rank, row, to, at.is_valid());
    } else if (size_ == kMaxClusterSize / 2) {
      add<kMaxClusterSize / 2>(own, rank, row, to, at.is_valid());
    } else {
      static_assert(kMinClusterSize == kMaxClusterSize / 4);
      add<kMinClusterSize>(own, rank, row, to, at.is_valid());
    }
    __syncwarp();
    ptx::cluster_wait();  // all have, so nothing reads this CTA's memory any more
  }

  /// Gives rows to the other CTAs, and finds weights. By all threads of the scorer, those whose number is a row with
  /// its total.
  __device__ __forceinline__ void weigh(float2 total) const {
    const int thread = threadIdx.x % Traits::kWarpgroupThreads;
    if (thread < Traits::kRows) shared_.totals[thread][ptx::cta_rank_in_cluster()] = total;
    __syncwarp();
    ptx::named_barrier_sync(kScorerBarrier, Traits::kWarpgroupThreads);
    ptx::cluster_wait();
    give_rows(thread);
    find_weights(thread);
    ptx::mbarrier_arrive(ptx::shared_address(&shared_.weighed));
  }

 private:
  /// That a CTA of a cluster merges. A shift: sizes are powers of 2.
  __device__ __forceinline__ static int chunks_of(int cluster_size) {
    return Traits::kNumVChunks >> (31 - __clz(cluster_size));
  }

  /// Adds the pieces of this CTA's chunks, and writes results. All values of a chunk are asked for before any is
  /// added, so that they are waited for once, and not one after another.
  template <int kSize>
  __device__ __forceinline__ void add(const float4* own, int rank, int row, Element* to, bool is_valid) const {
    constexpr int kChunks = Traits::kNumVChunks / kSize;
#pragma unroll 1
    for (int chunk = 0; chunk < kChunks; ++chunk, to += Traits::kChunkColumns) {
      float4 part[kSize];
      float2 weight[kSize];
#pragma unroll
      for (int piece = 0; piece < kSize; ++piece) {
        const float4* const from = piece == rank ? own : &shared_.values[piece * kChunks * kChunkVectors];
        part[piece] = from[chunk * kChunkVectors + threadIdx.x];
        weight[piece] = *reinterpret_cast<const float2*>(&shared_.weights[piece][row]);
      }
      float value[4] = {};
#pragma unroll
      for (int piece = 0; piece < kSize; ++piece) {
        value[0] = fmaf(weight[piece].x, part[piece].x, value[0]);
        value[1] = fmaf(weight[piece].y, part[piece].y, value[1]);
        value[2] = fmaf(weight[piece].x, part[piece].z, value[2]);
        value[3] = fmaf(weight[piece].y, part[piece].w, value[3]);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const std::uint32_t two = ptx::transpose_matrix(pack<Element>(value[2 * j], value[2 * j + 1]));
        if (is_valid) *reinterpret_cast<std::uint32_t*>(to + 8 * j) = two;
      }
    }
  }

  /// A thread gives a row to a CTA.
  __device__ __forceinline__ void give_rows(int thread) const {
    const std::uint32_t received = ptx::shared_address(&shared_.rows_received);
    if (thread == 0) ptx::mbarrier_arrive_expect(received, (size_ - 1) * Traits::kRows * sizeof(float2));
    const int to = thread / Traits::kRows;
    const int row = thread % Traits::kRows;
    const int rank = ptx::cta_rank_in_cluster();
    if (to >= size_ || to == rank) return;
    const std::uint32_t address = ptx::shared_address(&shared_.totals[row][rank]);
    ptx::store_to_cta(ptx::map_to_cta(address, to), shared_.totals[row][rank], ptx::map_to_cta(received, to));
  }

  /// Waits for the rows, and finds what each piece's values are multiplied with. A lane for each piece of each row. The
  /// first CTA writes log-sum-exp.
  __device__ __forceinline__ void find_weights(int thread) const {
    static_assert(Traits::kRows * kMaxClusterSize == Traits::kWarpgroupThreads);
    const int piece = thread % kMaxClusterSize;
    const int row = thread / kMaxClusterSize;
    const RowCoordinate& at = shared_.rows[row];
    ptx::mbarrier_wait(ptx::shared_address(&shared_.rows_received), 0);
    float2 own = {kNoMax, 0.0F};
    if (piece < size_) own = shared_.totals[row][piece];
    float max = fmaxf(own.x, kNoMax);  // an empty piece may have -inf, if the scale is huge
#pragma unroll
    for (int lanes = 1; lanes < kMaxClusterSize; lanes *= 2) max = fmaxf(max, __shfl_xor_sync(~0U, max, lanes));
    const float factor = ptx::exp2_approx(own.x - max);
    float total = factor * own.y;
#pragma unroll
    for (int lanes = 1; lanes < kMaxClusterSize; lanes *= 2) total += __shfl_xor_sync(~0U, total, lanes);
    shared_.weights[piece][row] = factor * inverse_sum(total);
    if (ptx::cta_rank_in_cluster() == 0 && piece == 0 && at.is_valid()) {
      FinalOutput<Element>{params_, request_}.write_lse(at, max, total);
    }
  }

  const DenseDecodeParams& params_;
  ClusterStorage<Traits>& shared_;
  const int request_;
  const int size_;
  const int chunks_;              // that a CTA merges
  unsigned char* const staging_;  // 32 KB: of the first slot, if PV of the last block is in the second, else of that
};

}  // namespace flash_mla::sm90

#pragma once

namespace flash_mla::sm90 {

/// Accumulators have tokens or columns of V as rows, and query rows as columns: which of a thread's query rows register
/// `i` of one belongs to, and the tile's row of such an index.
template <class Traits>
struct NarrowAccumulator {
  __device__ static constexpr int index_of(int i) { return i / 4 * 2 + i % 2; }
  __device__ static int row_at(int index) { return index / 2 * 8 + threadIdx.x % 4 * 2 + index % 2; }
};

}  // namespace flash_mla::sm90

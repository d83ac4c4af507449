#include "cpu/dense_decode.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "cpu/half.h"
#include "cpu/parallel.h"
#include "flash_mla/error.h"

// Attention as the GPU computes it, in float: a tile of query rows that share a KV head walks over its request's
// tokens, a block at a time, with an online softmax (Milakov and Gimelshein, arXiv:1805.02867).
//
// Inner loops run over kLanes independent sums, so that they vectorise without leave to reorder a sum.

namespace flash_mla::cpu {
namespace {

constexpr int kTileRows = 16;     // query rows that one conversion of a token to float serves
constexpr int kBlockTokens = 32;  // tokens of a block: 72 KiB as float
constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <int kHeadDim>
using Row = std::array<float, kHeadDim>;

/// Tokens that a request has, within what its row of the block table can hold.
std::int64_t seqlen_k_of(const DenseDecodeArguments& args, const DenseDecodeShape& shape, std::int64_t batch_idx) {
  const std::int64_t seqlen = static_cast<const std::int32_t*>(args.cache_seqlens.data)[batch_idx];
  return std::clamp<std::int64_t>(seqlen, 0, shape.max_pages * shape.page_size);
}

/// A request's row of the block table.
const std::int32_t* pages_of(const DenseDecodeArguments& args, std::int64_t batch_idx) {
  return static_cast<const std::int32_t*>(args.block_table.data) + batch_idx * args.block_table.strides[0];
}

void check_pages(const DenseDecodeArguments& args, const DenseDecodeShape& shape) {
  for (std::int64_t batch_idx = 0; batch_idx < shape.batch_size; ++batch_idx) {
    const std::int64_t seqlen = seqlen_k_of(args, shape, batch_idx);
    const std::int64_t num_used = (seqlen + shape.page_size - 1) / shape.page_size;
    for (std::int64_t i = 0; i < num_used; ++i) {
      const std::int64_t page = pages_of(args, batch_idx)[i];
      if (page >= 0 && page < shape.num_pages) continue;
      throw InvalidArgument(
          "block_table: expected page numbers from 0 to num_pages - 1 = " + std::to_string(shape.num_pages - 1) +
          ", got " + std::to_string(page) + " at [" + std::to_string(batch_idx) + ", " + std::to_string(i) + "]");
    }
  }
}

float dot(const Row<kHeadDimQk>& a, const Row<kHeadDimQk>& b) {
  std::array<float, kLanes> sums{};
  for (int d = 0; d < kHeadDimQk; d += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[d + lane] * b[d + lane];
  }
  float sum = 0.0F;
  for (const float value : sums) sum += value;
  return sum;
}

/// Query rows of one request and one KV head: rows begin to begin + count - 1 of its seqlen_q * group_size, the heads
/// of a query side by side.
struct Tile {
  std::int64_t batch_idx;
  std::int64_t head_k;
  std::int64_t begin;
  std::int64_t count;
};

template <class Element>
class TileWorker {
 public:
  TileWorker(const DenseDecodeArguments& args, const DenseDecodeShape& shape)
      : args_(args),
        shape_(shape),
        group_size_(shape.num_heads_q / shape.num_heads_k),
        tiles_per_head_(num_tiles_per_head(shape)),
        tokens_(kBlockTokens),
        rows_(kTileRows) {}

  static std::int64_t num_tiles(const DenseDecodeShape& shape) {
    return shape.batch_size * shape.num_heads_k * num_tiles_per_head(shape);
  }

  void operator()(std::int64_t item) {
    Tile tile{};
    tile.begin = item % tiles_per_head_ * kTileRows;
    tile.head_k = item / tiles_per_head_ % shape_.num_heads_k;
    tile.batch_idx = item / tiles_per_head_ / shape_.num_heads_k;
    tile.count = std::min<std::int64_t>(kTileRows, shape_.seqlen_q * group_size_ - tile.begin);

    std::int64_t max_visible = 0;
    for (int r = 0; r < tile.count; ++r) {
      begin_row(tile, r);
      max_visible = std::max(max_visible, rows_[r].num_visible);
    }
    for (std::int64_t begin = 0; begin < max_visible; begin += kBlockTokens) {
      load_tokens(tile, begin, std::min<std::int64_t>(kBlockTokens, max_visible - begin));
      for (int r = 0; r < tile.count; ++r) {
        attend(rows_[r], static_cast<int>(std::clamp<std::int64_t>(rows_[r].num_visible - begin, 0, kBlockTokens)));
      }
    }
    for (int r = 0; r < tile.count; ++r) end_row(tile, r);
  }

 private:
  /// A query row and the state of its softmax.
  struct QueryRow {
    Row<kHeadDimQk> q;
    Row<kHeadDimV> out;        // not yet divided by row_sum
    std::int64_t num_visible;  // keys that it sees: the request's first ones
    float row_max;
    float row_sum;
  };

  static std::int64_t num_tiles_per_head(const DenseDecodeShape& shape) {
    const std::int64_t num_rows = shape.seqlen_q * (shape.num_heads_q / shape.num_heads_k);
    return (num_rows + kTileRows - 1) / kTileRows;
  }

  std::int64_t query_idx(const Tile& tile, int r) const { return (tile.begin + r) / group_size_; }
  std::int64_t head_idx(const Tile& tile, int r) const {
    return tile.head_k * group_size_ + (tile.begin + r) % group_size_;
  }

  void begin_row(const Tile& tile, int r) {
    QueryRow& row = rows_[r];
    const auto& strides = args_.q.strides;
    const Element* const q = static_cast<const Element*>(args_.q.data) + tile.batch_idx * strides[0] +
                             query_idx(tile, r) * strides[1] + head_idx(tile, r) * strides[2];
    for (int d = 0; d < kHeadDimQk; ++d) row.q[d] = to_float(q[d]);
    row.out.fill(0.0F);
    row.num_visible = seqlen_k_of(args_, shape_, tile.batch_idx);
    if (args_.causal) {
      const std::int64_t num_hidden = shape_.seqlen_q - 1 - query_idx(tile, r);
      row.num_visible = std::max<std::int64_t>(row.num_visible - num_hidden, 0);
    }
    row.row_max = -kInfinity;
    row.row_sum = 0.0F;
  }

  void load_tokens(const Tile& tile, std::int64_t begin, std::int64_t count) {
    const std::int32_t* const pages = pages_of(args_, tile.batch_idx);
    const auto& strides = args_.k_cache.strides;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t token = begin + i;
      const Element* const values = static_cast<const Element*>(args_.k_cache.data) +
                                    pages[token / shape_.page_size] * strides[0] +
                                    token % shape_.page_size * strides[1] + tile.head_k * strides[2];
      for (int d = 0; d < kHeadDimQk; ++d) tokens_[i][d] = to_float(values[d]);
    }
  }

  /// One step of the online softmax, over the first `count` tokens of the block.
  void attend(QueryRow& row, int count) const {
    if (count == 0) return;
    std::array<float, kBlockTokens> weights;
    float new_max = row.row_max;
    for (int i = 0; i < count; ++i) {
      weights[i] = dot(row.q, tokens_[i]) * args_.softmax_scale;
      new_max = std::max(new_max, weights[i]);
    }
    // Where all scores so far are -inf, their weights are 0, not the NaN of -inf + inf.
    const float reference = new_max == -kInfinity ? 0.0F : new_max;
    float block_sum = 0.0F;
    for (int i = 0; i < count; ++i) {
      weights[i] = std::exp(weights[i] - reference);
      block_sum += weights[i];
    }
    const float rescale = std::exp(row.row_max - reference);
    row.row_sum = row.row_sum * rescale + block_sum;
    row.row_max = new_max;
    for (int d = 0; d < kHeadDimV; d += kLanes) {
      std::array<float, kLanes> sums;
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] = row.out[d + lane] * rescale;
      for (int i = 0; i < count; ++i) {
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] += weights[i] * tokens_[i][d + lane];
      }
      for (int lane = 0; lane < kLanes; ++lane) row.out[d + lane] = sums[lane];
    }
  }

  void end_row(const Tile& tile, int r) {
    const QueryRow& row = rows_[r];
    const bool sees_nothing = row.num_visible == 0;
    const std::int64_t query = query_idx(tile, r);
    const std::int64_t head = head_idx(tile, r);

    const auto& out_strides = args_.out.strides;
    Element* const out = static_cast<Element*>(args_.out.data) + tile.batch_idx * out_strides[0] +
                         query * out_strides[1] + head * out_strides[2];
    const float row_sum = sees_nothing ? 1.0F : row.row_sum;
    for (int d = 0; d < kHeadDimV; ++d) from_float(row.out[d] / row_sum, out[d]);

    const auto& lse_strides = args_.lse.strides;
    float* const lse = static_cast<float*>(args_.lse.data) + tile.batch_idx * lse_strides[0] + head * lse_strides[1] +
                       query * lse_strides[2];
    *lse = sees_nothing ? kInfinity : row.row_max + std::log(row.row_sum);
  }

  const DenseDecodeArguments& args_;
  const DenseDecodeShape& shape_;
  const std::int64_t group_size_;      // query heads of a KV head
  const std::int64_t tiles_per_head_;  // tiles of one request and one KV head
  std::vector<Row<kHeadDimQk>> tokens_;
  std::vector<QueryRow> rows_;
};

template <class Element>
void run(const DenseDecodeArguments& args, const DenseDecodeShape& shape) {
  using Worker = TileWorker<Element>;
  parallel_for(Worker::num_tiles(shape), [&] { return Worker(args, shape); });
}

}  // namespace

void dense_decode(const DenseDecodeArguments& args, const DenseDecodeShape& shape) {
  check_pages(args, shape);
  if (args.q.dtype == DType::kBFloat16) {
    run<BFloat16>(args, shape);
  } else {
    run<Float16>(args, shape);
  }
}

}  // namespace flash_mla::cpu

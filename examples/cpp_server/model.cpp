#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace server::model {
namespace {

using flash_mla::kHeadDimQk;
using flash_mla::kHeadDimV;

enum class Kind : std::uint64_t { kLatent, kQuery };

// Logits of about 0.25, and values small beside the absolute tolerance.
constexpr float kLatentRange = 0.09F;
constexpr float kQueryRange = 9.0F;

std::uint16_t to_bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<std::uint16_t>(bits >> 16);
}

double from_bfloat16(std::uint16_t value) {
  const std::uint32_t bits = std::uint32_t{value} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

/// Values between -range and range, by splitmix64 (Steele, Lea, Flood 2014).
void write_random(const Place& place, Kind kind, float range, std::uint16_t* values, int count) {
  std::uint64_t state = static_cast<std::uint64_t>(kind) << 60 | static_cast<std::uint64_t>(place.request) << 40 |
                        static_cast<std::uint64_t>(place.layer) << 32 | static_cast<std::uint64_t>(place.position);
  state *= 0xd1342543de82ef95U;
  for (int i = 0; i < count; ++i) {
    std::uint64_t z = state += 0x9e3779b97f4a7c15U;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9U;
    z = (z ^ z >> 27) * 0x94d049bb133111ebU;
    values[i] = to_bfloat16(range * (static_cast<float>((z ^ z >> 31) >> 40) * 0x1p-23F - 1.0F));
  }
}

bool is_close(double got, double want, double absolute, double relative) {
  return std::abs(got - want) <= std::max(absolute, relative * std::abs(want));
}

}  // namespace

void write_latent(const Place& place, std::uint16_t* latent) {
  write_random(place, Kind::kLatent, kLatentRange, latent, kHeadDimQk);
}

void write_query(const Place& place, std::uint16_t* query) {
  write_random(place, Kind::kQuery, kQueryRange, query, kQuerySize);
}

bool is_attention(const Place& place, const std::uint16_t* out, const float* lse) {
  std::vector<std::uint16_t> query(kQuerySize);
  write_query(place, query.data());
  std::vector<std::uint16_t> latent(kHeadDimQk);
  std::vector<double> mean(kOutSize, 0.0);
  std::vector<double> sum(kNumHeads, 0.0);
  for (int position = 0; position <= place.position; ++position) {
    write_latent({place.request, place.layer, position}, latent.data());
    for (int h = 0; h < kNumHeads; ++h) {
      double score = 0;
      for (int d = 0; d < kHeadDimQk; ++d) {
        score += from_bfloat16(query[h * kHeadDimQk + d]) * from_bfloat16(latent[d]);
      }
      const double weight = std::exp(score * flash_mla::kDefaultSoftmaxScale);
      sum[h] += weight;
      for (int d = 0; d < kHeadDimV; ++d) mean[h * kHeadDimV + d] += weight * from_bfloat16(latent[d]);
    }
  }
  for (int i = 0; i < kOutSize; ++i) {
    if (!is_close(from_bfloat16(out[i]), mean[i] / sum[i / kHeadDimV], 8e-4, 2.01 / 128)) return false;
  }
  for (int h = 0; h < kNumHeads; ++h) {
    if (!is_close(lse[h], std::log(sum[h]), 1e-6, 8.01 / 65536)) return false;
  }
  return true;
}

}  // namespace server::model

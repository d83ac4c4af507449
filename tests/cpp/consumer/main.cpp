// Decodes one query over three cached tokens in CPU memory. A query of zeros weighs all tokens alike: the result is
// their mean, and the log of their number.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <vector>

#include "flash_mla/flash_mla.h"

namespace {

using flash_mla::DType;

constexpr int kPageSize = 64;
constexpr std::uint16_t kOne = 0x3f80;  // as bfloat16
constexpr std::uint16_t kTwo = 0x4000;
constexpr std::uint16_t kThree = 0x4040;

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  std::cerr << "failed: " << what << "\n";
  ++failures;
}

bool throws_invalid_type(flash_mla::DenseDecodeArguments args) {
  args.q.dtype = DType::kFloat32;
  try {
    flash_mla::dense_decode(args, nullptr, 0, nullptr);
  } catch (const flash_mla::InvalidType&) {
    return true;
  }
  return false;
}

}  // namespace

int main() {
  std::vector<std::uint16_t> q(flash_mla::kHeadDimQk, 0);
  std::vector<std::uint16_t> k_cache;
  for (const std::uint16_t value : {kOne, kTwo, kThree}) k_cache.insert(k_cache.end(), flash_mla::kHeadDimQk, value);
  k_cache.resize(kPageSize * flash_mla::kHeadDimQk);
  std::int32_t page = 0;
  std::int32_t seqlen = 3;
  std::vector<std::uint16_t> out(flash_mla::kHeadDimV);
  float lse = 0.0F;

  const flash_mla::Device cpu;
  flash_mla::DenseDecodeArguments args;
  args.q = make_tensor(q.data(), DType::kBFloat16, cpu, 1, 1, 1, flash_mla::kHeadDimQk);
  args.k_cache = make_tensor(k_cache.data(), DType::kBFloat16, cpu, 1, kPageSize, 1, flash_mla::kHeadDimQk);
  args.block_table = make_tensor(&page, DType::kInt32, cpu, 1, 1);
  args.cache_seqlens = make_tensor(&seqlen, DType::kInt32, cpu, 1);
  args.out = make_tensor(out.data(), DType::kBFloat16, cpu, 1, 1, 1, flash_mla::kHeadDimV);
  args.lse = make_tensor(&lse, DType::kFloat32, cpu, 1, 1, 1);

  expect(flash_mla::dense_decode_workspace_size(args) == 0, "the CPU needs no workspace");
  flash_mla::dense_decode(args, nullptr, 0, nullptr);
  expect(std::all_of(out.begin(), out.end(), [](std::uint16_t bits) { return bits == kTwo; }), "out is the mean");
  expect(std::abs(lse - std::log(3.0F)) < 1e-6F, "lse is the log of 3");
  expect(throws_invalid_type(args), "a wrong dtype throws InvalidType");
  return failures == 0 ? 0 : 1;
}

#include "busy_sms.h"

#include <chrono>

namespace flash_mla {
namespace {

constexpr int kSharedBytes = 200 * 1024;
constexpr auto kTimeout = std::chrono::seconds(10);

__global__ void stay_busy(volatile int* words) {
  constexpr unsigned long long kLimit = 20000000000;  // ns: for a tool that runs one kernel at a time
  unsigned long long begin = 0, now = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  words[1 + blockIdx.x] = 1;
  do {
    __nanosleep(1000);
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (words[0] == 0 && now - begin < kLimit);
}

}  // namespace

BusySms::BusySms(int count) {
  void* words = nullptr;
  EXPECT_EQ(cudaHostAlloc(&words, (1 + count) * sizeof(int), cudaHostAllocMapped), cudaSuccess);
  words_ = static_cast<volatile int*>(words);
  for (int i = 0; i <= count; ++i) words_[i] = 0;
  EXPECT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
  if (count == 0) return;
  EXPECT_EQ(cudaFuncSetAttribute(stay_busy, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), cudaSuccess);
  stay_busy<<<count, 32, kSharedBytes, stream_>>>(words_);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  const auto begin = std::chrono::steady_clock::now();
  int num_begun = 0;
  while (num_begun < count && std::chrono::steady_clock::now() - begin < kTimeout) num_begun += words_[1 + num_begun];
  EXPECT_EQ(num_begun, count);
}

BusySms::~BusySms() {
  words_[0] = 1;
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  cudaStreamDestroy(stream_);
  cudaFreeHost(const_cast<int*>(words_));
}

}  // namespace flash_mla

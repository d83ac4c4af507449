#include <gtest/gtest.h>

#include "api/waits_for_memory.h"
#include "cuda/device.h"

namespace {

using flash_mla::waits_for_memory;
using flash_mla::cuda::DeviceProperties;

// As their drivers tell.
constexpr DeviceProperties kH100{90, 132, 1.98e9, 2 * 2.619e9 * 5120 / 8};
constexpr DeviceProperties kH200{90, 132, 1.98e9, 2 * 3.201e9 * 6016 / 8};

TEST(WaitsForMemory, OneTileDoesOnEveryGpu) {
  EXPECT_TRUE(waits_for_memory(kH100, 1));
  EXPECT_TRUE(waits_for_memory(kH200, 1));
}

TEST(WaitsForMemory, TwoTilesDoWhereMemoryIsSlow) {
  EXPECT_TRUE(waits_for_memory(kH100, 2));
  EXPECT_FALSE(waits_for_memory(kH200, 2));
}

TEST(WaitsForMemory, FourTilesDoNot) {
  EXPECT_FALSE(waits_for_memory(kH100, 4));
  EXPECT_FALSE(waits_for_memory(kH200, 4));
}

TEST(WaitsForMemory, WhatIsUnknownLeavesItToTheTiles) {
  constexpr DeviceProperties kUnknownBandwidth{90, 132, 1.98e9, 0};
  constexpr DeviceProperties kUnknownClock{90, 132, 0, kH100.memory_bandwidth};
  for (const DeviceProperties& device : {kUnknownBandwidth, kUnknownClock}) {
    EXPECT_TRUE(waits_for_memory(device, 1));
    EXPECT_FALSE(waits_for_memory(device, 2));
  }
}

TEST(WaitsForMemory, OneTileDoesOnAFewSms) { EXPECT_TRUE(waits_for_memory({90, 16, 1.98e9, 4.8e12}, 1)); }

}  // namespace

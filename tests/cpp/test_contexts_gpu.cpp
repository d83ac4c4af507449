// Decodes in other CUDA contexts than the first, after a decode in that: a server's own context, a green context, which
// has some of the SMs, and the primary context when it has been reset. Skipped, by name, without a Hopper GPU.

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include "decode_case.h"

namespace flash_mla {
namespace {

/// A function of the driver, in the form that it had in a version of CUDA; null where the driver has none.
template <class Function>
Function driver_function(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
  EXPECT_EQ(cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &result), cudaSuccess);
  return reinterpret_cast<Function>(function);
}

#define FLASH_MLA_DRIVER(name, version) driver_function<decltype(&name)>(#name, version)

/// A context that is current on this thread.
class Current {
 public:
  explicit Current(CUcontext context) { EXPECT_EQ(FLASH_MLA_DRIVER(cuCtxPushCurrent, 4000)(context), CUDA_SUCCESS); }
  ~Current() {
    CUcontext context = nullptr;
    EXPECT_EQ(FLASH_MLA_DRIVER(cuCtxPopCurrent, 4000)(&context), CUDA_SUCCESS);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
};

class DenseDecodeContexts : public DenseDecodeGpu {
 protected:
  /// Each kernel: of clusters, of few rows, of 64 rows, with and without a plan.
  static void expect_all_agree() {
    for (const Extents& extents :
         {Extents{16, 1, 64, false, 1024}, Extents{16, 1, 64, false}, Extents{32, 1, 64, false},
          Extents{128, 1, 64, false}, Extents{128, 1, 64, false, kMaxTokens, 2}}) {
      SCOPED_TRACE(name_of({extents, 0}));
      expect_agreement(extents);
    }
  }
};

TEST_F(DenseDecodeContexts, OneOfItsOwn) {
  expect_all_agree();
  CUcontext context = nullptr;
  const auto create = driver_function<CUresult (*)(CUcontext*, unsigned, CUdevice)>("cuCtxCreate", 3020);
  ASSERT_EQ(create(&context, 0, 0), CUDA_SUCCESS);  // and makes it current
  expect_all_agree();
  ASSERT_EQ(FLASH_MLA_DRIVER(cuCtxDestroy, 4000)(context), CUDA_SUCCESS);
  expect_all_agree();
}

TEST_F(DenseDecodeContexts, Green) {
  constexpr unsigned kVersion = 12040;
  const auto create = FLASH_MLA_DRIVER(cuGreenCtxCreate, kVersion);
  if (create == nullptr) GTEST_SKIP() << "needs a driver with green contexts (12.4)";
  CUdevResource all{}, some{}, rest{};
  ASSERT_EQ(FLASH_MLA_DRIVER(cuDeviceGetDevResource, kVersion)(0, &all, CU_DEV_RESOURCE_TYPE_SM), CUDA_SUCCESS);
  constexpr unsigned kSms = 16;
  unsigned num_groups = 1;
  ASSERT_EQ(FLASH_MLA_DRIVER(cuDevSmResourceSplitByCount, kVersion)(&some, &num_groups, &all, &rest, 0, kSms),
            CUDA_SUCCESS);
  for (CUdevResource* resource : {&some, &rest}) {
    SCOPED_TRACE(std::to_string(resource->sm.smCount) + " SMs");
    CUdevResourceDesc description = nullptr;
    CUgreenCtx green = nullptr;
    CUcontext context = nullptr;
    ASSERT_EQ(FLASH_MLA_DRIVER(cuDevResourceGenerateDesc, kVersion)(&description, resource, 1), CUDA_SUCCESS);
    ASSERT_EQ(create(&green, description, 0, CU_GREEN_CTX_DEFAULT_STREAM), CUDA_SUCCESS);
    ASSERT_EQ(FLASH_MLA_DRIVER(cuCtxFromGreenCtx, kVersion)(&context, green), CUDA_SUCCESS);
    {
      const Current current(context);
      expect_all_agree();
    }
    expect_all_agree();
    ASSERT_EQ(FLASH_MLA_DRIVER(cuGreenCtxDestroy, kVersion)(green), CUDA_SUCCESS);
  }
}

TEST_F(DenseDecodeContexts, AfterAReset) {
  expect_all_agree();
  ASSERT_EQ(cudaDeviceReset(), cudaSuccess);
  expect_all_agree();
}

}  // namespace
}  // namespace flash_mla

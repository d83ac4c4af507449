// Measures what a call of dense_decode costs the host, in C++ on a Hopper GPU, beside what no call can go below: one
// launch of a kernel that does nothing, with parameters and attributes like the decode kernel's.
//
// A burst is shorter than the GPU's queue of launches, and the GPU idle before it, so that no call waits for the GPU.

#include <cuda.h>
#include <cuda_runtime.h>
#include <flash_mla/flash_mla.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <vector>

#include "cuda/launch.h"
#include "cuda/tensor_map.h"
#include "sm90/dense_decode/params.h"

namespace {

using namespace flash_mla;

constexpr int kCalls = 100;
constexpr int kBursts = 200;
constexpr int kThreads = 384;
constexpr std::size_t kSharedBytes = 48 * 1024;  // what every kernel may have
constexpr Device kGpu{DeviceType::kCuda, 0};

__global__ void empty_kernel(const __grid_constant__ sm90::DenseDecodeParams) {}

/// Device memory that lives as long as the process.
void* allocate(std::size_t num_bytes) {
  void* data = nullptr;
  cuda::check(cudaMalloc(&data, num_bytes), "cudaMalloc");
  cuda::check(cudaMemset(data, 0, num_bytes), "cudaMemset");
  return data;
}

template <class... Extents>
Tensor array(DType dtype, Extents... shape) {
  const std::size_t num_bytes = (std::size_t{4} * ... * static_cast<std::size_t>(shape));
  return make_tensor(allocate(num_bytes), dtype, kGpu, shape...);
}

constexpr int kNumHeads = 16;

/// A call so small that the GPU is done before the host: one request of length 0.
DenseDecodeArguments tiny_call() {
  DenseDecodeArguments args;
  args.q = array(DType::kBFloat16, 1, 1, kNumHeads, kHeadDimQk);
  args.k_cache = array(DType::kBFloat16, 1, 64, 1, kHeadDimQk);
  args.block_table = array(DType::kInt32, 1, 1);
  args.cache_seqlens = array(DType::kInt32, 1);
  args.out = array(DType::kBFloat16, 1, 1, kNumHeads, kHeadDimV);
  args.lse = array(DType::kFloat32, 1, kNumHeads, 1);
  return args;
}

void plan(DenseDecodeArguments& args, cudaStream_t stream) {
  const std::int64_t num_parts = dense_decode_num_sm_parts(kNumHeads, 1, kGpu);
  args.tile_scheduler_metadata = array(DType::kInt32, num_parts, kTileSchedulerMetadataSize);
  args.num_splits = array(DType::kInt32, 2);
  plan_dense_decode(args.cache_seqlens, kNumHeads, args.tile_scheduler_metadata, args.num_splits, stream);
}

template <class Call>
void measure(const char* what, const Call& call) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> microseconds;
  for (int burst = 0; burst < kBursts; ++burst) {
    cuda::check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    const Clock::time_point begin = Clock::now();
    for (int i = 0; i < kCalls; ++i) call();
    microseconds.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count() / kCalls);
  }
  cuda::check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  std::sort(microseconds.begin(), microseconds.end());
  std::printf("%-58s %9.3f %10.3f\n", what, microseconds[kBursts / 2], microseconds.front());
}

/// The driver's own launch, of a CUfunction or of a CUkernel.
class DriverLaunch {
 public:
  DriverLaunch(void* kernel, cudaStream_t stream) : kernel_(static_cast<CUfunction>(kernel)) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    cuda::check(cudaGetDriverEntryPointByVersion("cuLaunchKernelEx", &function, 12000, cudaEnableDefault, &result),
                "cudaGetDriverEntryPointByVersion");
    launch_ = reinterpret_cast<decltype(&cuLaunchKernelEx)>(function);
    attribute_.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute_.value.programmaticStreamSerializationAllowed = 1;
    config_.gridDimX = config_.gridDimY = config_.gridDimZ = 1;
    config_.blockDimX = kThreads;
    config_.blockDimY = config_.blockDimZ = 1;
    config_.sharedMemBytes = kSharedBytes;
    config_.hStream = stream;
    config_.attrs = &attribute_;
    config_.numAttrs = 1;
  }
  DriverLaunch(const DriverLaunch&) = delete;
  DriverLaunch& operator=(const DriverLaunch&) = delete;

  void operator()(const sm90::DenseDecodeParams& params) const {
    void* addresses[] = {const_cast<sm90::DenseDecodeParams*>(&params)};
    cuda::check(static_cast<cudaError_t>(launch_(&config_, kernel_, addresses, nullptr)), "cuLaunchKernelEx");
  }

 private:
  decltype(&cuLaunchKernelEx) launch_;
  CUfunction kernel_;
  CUlaunchAttribute attribute_{};
  CUlaunchConfig config_{};
};

void measure_launches(cudaStream_t stream) {
  const sm90::DenseDecodeParams params{};
  measure("bare launch: cudaLaunchKernelExC", [&] {
    const cuda::Launch launch("empty_kernel", dim3(1), dim3(kThreads), kSharedBytes, stream,
                              cuda::Overlap::kWithPrevious);
    launch(empty_kernel, params);
  });
  cudaFunction_t function = nullptr;
  cuda::check(cudaGetFuncBySymbol(&function, reinterpret_cast<const void*>(empty_kernel)), "cudaGetFuncBySymbol");
  const DriverLaunch launch_function(function, stream);
  measure("bare launch: cuLaunchKernelEx of a CUfunction", [&] { launch_function(params); });

  cudaKernel_t kernel = nullptr;
  cuda::check(cudaGetKernel(&kernel, reinterpret_cast<const void*>(empty_kernel)), "cudaGetKernel");
  const DriverLaunch launch_kernel(kernel, stream);
  measure("bare launch: cuLaunchKernelEx of a CUkernel", [&] { launch_kernel(params); });
}

/// Two of them: a call needs as many.
void measure_tensor_maps(const DenseDecodeArguments& args) {
  cuda::TensorMapArguments map{args.k_cache.data,
                               DType::kBFloat16,
                               {kHeadDimQk, 64, 1, 1},
                               {kHeadDimQk, kHeadDimQk, kHeadDimQk},
                               {64, 64, 1, 1}};
  cuda::TensorMap q_map;
  cuda::TensorMap k_cache_map;
  const auto encode_both = [&] {
    q_map.encode(map);
    k_cache_map.encode(map);
  };
  void* const addresses[] = {args.k_cache.data, args.q.data};
  int i = 0;
  measure("two tensor maps: the same again", encode_both);
  measure("two tensor maps: with another address", [&] {
    map.data = addresses[++i % 2];
    encode_both();
  });
  measure("two tensor maps: with another shape", [&] {
    map.shape[3] = 1 + ++i % 2;
    encode_both();
  });
}

void measure_pieces(const DenseDecodeArguments& args, cudaStream_t stream) {
  measure("dense_decode_workspace_size: checks, layout", [&] { dense_decode_workspace_size(args); });
  measure_tensor_maps(args);
  measure("cudaGetDevice", [] {
    int device = 0;
    cudaGetDevice(&device);
  });
  measure("plan_dense_decode", [&] {
    plan_dense_decode(args.cache_seqlens, kNumHeads, args.tile_scheduler_metadata, args.num_splits, stream);
  });
}

void run() {
  cudaStream_t stream = nullptr;
  cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  const DenseDecodeArguments left_out = tiny_call();
  DenseDecodeArguments given = left_out;
  plan(given, stream);
  const std::size_t workspace_bytes = dense_decode_workspace_size(left_out);
  void* const workspace = allocate(workspace_bytes);
  const auto decode = [&](const DenseDecodeArguments& args) {
    return [&, workspace] { dense_decode(args, workspace, workspace_bytes, stream); };
  };

  std::printf("%-58s %9s %10s\n", "host time of a call", "median us", "fastest us");
  measure("dense_decode, plan given", decode(given));
  measure("dense_decode, plan left out", decode(left_out));
  measure_pieces(given, stream);
  measure_launches(stream);
}

}  // namespace

int main() {
  try {
    run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}

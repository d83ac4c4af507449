#include <cuda_runtime_api.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "runtime.h"

namespace server {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

class CudaRuntime : public Runtime {
 public:
  explicit CudaRuntime(int index) : index_(index) {
    check(cudaSetDevice(index), "cudaSetDevice");
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  ~CudaRuntime() override { cudaStreamDestroy(stream_); }
  CudaRuntime(const CudaRuntime&) = delete;
  CudaRuntime& operator=(const CudaRuntime&) = delete;

  flash_mla::Device device() const override { return {flash_mla::DeviceType::kCuda, index_}; }
  CUstream_st* stream() const override { return stream_; }

  std::shared_ptr<void> allocate(std::size_t bytes, int fill) override {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), "cudaMalloc");
    std::shared_ptr<void> owner(memory, cudaFree);
    check(cudaMemsetAsync(memory, fill, bytes, stream_), "cudaMemsetAsync");
    return owner;
  }
  std::shared_ptr<void> allocate_on_host(std::size_t bytes) override {
    void* memory = nullptr;
    check(cudaMallocHost(&memory, bytes), "cudaMallocHost");
    std::shared_ptr<void> owner(memory, cudaFreeHost);
    std::memset(memory, 0, bytes);
    return owner;
  }
  void copy(void* to, const void* from, std::size_t bytes) override {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_), "cudaMemcpyAsync");
  }

  std::function<void()> record(std::function<void()> work) override {
    work();  // once as it is: what loads or sets up on first use does so outside of the capture
    synchronize();
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    work();
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture");
    cudaGraphExec_t executable = nullptr;
    check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    const std::shared_ptr<CUgraphExec_st> owner(executable, cudaGraphExecDestroy);
    return [this, owner] { check(cudaGraphLaunch(owner.get(), stream_), "cudaGraphLaunch"); };
  }
  void synchronize() override { check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  int index_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace

std::unique_ptr<Runtime> make_cuda_runtime() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return nullptr;
  for (int i = 0; i < count; ++i) {
    int major = 0;
    int minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i), "cudaDeviceGetAttribute");
    if (major == 9 && minor == 0) return std::make_unique<CudaRuntime>(i);
  }
  return nullptr;
}

}  // namespace server

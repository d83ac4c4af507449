#include "runtime.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace server {
namespace {

/// Everything happens at once, in memory of the host.
class CpuRuntime : public Runtime {
 public:
  flash_mla::Device device() const override { return {flash_mla::DeviceType::kCpu, 0}; }
  CUstream_st* stream() const override { return nullptr; }
  std::shared_ptr<void> allocate(std::size_t bytes, int fill) override {
    std::shared_ptr<void> memory(std::malloc(bytes), std::free);
    if (memory == nullptr) throw std::bad_alloc();
    std::memset(memory.get(), fill, bytes);
    return memory;
  }
  std::shared_ptr<void> allocate_on_host(std::size_t bytes) override { return allocate(bytes, 0); }
  void copy(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  std::function<void()> record(std::function<void()> work) override { return work; }
  void synchronize() override {}
};

}  // namespace

std::unique_ptr<Runtime> make_cpu_runtime() { return std::make_unique<CpuRuntime>(); }

#ifndef CPP_SERVER_CUDA
std::unique_ptr<Runtime> make_cuda_runtime() { return nullptr; }
#endif

}  // namespace server

#pragma once

#include <cstddef>
#include <functional>
#include <memory>

#include "flash_mla/flash_mla.h"

namespace server {

/// The device that decodes, its memory, and the order of its work.
class Runtime {
 public:
  virtual ~Runtime() = default;

  virtual flash_mla::Device device() const = 0;
  virtual CUstream_st* stream() const = 0;

  /// Memory of the device, every byte of it `fill`.
  virtual std::shared_ptr<void> allocate(std::size_t bytes, int fill) = 0;
  /// Memory of the host, zeroed, that copies in the stream may read and write.
  virtual std::shared_ptr<void> allocate_on_host(std::size_t bytes) = 0;
  /// Copies in the order of the stream. Other memory of the host may be read as well, and reused when this returns.
  virtual void copy(void* to, const void* from, std::size_t bytes) = 0;
  /// What `work` enqueues, to be launched again and again: a CUDA graph, or on the CPU `work` itself.
  virtual std::function<void()> record(std::function<void()> work) = 0;
  /// Waits for all that was enqueued.
  virtual void synchronize() = 0;
};

/// The first Hopper GPU, or null where there is none.
std::unique_ptr<Runtime> make_cuda_runtime();

std::unique_ptr<Runtime> make_cpu_runtime();

}  // namespace server

#include "sm90/ceilings/ceilings.h"

#include <limits>
#include <string>

#include "cuda/device.h"
#include "flash_mla/error.h"
#include "sm90/ceilings/launch.h"

namespace flash_mla::sm90 {
namespace {

constexpr std::int64_t kHalfBytes = 2;
constexpr std::uintptr_t kAlignment = 16;

[[noreturn]] void refuse(const char* name, const std::string& expected, const std::string& got) {
  throw InvalidArgument(std::string(name) + ": expected " + expected + ", got " + got);
}

/// A contiguous vector on a CUDA device, with at least `min_size` elements.
void check_vector(const char* name, const Tensor& t, std::int64_t min_size) {
  if (t.device.type != DeviceType::kCuda) refuse(name, "a CUDA device", "the CPU");
  if (t.rank != 1) refuse(name, "1 dimension", std::to_string(t.rank));
  if (t.shape[0] < min_size)
    refuse(name, "at least " + std::to_string(min_size) + " values", std::to_string(t.shape[0]));
  if (t.strides[0] != 1) refuse(name, "stride 1", std::to_string(t.strides[0]));
  if (reinterpret_cast<std::uintptr_t>(t.data) % kAlignment != 0) refuse(name, "16-byte alignment", "another");
}

void check_dtype(const char* name, const Tensor& t, DType expected) {
  if (t.dtype != expected) {
    throw InvalidType(std::string(name) + ": expected dtype " + dtype_name(expected) + ", got " + dtype_name(t.dtype));
  }
}

}  // namespace

std::int64_t launch_hbm_read(const Tensor& buffer, CUstream_st* stream) {
  if (buffer.dtype != DType::kFloat16) check_dtype("buffer", buffer, DType::kBFloat16);
  check_vector("buffer", buffer, kHbmPieceBytes / kHalfBytes);
  const int device = buffer.device.index;
  cuda::require_hopper(device);
  const cuda::DeviceGuard guard(device);
  const std::int64_t num_bytes = buffer.shape[0] * kHalfBytes / kHbmPieceBytes * kHbmPieceBytes;
  launch_hbm_read_kernel(buffer.data, num_bytes, cuda::device_properties(device).num_sms, stream);
  return num_bytes;
}

double launch_mma_mix(const Tensor& operands, const Tensor& sink, std::int64_t iterations, CUstream_st* stream) {
  check_dtype("operands", operands, DType::kBFloat16);
  check_vector("operands", operands, kMmaMixOperandBytes / kHalfBytes);
  check_dtype("sink", sink, DType::kFloat32);
  check_vector("sink", sink, 1);
  if (sink.device != operands.device) {
    refuse("sink", "device cuda:" + std::to_string(operands.device.index) + " as operands",
           "cuda:" + std::to_string(sink.device.index));
  }
  if (iterations < 1 || iterations > std::numeric_limits<int>::max()) {
    refuse("iterations", "1 to " + std::to_string(std::numeric_limits<int>::max()), std::to_string(iterations));
  }
  const int device = operands.device.index;
  cuda::require_hopper(device);
  const cuda::DeviceGuard guard(device);
  const int num_sms = cuda::device_properties(device).num_sms;
  check_vector("sink", sink, num_sms);
  launch_mma_mix_kernel(operands.data, static_cast<float*>(sink.data), static_cast<int>(iterations), num_sms, stream);
  return kMmaMixFlops * static_cast<double>(iterations) * num_sms;
}

}  // namespace flash_mla::sm90

#include "api/argument.h"

#include <cstdio>

#include "flash_mla/error.h"

namespace flash_mla::checks {
namespace {

std::string to_string(const std::array<std::int64_t, kMaxRank>& values, int rank) {
  std::string text = "(";
  for (int i = 0; i < rank; ++i) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
  return text + (rank == 1 ? ",)" : ")");
}

std::string to_string(Extents extents) {
  std::string text = "(";
  for (const Extent* e = extents.begin(); e != extents.end(); ++e) {
    text += (e != extents.begin() ? ", " : "") + (e->name != nullptr ? std::string(e->name) : std::to_string(e->value));
  }
  return text + (extents.size() == 1 ? ",)" : ")");
}

std::string to_string(Device device) {
  return device.type == DeviceType::kCpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

std::string to_string(const void* address) {
  char text[32];
  std::snprintf(text, sizeof(text), "%p", address);
  return text;
}

}  // namespace

std::string name_of(Argument arg) {
  return arg.index < 0 ? arg.name : std::string(arg.name) + "[" + std::to_string(arg.index) + "]";
}

std::string strides_of(Argument arg) { return to_string(arg.tensor.strides, arg.tensor.rank); }

void fail(const std::string& name, const std::string& expected, const std::string& got) {
  throw InvalidArgument(name + ": expected " + expected + ", got " + got);
}

void fail(Argument arg, const std::string& expected, const std::string& got) { fail(name_of(arg), expected, got); }

void check_rank(Argument arg, int rank) {
  if (rank < 0 || rank > kMaxRank) fail(arg, "rank 0 to " + std::to_string(kMaxRank), std::to_string(rank));
}

void fail_strides(Argument arg, const std::string& expected) { fail(arg, expected, "strides " + strides_of(arg)); }

void fail_dtype(Argument arg, const std::string& expected) {
  throw InvalidType(name_of(arg) + ": expected dtype " + expected + ", got " + dtype_name(arg.tensor.dtype));
}

void fail_shape(Argument arg, Extents expected) {
  check_rank(arg, arg.tensor.rank);
  fail(arg, "shape " + to_string(expected), to_string(arg.tensor.shape, arg.tensor.rank));
}

void fail_device(Argument arg, Device expected, const char* owner) {
  fail(arg, "device " + to_string(expected) + " as " + owner, to_string(arg.tensor.device));
}

void fail_address(Argument arg, std::int64_t alignment) {
  if (arg.tensor.data == nullptr) fail(arg, "data", "a null pointer");
  fail(arg, "an address that is a multiple of " + std::to_string(alignment), to_string(arg.tensor.data));
}

void fail_apart(const Span& output, const Span& other) {
  fail(output.arg, "memory apart from " + name_of(other.arg),
       "bytes " + to_string(reinterpret_cast<const void*>(output.begin)) + " to " +
           to_string(reinterpret_cast<const void*>(output.end)) + " that overlap it");
}

void check_strides(Argument arg) {
  const Tensor& t = arg.tensor;
  std::int64_t room = kMaxElementOffset;
  for (int i = 0; i < t.rank; ++i) {
    if (t.shape[i] <= 1) continue;
    if (t.strides[i] < 0) fail(arg, "strides of at least 0", strides_of(arg));
    std::int64_t span = 0;
    if (__builtin_mul_overflow(t.shape[i] - 1, t.strides[i], &span) || span > room) {
      fail_strides(arg, "fewer than 2^56 elements from its first to its last");
    }
    room -= span;
  }
}

void check_no_self_overlap(Argument arg) {
  const Tensor& t = arg.tensor;
  if (is_contiguous(t)) return;
  std::array<int, kMaxRank> order{};
  for (int i = 0; i < t.rank; ++i) order[i] = i;
  for (int i = 0; i < t.rank; ++i) {
    for (int j = i + 1; j < t.rank; ++j) {
      if (t.strides[order[j]] < t.strides[order[i]]) std::swap(order[i], order[j]);
    }
  }
  std::int64_t span = 1;
  for (int i = 0; i < t.rank; ++i) {
    const int dim = order[i];
    if (t.shape[dim] <= 1) continue;
    if (t.strides[dim] < span) {
      fail(arg, "strides that keep its elements apart",
           "strides " + strides_of(arg) + " for shape " + to_string(t.shape, t.rank));
    }
    span += (t.shape[dim] - 1) * t.strides[dim];
  }
}

void check_vector_strides(Argument arg) {
  const Tensor& t = arg.tensor;
  const std::int64_t elements = element_size(t.dtype) == 2 ? kVectorBytes / 2 : kVectorBytes / 4;
  for (int i = 0; i + 1 < t.rank; ++i) {
    if (t.shape[i] > 1 && !is_multiple(static_cast<std::uint64_t>(t.strides[i]), elements)) {
      fail(arg, "strides that are multiples of " + std::to_string(elements) + " elements, but for the last",
           strides_of(arg));
    }
  }
}

}  // namespace flash_mla::checks

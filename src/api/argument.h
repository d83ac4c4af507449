#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <utility>

#include "flash_mla/tensor.h"

// Checks of one argument, which every operation puts together. They throw InvalidArgument or InvalidType with the
// argument's name, what it takes and what it got. Inline where each call passes, out of line where errors are made.

namespace flash_mla::checks {

constexpr std::int64_t kMaxInt32 = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kVectorBytes = 16;  // alignment of bulk copies and vector loads on the GPU
// No tensor spans more elements than this, so that byte offsets fit into int64.
constexpr std::int64_t kMaxElementOffset = std::int64_t{1} << 56;

/// An argument and the name that its errors carry: "outs[3]", where it is one of a list.
struct Argument {
  const char* name;
  const Tensor& tensor;
  std::int64_t index = -1;
};

/// One extent of an expected shape: a number, or a name where any number will do.
struct Extent {
  Extent(const char* any) : name(any), value(-1) {}            // NOLINT(google-explicit-constructor)
  Extent(std::int64_t exact) : name(nullptr), value(exact) {}  // NOLINT(google-explicit-constructor)
  const char* name;
  std::int64_t value;
};
using Extents = std::initializer_list<Extent>;

std::string name_of(Argument arg);
std::string strides_of(Argument arg);
[[noreturn]] void fail(const std::string& name, const std::string& expected, const std::string& got);
[[noreturn]] void fail(Argument arg, const std::string& expected, const std::string& got);
/// A rank that a Tensor has room for. fail_shape asks, so that check_shape lets no other pass.
void check_rank(Argument arg, int rank);
[[noreturn]] void fail_strides(Argument arg, const std::string& expected);

/// `expected` follows "expected dtype " in the message.
[[noreturn]] void fail_dtype(Argument arg, const std::string& expected);
[[noreturn]] void fail_shape(Argument arg, Extents expected);
[[noreturn]] void fail_device(Argument arg, Device expected, const char* owner);
[[noreturn]] void fail_address(Argument arg, std::int64_t alignment);

/// Divisions are most of what a check costs; these divisors are powers of two.
inline bool is_multiple(std::uint64_t value, std::int64_t power_of_two) {
  return (value & static_cast<std::uint64_t>(power_of_two - 1)) == 0;
}

inline bool is_empty(const Tensor& t) {
  for (int i = 0; i < t.rank; ++i) {
    if (t.shape[i] == 0) return true;
  }
  return false;
}

inline bool is_contiguous(const Tensor& t) {
  std::int64_t stride = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    if (t.shape[i] > 1 && t.strides[i] != stride) return false;
    if (i > 0) stride *= t.shape[i];
  }
  return true;
}

inline std::int64_t element_size(DType dtype) { return static_cast<std::int64_t>(dtype_size(dtype)); }

inline void check_shape(Argument arg, Extents expected) {
  const Tensor& t = arg.tensor;
  bool matches = t.rank == static_cast<int>(expected.size());
  for (int i = 0; matches && i < t.rank; ++i) {
    const Extent& extent = expected.begin()[i];
    matches = extent.name != nullptr ? t.shape[i] >= 0 : t.shape[i] == extent.value;
  }
  if (!matches) fail_shape(arg, expected);
}

/// `why` follows the dtype in the message.
inline void check_dtype(Argument arg, DType expected, const char* why = "") {
  if (arg.tensor.dtype != expected) fail_dtype(arg, dtype_name(expected) + std::string(why));
}

inline void check_device(Argument arg, Device expected, const char* owner) {
  if (arg.tensor.device != expected) fail_device(arg, expected, owner);
}

inline void check_range(Argument arg, const char* what, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value >= low && value <= high) return;
  fail(arg, std::string(what) + " from " + std::to_string(low) + " to " + std::to_string(high), std::to_string(value));
}

/// Strides that never run backwards nor beyond what can be addressed.
void check_strides(Argument arg);

/// An output's elements must not share memory: taken from the smallest stride up, each dimension steps over all that
/// the dimensions before it span.
void check_no_self_overlap(Argument arg);

/// Strides that vector loads on the GPU can take.
void check_vector_strides(Argument arg);

inline void check_last_dim_contiguous(Argument arg) {
  const int last = arg.tensor.rank - 1;
  if (arg.tensor.shape[last] > 1 && arg.tensor.strides[last] != 1) {
    fail_strides(arg, "a contiguous last dimension (stride 1)");
  }
}

inline void check_contiguous(Argument arg) {
  if (!is_contiguous(arg.tensor)) fail_strides(arg, "a contiguous array");
}

/// A tensor that the kernels read or write in vectors: rows of one head's values.
inline void check_rows(Argument arg) {
  if (is_empty(arg.tensor)) return;
  check_strides(arg);
  check_last_dim_contiguous(arg);
  if (arg.tensor.device.type == DeviceType::kCuda) check_vector_strides(arg);
}

inline void check_address_of_data(Argument arg, std::int64_t alignment) {
  if (arg.tensor.data == nullptr || !is_multiple(reinterpret_cast<std::uintptr_t>(arg.tensor.data), alignment)) {
    fail_address(arg, alignment);
  }
}

/// A tensor without elements may have any address.
inline void check_address(Argument arg, std::int64_t alignment) {
  if (!is_empty(arg.tensor)) check_address_of_data(arg, alignment);
}

/// What the address of a tensor of rows must be a multiple of.
inline std::int64_t row_alignment(const Tensor& t) {
  return t.device.type == DeviceType::kCuda ? kVectorBytes : element_size(t.dtype);
}

/// Bytes from a tensor's first element to its last, both included; strides are not negative. 0 where it has none, or is
/// left out.
inline std::int64_t num_bytes(const Tensor& t) {
  if (!t || is_empty(t)) return 0;
  std::int64_t last = 0;
  for (int i = 0; i < t.rank; ++i) last += t.shape[i] > 1 ? (t.shape[i] - 1) * t.strides[i] : 0;
  return (last + 1) * element_size(t.dtype);
}

/// The memory between a tensor's first and last element; nothing where it has no elements.
struct Span {
  explicit Span(Argument argument) : Span(argument, num_bytes(argument.tensor)) {}
  Span(Argument argument, std::int64_t bytes)
      : arg(argument),
        begin(bytes > 0 ? reinterpret_cast<std::uintptr_t>(argument.tensor.data) : 0),
        end(begin + static_cast<std::uintptr_t>(bytes)) {}
  Argument arg;
  std::uintptr_t begin;
  std::uintptr_t end;
};

[[noreturn]] void fail_apart(const Span& output, const Span& other);

/// An output's memory holds nothing of another argument.
inline void check_apart(const Span& output, const Span& other) {
  if (output.begin < other.end && other.begin < output.end) fail_apart(output, other);
}

}  // namespace flash_mla::checks

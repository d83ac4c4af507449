#pragma once

#include <cstddef>
#include <cstdint>

// The part of XLA's FFI C ABI (major version 0) that our handlers read. XLA declares it in xla/ffi/api/c_api.h, where
// fields are only ever added behind the ones that are there as long as the major version stays; a test compares the
// layouts with those of the jaxlib that is installed.

namespace flash_mla::bindings::xla_ffi {

constexpr int kMajorVersion = 0;
constexpr int kOldestMinorVersion = 1;

enum ExtensionType : int { kMetadataExtension = 1 };
enum BufferKind : int { kBuffer = 1 };
enum AttributeKind : int { kScalar = 3 };
enum Stage : int { kExecute = 3 };

/// The handler launches the same work each time it is called, so that XLA may capture it in a CUDA graph.
constexpr std::uint32_t kCommandBufferCompatible = 1;

enum class ErrorCode : int { kInvalidArgument = 3, kUnimplemented = 12, kInternal = 13 };

enum class DataType : int {
  kBool = 1,
  kInt8 = 2,
  kInt16 = 3,
  kInt32 = 4,
  kInt64 = 5,
  kUInt8 = 6,
  kUInt16 = 7,
  kUInt32 = 8,
  kUInt64 = 9,
  kFloat16 = 10,
  kFloat32 = 11,
  kFloat64 = 12,
  kBFloat16 = 16,
};

struct Context;  // of one execution
struct Error;    // made by Api::create_error, destroyed by XLA

struct Extension {
  std::size_t struct_size;
  ExtensionType type;
  Extension* next;
};

struct Version {
  std::size_t struct_size;
  Extension* extensions;
  int major;
  int minor;
};

/// What a handler says about itself when it is registered.
struct Metadata {
  std::size_t struct_size;
  Version version;
  std::uint32_t traits;
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

struct CreateErrorArgs {
  std::size_t struct_size;
  Extension* extensions;
  const char* message;
  ErrorCode code;
};

struct GetStreamArgs {
  std::size_t struct_size;
  Extension* extensions;
  Context* context;
  void* stream;  ///< out: a cudaStream_t
};

struct GetDeviceOrdinalArgs {
  std::size_t struct_size;
  Extension* extensions;
  Context* context;
  std::int32_t ordinal;  ///< out
};

/// XLA's functions. Those that return an error return null where all is well.
struct Api {
  std::size_t struct_size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*create_error)(CreateErrorArgs* args);
  void (*unused_1[3])();
  Error* (*get_stream)(GetStreamArgs* args);
  void (*unused_2[12])();
  Error* (*get_device_ordinal)(GetDeviceOrdinalArgs* args);  ///< since jaxlib 0.6
};

/// Row-major.
struct Buffer {
  std::size_t struct_size;
  Extension* extensions;
  DataType dtype;
  void* data;
  std::int64_t rank;
  std::int64_t* shape;
};

/// Arguments, and results.
struct Buffers {
  std::size_t struct_size;
  Extension* extensions;
  std::int64_t size;
  BufferKind* kinds;
  void** buffers;
};

struct Name {
  const char* data;
  std::size_t size;
};

struct Scalar {
  DataType dtype;
  void* value;
};

/// Sorted by name.
struct Attributes {
  std::size_t struct_size;
  Extension* extensions;
  std::int64_t size;
  AttributeKind* kinds;
  Name** names;
  void** values;
};

/// What a handler is called with.
struct CallFrame {
  std::size_t struct_size;
  Extension* extensions;
  const Api* api;
  Context* context;
  Stage stage;
  Buffers arguments;
  Buffers results;
  Attributes attributes;
};

}  // namespace flash_mla::bindings::xla_ffi

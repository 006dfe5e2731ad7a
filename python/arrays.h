#pragma once

// Arrays as the library's arguments: what a raw pointer cannot carry is checked here.

#include <binconv/binconv.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace binconv::python {

namespace nb = nanobind;

inline constexpr int64_t kPackedAlignment = 16;

inline constexpr std::initializer_list<DataType> kFloatTypes = {
    DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16};
inline constexpr std::initializer_list<DataType> kValueTypes = {
    DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16, DataType::kInt8};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(Status::kInvalidArgument, message.str());
}

// The CPU, or a CUDA device.
struct Device {
  std::optional<int> cuda;

  bool operator==(const Device& other) const { return cuda == other.cuda; }
  std::string str() const { return cuda ? "cuda:" + std::to_string(*cuda) : "cpu"; }
};

// A C-contiguous array in memory that is not copied.
struct Array {
  const char* name;
  void* data = nullptr;
  DataType type = DataType::kFloat32;
  Device device;
  std::vector<int64_t> shape;
  nb::ndarray<nb::ro> import;  // Keeps memory that came through DLPack alive during the call.

  void expect_shape(const std::vector<int64_t>& expected) const;
  void expect_rank(size_t rank) const;
  void expect_type(DataType expected) const { expect_type({expected}); }
  void expect_type(std::initializer_list<DataType> expected) const;
  void expect_packed(const std::vector<int64_t>& expected) const;  // uint8, this shape, aligned.
  void expect_aligned(int64_t alignment) const;
  void expect_channels(int64_t channels) const;  // float32, one dimension of this size.
  void expect_bytes(int64_t bytes) const;        // uint8, one dimension, aligned, at least so long.
};

const char* type_name(DataType type);

// The first dimension, from behind, whose stride is not that of a C-contiguous array; and that one.
struct Gap {
  size_t dimension;
  int64_t stride;
};
std::optional<Gap> find_gap(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides);

// Throws unless the strides are those of a C-contiguous array, and the address is aligned.
Array dense_array(const char* name, void* data, DataType type, Device device,
                  const std::vector<int64_t>& shape, const std::vector<int64_t>& strides);

[[noreturn]] void throw_type_error(const char* name, nb::handle object, const char* expected);

// Through DLPack. Throws TypeError for what is no array, ValueError for one that cannot be taken.
Array read(const char* name, nb::handle object);
Array write(const char* name, nb::handle object);

// Nothing for None.
std::optional<Array> read_optional(const char* name, nb::handle object);
std::optional<Array> write_optional(const char* name, nb::handle object);

// uint8 or bool, or nothing for None.
std::optional<Array> read_flags(const char* name, nb::handle object);

// Where a call runs: a stream for arrays on a GPU, else a number of threads; a kernel, if forced.
struct Place {
  std::optional<uintptr_t> stream;
  std::optional<int> threads;
  const char* kernel = nullptr;
};

// The queue for a call on `first` and `others`, which must share its device.
Queue queue_for(const Array& first, std::initializer_list<const Array*> others, const Place& place);
Queue queue_for(const Device& device, std::optional<int> threads, const char* kernel = nullptr);

}  // namespace binconv::python

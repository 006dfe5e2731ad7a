#include "arrays.h"

#include <algorithm>
#include <thread>

namespace binconv::python {
namespace {

struct NamedType {
  DataType type;
  nb::dlpack::dtype_code code;
  int bits;
  const char* name;
};

constexpr NamedType kTypes[] = {
    {DataType::kFloat32, nb::dlpack::dtype_code::Float, 32, "float32"},
    {DataType::kFloat16, nb::dlpack::dtype_code::Float, 16, "float16"},
    {DataType::kBFloat16, nb::dlpack::dtype_code::Bfloat, 16, "bfloat16"},
    {DataType::kInt8, nb::dlpack::dtype_code::Int, 8, "int8"},
    {DataType::kInt32, nb::dlpack::dtype_code::Int, 32, "int32"},
    {DataType::kBits, nb::dlpack::dtype_code::UInt, 8, "uint8"},
};

const NamedType& entry_of(DataType type) {
  return *std::find_if(std::begin(kTypes), std::end(kTypes),
                       [&](const NamedType& t) { return t.type == type; });
}

std::optional<DataType> known_type(nb::dlpack::dtype dtype) {
  for (const NamedType& known : kTypes) {
    if (dtype.code == static_cast<uint8_t>(known.code) && dtype.bits == known.bits &&
        dtype.lanes == 1) {
      return known.type;
    }
  }
  return std::nullopt;
}

bool is_bool(nb::dlpack::dtype dtype) {
  return dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bool) && dtype.bits == 8 &&
         dtype.lanes == 1;
}

std::string name_of(nb::dlpack::dtype dtype) {
  if (is_bool(dtype)) return "bool";
  const char* const kinds[] = {"int", "uint", "float", nullptr, "bfloat", "complex"};
  const std::string bits = std::to_string(dtype.bits);
  if (dtype.code < std::size(kinds) && kinds[dtype.code] && dtype.lanes == 1)
    return kinds[dtype.code] + bits;
  return "a dtype of DLPack code " + std::to_string(dtype.code) + " with " + bits + " bits";
}

DataType type_of(const char* name, nb::dlpack::dtype dtype) {
  if (const auto type = known_type(dtype)) return *type;
  fail(name, ": got ", name_of(dtype),
       ", expected float32, float16, bfloat16, int8, int32 or uint8");
}

// One byte per flag; zero is false.
DataType flag_type_of(const char* name, nb::dlpack::dtype dtype) {
  if (is_bool(dtype) || known_type(dtype) == DataType::kBits) return DataType::kBits;
  fail(name, ": got ", name_of(dtype), ", expected uint8 or bool");
}

Device device_of(const char* name, int kind, int ordinal) {
  if (kind == nb::device::cpu::value || kind == nb::device::cuda_host::value) return {};
  if (kind == nb::device::cuda::value || kind == nb::device::cuda_managed::value) return {ordinal};
  fail(name, ": got an array on a device of DLPack type ", kind, ", expected the CPU or CUDA");
}

std::string shape_string(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (int64_t size : shape) text += std::to_string(size) + (shape.size() == 1 ? "," : ", ");
  if (shape.size() > 1) text.resize(text.size() - 2);
  return text + ")";
}

int all_cores() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

template <class Import>
Array import_array(const char* name, nb::handle object, const char* expected,
                   DataType (*type)(const char*, nb::dlpack::dtype) = type_of) {
  Import import;
  if (!nb::try_cast(object, import, /*convert=*/false)) {
    nb::ndarray<nb::ro> array;
    if (nb::try_cast(object, array, /*convert=*/false)) {
      fail(name, ": got a read-only array, expected ", expected);
    }
    throw_type_error(name, object, expected);
  }
  std::vector<int64_t> shape, strides;
  for (size_t i = 0; i < import.ndim(); ++i) {
    shape.push_back(static_cast<int64_t>(import.shape(i)));
    strides.push_back(import.stride(i));
  }
  Array array = dense_array(
      name, const_cast<void*>(static_cast<const void*>(import.data())), type(name, import.dtype()),
      device_of(name, import.device_type(), import.device_id()), shape, strides);
  array.import = nb::ndarray<nb::ro>(import);
  return array;
}

}  // namespace

const char* type_name(DataType type) { return entry_of(type).name; }

void throw_type_error(const char* name, nb::handle object, const char* expected) {
  const nb::str type(object.type().attr("__name__"));
  throw nb::type_error(
      (std::string(name) + ": got " + type.c_str() + ", expected " + expected).c_str());
}

void Array::expect_shape(const std::vector<int64_t>& expected) const {
  if (shape != expected)
    fail(name, ": got shape ", shape_string(shape), ", expected ", shape_string(expected));
}

void Array::expect_rank(size_t rank) const {
  if (shape.size() != rank)
    fail(name, ": got shape ", shape_string(shape), ", expected ", rank, " dimensions");
}

void Array::expect_type(std::initializer_list<DataType> expected) const {
  if (std::find(expected.begin(), expected.end(), type) != expected.end()) return;
  std::string names;
  for (DataType choice : expected)
    names += (names.empty() ? "" : ", ") + std::string(type_name(choice));
  fail(name, ": got ", type_name(type), ", expected ", expected.size() > 1 ? "one of " : "", names);
}

void Array::expect_packed(const std::vector<int64_t>& expected) const {
  expect_type(DataType::kBits);
  expect_shape(expected);
  expect_aligned(kPackedAlignment);
}

void Array::expect_bytes(int64_t bytes) const {
  expect_type(DataType::kBits);
  expect_rank(1);
  expect_aligned(kPackedAlignment);
  if (shape[0] < bytes) fail(name, ": got ", shape[0], " bytes, expected at least ", bytes);
}

void Array::expect_channels(int64_t channels) const {
  expect_type(DataType::kFloat32);
  expect_shape({channels});
}

void Array::expect_aligned(int64_t alignment) const {
  if (reinterpret_cast<uintptr_t>(data) % alignment == 0) return;
  fail(name, ": got address ", data, ", expected a multiple of ", alignment, " bytes");
}

std::optional<Gap> find_gap(const std::vector<int64_t>& shape,
                            const std::vector<int64_t>& strides) {
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return std::nullopt;
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    if (shape[i] > 1 && strides[i] != stride) return Gap{i, stride};
    stride *= shape[i];
  }
  return std::nullopt;
}

Array dense_array(const char* name, void* data, DataType type, Device device,
                  const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  if (const auto gap = find_gap(shape, strides)) {
    fail(name, ": got stride ", strides[gap->dimension], " in dimension ", gap->dimension,
         ", expected ", gap->stride, " (a C-contiguous array)");
  }
  Array array = {name, data, type, device, shape, {}};
  array.expect_aligned(entry_of(type).bits / 8);
  return array;
}

Array read(const char* name, nb::handle object) {
  return import_array<nb::ndarray<nb::ro>>(name, object, "an array that DLPack can export");
}

Array write(const char* name, nb::handle object) {
  return import_array<nb::ndarray<>>(name, object, "a writable array that DLPack can export");
}

std::optional<Array> read_optional(const char* name, nb::handle object) {
  if (object.is_none()) return std::nullopt;
  return read(name, object);
}

std::optional<Array> write_optional(const char* name, nb::handle object) {
  if (object.is_none()) return std::nullopt;
  return write(name, object);
}

std::optional<Array> read_flags(const char* name, nb::handle object) {
  if (object.is_none()) return std::nullopt;
  return import_array<nb::ndarray<nb::ro>>(name, object, "an array that DLPack can export",
                                           flag_type_of);
}

Queue queue_for(const Array& first, std::initializer_list<const Array*> others,
                const Place& place) {
  for (const Array* other : others) {
    if (other && !(other->device == first.device)) {
      fail(other->name, ": got an array on ", other->device.str(), ", expected ",
           first.device.str(), " as for ", first.name);
    }
  }
  const auto& [stream, threads, kernel] = place;
  if (!first.device.cuda) {
    if (stream) fail("stream: got ", *stream, " for arrays on the CPU, expected None");
    return queue_for(first.device, threads, kernel);
  }
  if (threads)
    fail("threads: got ", *threads, " for arrays on ", first.device.str(), ", expected None");
  if (!stream) {
    fail("stream: got None for arrays on ", first.device.str(),
         ", expected the CUDA stream as an int");
  }
  return Queue::cuda(reinterpret_cast<CUstream_st*>(*stream), *first.device.cuda)
      .with_kernel(kernel);
}

Queue queue_for(const Device& device, std::optional<int> threads, const char* kernel) {
  if (device.cuda) return Queue::cuda(nullptr, *device.cuda).with_kernel(kernel);
  return Queue::cpu(threads ? *threads : all_cores()).with_kernel(kernel);
}

}  // namespace binconv::python

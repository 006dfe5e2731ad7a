#include "tensor.h"

#include <dlfcn.h>

#include <algorithm>
#include <string>

namespace binconv::python {
namespace {

using Failure = int32_t;  // 0 for none.
using LibraryHandle = class TorchLibraryOpaque*;

// The version of the interface that is declared here, 2.10.
constexpr uint64_t kInterfaceVersion = uint64_t{2} << 56 | uint64_t{10} << 48;

// The functions of the interface that are needed: result, name, parameters.
#define BINCONV_TORCH_FUNCTIONS(FUNCTION)                                                    \
  FUNCTION(Failure, aoti_torch_delete_tensor_object, (TensorHandle))                         \
  FUNCTION(Failure, aoti_torch_new_tensor_handle, (TensorHandle, TensorHandle*))             \
  FUNCTION(Failure, aoti_torch_get_dim, (TensorHandle, int64_t*))                            \
  FUNCTION(Failure, aoti_torch_get_sizes, (TensorHandle, int64_t**))                         \
  FUNCTION(Failure, aoti_torch_get_strides, (TensorHandle, int64_t**))                       \
  FUNCTION(Failure, aoti_torch_get_dtype, (TensorHandle, int32_t*))                          \
  FUNCTION(Failure, aoti_torch_get_device_type, (TensorHandle, int32_t*))                    \
  FUNCTION(Failure, aoti_torch_get_device_index, (TensorHandle, int32_t*))                   \
  FUNCTION(Failure, aoti_torch_get_data_ptr, (TensorHandle, void**))                         \
  FUNCTION(Failure, aoti_torch_empty_strided,                                                \
           (int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype, \
            int32_t device_type, int32_t device_index, TensorHandle*))                       \
  FUNCTION(Failure, torch_list_size, (ListHandle, size_t*))                                  \
  FUNCTION(Failure, torch_list_get_item, (ListHandle, size_t index, StableIValue*))          \
  FUNCTION(Failure, torch_delete_list, (ListHandle))                                         \
  FUNCTION(Failure, torch_new_list_reserve_size, (size_t size, ListHandle*))                 \
  FUNCTION(Failure, torch_list_push_back, (ListHandle, StableIValue))                        \
  FUNCTION(Failure, torch_new_string_handle, (const char*, size_t length, StringHandle*))    \
  FUNCTION(Failure, torch_call_dispatcher,                                                   \
           (const char* name, const char* overload, StableIValue* stack, uint64_t version))  \
  FUNCTION(Failure, torch_get_num_threads, (uint32_t*))                                      \
  FUNCTION(bool, aoti_torch_grad_mode_is_enabled, ())                                        \
  FUNCTION(Failure, aoti_torch_library_init_impl,                                            \
           (const char* library, const char* dispatch_key, const char* file, uint32_t line,  \
            LibraryHandle*))                                                                 \
  FUNCTION(Failure, torch_library_impl,                                                      \
           (LibraryHandle, const char* name, BoxedKernel, uint64_t version))                 \
  FUNCTION(int32_t, aoti_torch_dtype_float32, ())                                            \
  FUNCTION(int32_t, aoti_torch_dtype_float16, ())                                            \
  FUNCTION(int32_t, aoti_torch_dtype_bfloat16, ())                                           \
  FUNCTION(int32_t, aoti_torch_dtype_int8, ())                                               \
  FUNCTION(int32_t, aoti_torch_dtype_int32, ())                                              \
  FUNCTION(int32_t, aoti_torch_dtype_uint8, ())                                              \
  FUNCTION(int32_t, aoti_torch_dtype_float64, ())                                            \
  FUNCTION(int32_t, aoti_torch_dtype_int64, ())                                              \
  FUNCTION(int32_t, aoti_torch_dtype_int16, ())                                              \
  FUNCTION(int32_t, aoti_torch_dtype_bool, ())                                               \
  FUNCTION(int32_t, aoti_torch_device_type_cpu, ())                                          \
  FUNCTION(int32_t, aoti_torch_device_type_cuda, ())                                         \
  FUNCTION(int32_t, aoti_torch_memory_format_contiguous_format, ())                          \
  FUNCTION(int32_t, aoti_torch_memory_format_channels_last, ())

struct Interface {
#define FUNCTION(result, name, parameters) result(*name) parameters;
  BINCONV_TORCH_FUNCTIONS(FUNCTION)
#undef FUNCTION
  Failure (*aoti_torch_get_current_cuda_stream)(int32_t device, void**);  // Null without CUDA.
  const char* (*torch_exception_get_what_without_backtrace)();            // Null before 2.13.
};

Interface torch;
LibraryHandle libraries[2];  // Of kernels on the CPU and on CUDA; they are never unregistered.

template <class Function>
bool find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

bool find_functions() {
  void* const library = dlopen("libtorch.so", RTLD_NOW | RTLD_NOLOAD);
  if (!library) return false;
  find(library, "aoti_torch_get_current_cuda_stream", torch.aoti_torch_get_current_cuda_stream);
  find(library, "torch_exception_get_what_without_backtrace",
       torch.torch_exception_get_what_without_backtrace);
#define FUNCTION(result, name, parameters) find(library, #name, torch.name) &&
  return BINCONV_TORCH_FUNCTIONS(FUNCTION) true;
#undef FUNCTION
}

[[noreturn]] void fail_with(const std::string& what) {
  const auto text = torch.torch_exception_get_what_without_backtrace;
  const std::string why = text ? std::string(": ") + text() : ", it may be out of memory";
  throw Error(Status::kCudaError, "torch: got " + what + why);
}

void check(Failure failure) {
  if (failure != 0) fail_with("an argument that it refuses");
}

struct TypePair {
  DataType type;
  int32_t dtype;
};

const std::vector<TypePair>& types() {
  static const std::vector<TypePair> pairs = {
      {DataType::kFloat32, torch.aoti_torch_dtype_float32()},
      {DataType::kFloat16, torch.aoti_torch_dtype_float16()},
      {DataType::kBFloat16, torch.aoti_torch_dtype_bfloat16()},
      {DataType::kInt8, torch.aoti_torch_dtype_int8()},
      {DataType::kInt32, torch.aoti_torch_dtype_int32()},
      {DataType::kBits, torch.aoti_torch_dtype_uint8()},
  };
  return pairs;
}

// Of a type that no argument has.
std::string name_of(int32_t dtype) {
  if (dtype == torch.aoti_torch_dtype_float64()) return "float64";
  if (dtype == torch.aoti_torch_dtype_int64()) return "int64";
  if (dtype == torch.aoti_torch_dtype_int16()) return "int16";
  if (dtype == torch.aoti_torch_dtype_bool()) return "bool";
  return "PyTorch's dtype number " + std::to_string(dtype);
}

int32_t dtype_of(DataType type) {
  const auto is_it = [&](const TypePair& pair) { return pair.type == type; };
  return std::find_if(types().begin(), types().end(), is_it)->dtype;
}

// (N, C, H, W) to (N, H, W, C).
std::vector<int64_t> to_nhwc(const std::vector<int64_t>& nchw) {
  return {nchw[0], nchw[2], nchw[3], nchw[1]};
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  }
  return strides;
}

}  // namespace

void load_torch() {
  if (!find_functions()) {
    throw Error(Status::kNotSupported, "torch: got none or an old one, expected 2.10 or later");
  }
  check(torch.aoti_torch_library_init_impl("binconv", "CPU", __FILE__, __LINE__, &libraries[0]));
  check(torch.aoti_torch_library_init_impl("binconv", "CUDA", __FILE__, __LINE__, &libraries[1]));
}

void register_kernel(const char* name, BoxedKernel kernel) {
  for (LibraryHandle library : libraries) {
    check(torch.torch_library_impl(library, name, kernel, kInterfaceVersion));
  }
}

DataType Dtype::type(const char* name) const {
  for (const TypePair& pair : types()) {
    if (pair.dtype == code) return pair.type;
  }
  fail(name, ": got ", name_of(code),
       ", expected float32, float16, bfloat16, int8, int32 or uint8");
}

void Tensor::Delete::operator()(TensorHandle handle) const {
  torch.aoti_torch_delete_tensor_object(handle);
}

Tensor::Tensor(TensorHandle handle) : handle_(handle) {
  int64_t rank, *sizes, *strides;
  check(torch.aoti_torch_get_dim(handle, &rank));
  check(torch.aoti_torch_get_sizes(handle, &sizes));
  check(torch.aoti_torch_get_strides(handle, &strides));
  sizes_.assign(sizes, sizes + rank);
  strides_.assign(strides, strides + rank);
  int32_t type, index;
  check(torch.aoti_torch_get_device_type(handle, &type));
  if (type != torch.aoti_torch_device_type_cuda()) return;
  check(torch.aoti_torch_get_device_index(handle, &index));
  device_ = {index};
}

void* Tensor::data() const {
  void* data;
  check(torch.aoti_torch_get_data_ptr(handle_.get(), &data));
  return data;
}

Dtype Tensor::dtype() const {
  Dtype dtype;
  check(torch.aoti_torch_get_dtype(handle_.get(), &dtype.code));
  return dtype;
}

bool Tensor::is_channels_last() const {
  return !is_dense(Layout::kNCHW) && is_dense(Layout::kNHWC);
}

bool Tensor::is_dense(Layout layout) const {
  if (layout == Layout::kNCHW) return !find_gap(sizes_, strides_);
  return sizes_.size() == 4 && !find_gap(to_nhwc(sizes_), to_nhwc(strides_));
}

Tensor Tensor::another() const {
  TensorHandle handle;
  check(torch.aoti_torch_new_tensor_handle(handle_.get(), &handle));
  return Tensor(handle);
}

Tensor Tensor::detached() const {
  if (!torch.aoti_torch_grad_mode_is_enabled()) return another();
  return std::move(*Call().tensor(*this)("aten::detach")[0]);
}

Tensor Tensor::copied(Layout layout) const {
  return std::move(*Call().tensor(*this).optional_format(layout)("aten::clone")[0]);
}

Tensor Tensor::new_empty(const std::vector<int64_t>& sizes, DataType type, Layout layout) const {
  std::vector<int64_t> strides;
  if (layout == Layout::kNCHW) {
    strides = contiguous_strides(sizes);
  } else {
    const auto nhwc = contiguous_strides(to_nhwc(sizes));
    strides = {nhwc[0], nhwc[3], nhwc[1], nhwc[2]};
  }
  const int32_t device_type =
      device_.cuda ? torch.aoti_torch_device_type_cuda() : torch.aoti_torch_device_type_cpu();
  TensorHandle handle;
  const Failure failure = torch.aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype_of(type), device_type,
      device_.cuda.value_or(0), &handle);
  if (failure != 0) fail_with("no memory for a result on " + device_.str());
  return Tensor(handle);
}

Array Tensor::array(const char* name, Layout layout) const {
  const DataType type = dtype().type(name);
  if (layout == Layout::kNCHW) return dense_array(name, data(), type, device_, sizes_, strides_);
  if (sizes_.size() != 4) fail(name, ": got ", sizes_.size(), " dimensions, expected 4");
  return dense_array(name, data(), type, device_, to_nhwc(sizes_), to_nhwc(strides_));
}

Place Tensor::place() const {
  if (device_.cuda) {
    void* stream;
    check(torch.aoti_torch_get_current_cuda_stream(*device_.cuda, &stream));
    return {.stream = reinterpret_cast<uintptr_t>(stream)};
  }
  uint32_t threads;
  check(torch.torch_get_num_threads(&threads));
  return {.threads = static_cast<int>(threads)};
}

std::optional<StableIValue> Stack::optional() {
  auto* const pointer = bits_as<StableIValue*>(*next_++);
  if (!pointer) return std::nullopt;
  const StableIValue value = *pointer;
  delete pointer;
  return value;
}

std::optional<Tensor> Stack::optional_tensor() {
  const auto value = optional();
  if (!value) return std::nullopt;
  return Tensor(bits_as<TensorHandle>(*value));
}

std::vector<int64_t> Stack::ints() {
  const auto list = bits_as<ListHandle>(*next_++);
  size_t count;
  check(torch.torch_list_size(list, &count));
  std::vector<int64_t> values(count);
  for (size_t i = 0; i < count; ++i) {
    StableIValue item;
    check(torch.torch_list_get_item(list, i, &item));
    values[i] = bits_as<int64_t>(item);
  }
  check(torch.torch_delete_list(list));
  return values;
}

std::vector<int64_t> Stack::integers(int count) {
  std::vector<int64_t> values;
  for (int i = 0; i < count; ++i) values.push_back(integer());
  return values;
}

std::optional<double> Stack::optional_number() {
  const auto value = optional();
  if (!value) return std::nullopt;
  return bits_as<double>(*value);
}

std::optional<Dtype> Stack::optional_dtype() {
  const auto value = optional();
  if (!value) return std::nullopt;
  return Dtype{bits_as<int32_t>(*value)};
}

Call& Call::put(StableIValue value) {
  stack_.push_back(value);
  return *this;
}

template <class Values>
Call& Call::list(const Values& values) {
  ListHandle list;
  check(torch.torch_new_list_reserve_size(values.size(), &list));
  for (const auto& value : values) check(torch.torch_list_push_back(list, bits_of(value)));
  return put(bits_of(list));
}

template Call& Call::list(const std::vector<int64_t>&);
template Call& Call::list(const std::initializer_list<bool>&);

Call& Call::optional_format(Layout layout) {
  const int32_t format = layout == Layout::kNCHW
                             ? torch.aoti_torch_memory_format_contiguous_format()
                             : torch.aoti_torch_memory_format_channels_last();
  return optional(bits_of(format));
}

Call& Call::text(std::string_view text) {
  StringHandle handle;
  check(torch.torch_new_string_handle(text.data(), text.size(), &handle));
  return put(bits_of(handle));
}

std::vector<std::optional<Tensor>> Call::operator()(const char* name,
                                                    std::initializer_list<bool> computes) {
  stack_.resize(std::max(stack_.size(), computes.size()));
  if (torch.torch_call_dispatcher(name, "", stack_.data(), kInterfaceVersion) != 0) {
    fail_with(std::string("a failure of ") + name);
  }
  std::vector<std::optional<Tensor>> results;
  for (bool is_computed : computes) {
    const auto handle = bits_as<TensorHandle>(stack_[results.size()]);
    if (is_computed) {
      results.emplace_back(Tensor(handle));
    } else {
      torch.aoti_torch_delete_tensor_object(handle);
      results.emplace_back();
    }
  }
  return results;
}

}  // namespace binconv::python

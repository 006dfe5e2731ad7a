#pragma once

// PyTorch's tensors and operators through its stable C interface (torch/csrc/stable/c/shim.h), of
// which all that is needed is declared here. The functions are looked up in the PyTorch that the
// process has loaded: nothing is compiled or linked against one.

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "arrays.h"

namespace binconv::python {

struct AtenTensorOpaque;
struct StableListOpaque;
struct StringOpaque;
using TensorHandle = AtenTensorOpaque*;
using ListHandle = StableListOpaque*;
using StringHandle = StringOpaque*;
using StableIValue = uint64_t;  // One argument or result; None is 0 where None is allowed.
using BoxedKernel = void (*)(StableIValue* stack, uint64_t arguments, uint64_t results);

// Finds the interface; to be called before all else here. Throws kNotSupported where PyTorch is not
// loaded or older than 2.10.
void load_torch();

// Makes a function the kernel of an operator of the namespace binconv, on the CPU and on CUDA.
void register_kernel(const char* name, BoxedKernel kernel);

// PyTorch's number of an element type.
struct Dtype {
  int32_t code;
  DataType type(const char* name) const;  // Of an argument of that name; kBits for uint8.
};

template <class T>
T bits_as(StableIValue value) {
  T result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

template <class T>
StableIValue bits_of(T value) {
  StableIValue result = 0;
  std::memcpy(&result, &value, sizeof(value));
  return result;
}

// A reference to one of PyTorch's tensors.
class Tensor {
 public:
  explicit Tensor(TensorHandle handle);

  TensorHandle release() { return handle_.release(); }
  Tensor another() const;   // Reference to the same.
  Tensor detached() const;  // The same; what follows is not recorded.

  const std::vector<int64_t>& sizes() const { return sizes_; }
  const Device& device() const { return device_; }
  void* data() const;
  Dtype dtype() const;

  // Whether it lies in memory as NHWC and not also as NCHW.
  bool is_channels_last() const;
  // Whether its memory is dense in this layout; kNHWC is of four dimensions only.
  bool is_dense(Layout layout) const;

  // A copy that is dense in this layout.
  Tensor copied(Layout layout) const;

  // New memory on the same device; of four sizes, (N, C, H, W), in any layout.
  Tensor new_empty(const std::vector<int64_t>& sizes, DataType type,
                   Layout layout = Layout::kNCHW) const;

  // As an argument of that name; in the order of the layout, in which it must be dense.
  Array array(const char* name, Layout layout = Layout::kNCHW) const;

  // Where a call on it runs: PyTorch's current stream, or its threads.
  Place place() const;

 private:
  struct Delete {
    void operator()(TensorHandle handle) const;
  };
  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
  std::vector<int64_t> sizes_, strides_;
  Device device_;
};

// What an operator is called with, taken in the order of its schema. Taking never throws and frees
// an argument, so all of them are taken first. Then the results are given in the same way.
class Stack {
 public:
  explicit Stack(StableIValue* values) : next_(values), results_(values) {}

  Tensor tensor() { return Tensor(bits_as<TensorHandle>(*next_++)); }
  std::optional<Tensor> optional_tensor();
  std::vector<int64_t> ints();               // Of a list.
  std::vector<int64_t> integers(int count);  // That follow each other.
  bool flag() { return bits_as<bool>(*next_++); }
  int64_t integer() { return bits_as<int64_t>(*next_++); }
  double number() { return bits_as<double>(*next_++); }
  std::optional<double> optional_number();
  Dtype dtype() { return {bits_as<int32_t>(*next_++)}; }
  std::optional<Dtype> optional_dtype();

  void give(Tensor result) { *results_++ = bits_of(result.release()); }

 private:
  std::optional<StableIValue> optional();

  StableIValue *next_, *results_;
};

// A call of one of PyTorch's own operators: its arguments, put in the order of its schema. It has
// to be made once they are put, as it is what frees them.
class Call {
 public:
  Call& tensor(const Tensor& x) { return put(bits_of(x.another().release())); }
  Call& none() { return put(0); }
  Call& ints(const std::vector<int64_t>& values) { return list(values); }
  Call& flags(std::initializer_list<bool> values) { return list(values); }
  Call& flag(bool value) { return put(bits_of(value)); }
  Call& integer(int64_t value) { return put(bits_of(value)); }
  Call& optional_number(double value) { return optional(bits_of(value)); }
  Call& optional_format(Layout layout);
  Call& text(std::string_view text);

  // Its results; nullopt for those that, by its arguments, are not computed.
  std::vector<std::optional<Tensor>> operator()(const char* name,
                                                std::initializer_list<bool> computes = {true});

 private:
  Call& put(StableIValue value);
  Call& optional(StableIValue value) { return put(bits_of(new StableIValue(value))); }
  template <class Values>
  Call& list(const Values& values);

  std::vector<StableIValue> stack_;
};

}  // namespace binconv::python

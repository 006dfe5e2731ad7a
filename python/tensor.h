#pragma once

// PyTorch's tensors and operators through its stable C interface (torch/csrc/stable/c/shim.h), of
// which all that is needed is declared here. The functions are looked up in the PyTorch that the
// process has loaded: nothing is compiled or linked against one.

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "arrays.h"

namespace binconv::python {

struct AtenTensorOpaque;
struct StableListOpaque;
using TensorHandle = AtenTensorOpaque*;
using ListHandle = StableListOpaque*;
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

// A reference to one of PyTorch's tensors.
class Tensor {
 public:
  explicit Tensor(TensorHandle handle);

  TensorHandle release() { return handle_.release(); }

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
  std::vector<int64_t> ints();
  bool flag() { return bits_as<bool>(*next_++); }
  int64_t integer() { return bits_as<int64_t>(*next_++); }
  double number() { return bits_as<double>(*next_++); }
  std::optional<double> optional_number();
  Dtype dtype() { return {bits_as<int32_t>(*next_++)}; }
  std::optional<Dtype> optional_dtype();

  void give(Tensor result) { *results_++ = bits_of(result.release()); }

 private:
  template <class T>
  static T bits_as(StableIValue value) {
    T result;
    std::memcpy(&result, &value, sizeof(result));
    return result;
  }
  template <class T>
  static StableIValue bits_of(T value) {
    StableIValue result = 0;
    std::memcpy(&result, &value, sizeof(value));
    return result;
  }
  std::optional<StableIValue> optional();

  StableIValue *next_, *results_;
};

}  // namespace binconv::python

#include <functional>
#include <limits>

#include "conv2d_check.h"
#include "test.h"

namespace binconv::test {
namespace {

constexpr int64_t kTwo31 = int64_t{1} << 31;
constexpr int64_t kTwo62 = int64_t{1} << 62;
constexpr int64_t kLowest = std::numeric_limits<int64_t>::min();
constexpr int64_t kHighest = std::numeric_limits<int64_t>::max();
constexpr Status kInvalid = Status::kInvalidArgument;

// A well-formed call of everything, in memory that shows whether it was written.
struct Call {
  explicit Call(const Queue& q)
      : queue(q),
        input_buffer(q, std::vector<uint8_t>(16 * 32, 0), 16),
        weight_buffer(q, std::vector<uint8_t>(8 * 9 * 16, 0), 16),
        prepared_buffer(q, prepared_weight_bytes(shape.weight, q), 16),
        output_buffer(q, 16 * 16 * 16, 16),
        bits_buffer(q, 16 * 16, 16),
        workspace_buffer(q, workspace_bytes(shape, q), 16),
        floats_buffer(q, std::vector<float>(4096, 0.0f), 16) {
    prepare_weight(shape.weight, weight_buffer.data(), prepared_buffer.data(), q);
    synchronize(q);
    prepared_buffer.check_guards("prepared weight");
  }

  void run() const { binary_conv2d(shape, input, prepared, epilogue, output, workspace, queue); }
  void check_nothing_was_written() const {
    output_buffer.check_untouched("output");
    bits_buffer.check_untouched("bits");
    workspace_buffer.check_untouched("workspace");
  }

  Queue queue;
  Conv2dShape shape = shape_3x3(1, 16, 4, 4, 8);
  Buffer input_buffer, weight_buffer, prepared_buffer, output_buffer, bits_buffer, workspace_buffer,
      floats_buffer;
  Epilogue epilogue;
  const void* input = input_buffer.data();
  const void* prepared = prepared_buffer.data();
  void* output = output_buffer.data();
  void* workspace = workspace_buffer.data();
  const float* floats = floats_buffer.as<float>();
};

// The same for a call on values.
struct ValuesCall : Call {
  explicit ValuesCall(const Queue& q)
      : Call(q), values_workspace_buffer(q, values_workspace_bytes(shape, q), 16) {
    workspace = values_workspace_buffer.data();
  }

  void run() const { binary_conv2d(shape, x, prepared, epilogue, output, workspace, queue); }
  void check_nothing_was_written() const {
    Call::check_nothing_was_written();
    values_workspace_buffer.check_untouched("workspace");
  }

  Buffer values_workspace_buffer;
  Values x{.data = floats};
};

const void* beyond(const void* pointer, int64_t bytes) {
  return static_cast<const uint8_t*>(pointer) + bytes;
}
void* beyond(void* pointer, int64_t bytes) { return static_cast<uint8_t*>(pointer) + bytes; }

std::string text(int64_t value) { return std::to_string(value); }

// binary_conv2d, the sizes of its workspace and kernel_name take the same shapes.
void check_shape_error(const Queue& queue, const Conv2dShape& shape,
                       const std::vector<std::string>& words) {
  Call call(queue);
  ValuesCall values(queue);
  call.shape = values.shape = shape;
  const Context context(describe(shape));
  const auto check = [&](const char* what, const std::function<void()>& body) {
    check_error(__FILE__, __LINE__, what, body, kInvalid, words);
  };
  check("binary_conv2d", [&] { call.run(); });
  check("workspace_bytes", [&] { workspace_bytes(shape, queue); });
  check("binary_conv2d of values", [&] { values.run(); });
  check("values_workspace_bytes", [&] { values_workspace_bytes(shape, queue); });
  check("kernel_name", [&] { kernel_name(shape, queue); });
  call.check_nothing_was_written();
  values.check_nothing_was_written();
}

void check_weight_error(const Queue& queue, const WeightShape& shape,
                        const std::vector<std::string>& words) {
  const Buffer packed(queue, 4096, 16), prepared(queue, 4096, 16);
  const auto check = [&](const char* what, const std::function<void()>& body) {
    check_error(__FILE__, __LINE__, what, body, kInvalid, words);
  };
  check("prepared_weight_bytes", [&] { prepared_weight_bytes(shape, queue); });
  check("prepare_weight", [&] { prepare_weight(shape, packed.data(), prepared.data(), queue); });
  check("weight_workspace_bytes", [&] { weight_workspace_bytes(shape, queue); });
  check("prepare_weight of values", [&] {
    prepare_weight(shape, packed.data(), DataType::kFloat32, Layout::kNHWC, prepared.data(),
                   nullptr, packed.data(), queue);
  });
  prepared.check_untouched("prepared");
  Conv2dShape conv = shape_3x3(1, 16, 4, 4, 8);
  conv.weight = shape;
  check_shape_error(queue, conv, words);
}

void check_conv2d_size(const char* name, int64_t Conv2dShape::* member,
                       const std::vector<int64_t>& values) {
  for (const Queue& queue : queues()) {
    for (int64_t value : values) {
      Conv2dShape shape = shape_3x3(1, 16, 4, 4, 8);
      shape.*member = value;
      check_shape_error(queue, shape, {name, text(value)});
    }
  }
}

void check_weight_size(const char* name, int64_t WeightShape::* member,
                       const std::vector<int64_t>& values) {
  for (const Queue& queue : queues()) {
    for (int64_t value : values) {
      WeightShape shape{
          .out_channels = 8, .in_channels = 16, .kernel_height = 3, .kernel_width = 3};
      shape.*member = value;
      check_weight_error(queue, shape, {name, text(value)});
    }
  }
}

}  // namespace

TEST(ErrorsQueue, ThreadsBelowOneAreRejected) {
  CHECK_ERROR(Queue::cpu(0), kInvalid, "threads", "0");
  CHECK_ERROR(Queue::cpu(-3), kInvalid, "threads", "-3");
  CHECK_EQ(Queue::cpu(5).threads(), 5);
}

TEST(ErrorsQueue, NegativeDeviceIsRejected) {
  CHECK_ERROR(Queue::cuda(nullptr, -1), kInvalid, "device", "-1");
}

TEST(ErrorsQueue, CudaQueueIsNotSupportedByACpuBuild) {
  if (*cuda_architectures() != '\0') throw Skip{"built with CUDA"};
  CHECK_EQ(cuda_devices().size(), 0u);
  const Queue cuda = Queue::cuda(nullptr, 0);
  const Conv2dShape shape = shape_3x3(1, 16, 4, 4, 8);
  const Buffer a(Queue::cpu(), 4096, 16), b(Queue::cpu(), 4096, 16), c(Queue::cpu(), 4096, 16);
  CHECK_ERROR(available_kernels(cuda), Status::kNotSupported, "queue", "CUDA");
  CHECK_ERROR(prepared_weight_bytes(shape.weight, cuda), Status::kNotSupported, "queue", "CUDA");
  CHECK_ERROR(prepare_weight(shape.weight, a.data(), b.data(), cuda), Status::kNotSupported,
              "queue", "CUDA");
  CHECK_ERROR(workspace_bytes(shape, cuda), Status::kNotSupported, "queue", "CUDA");
  CHECK_ERROR(kernel_name(shape, cuda), Status::kNotSupported, "queue", "CUDA");
  CHECK_ERROR(binary_conv2d(shape, a.data(), a.data(), {}, b.data(), b.data(), cuda),
              Status::kNotSupported, "queue", "CUDA");
  CHECK_ERROR(values_workspace_bytes(shape, cuda), Status::kNotSupported, "queue", "CUDA");
  CHECK_ERROR(
      binary_conv2d(shape, Values{.data = a.data()}, a.data(), {}, b.data(), b.data(), cuda),
      Status::kNotSupported, "queue", "CUDA");
  const ImageShape image{1, 3, 2, 2};
  CHECK_ERROR(pack_bits(image, a.data(), DataType::kInt8, Layout::kNCHW, {}, b.data(), cuda),
              Status::kNotSupported, "queue", "CUDA");
  CHECK_ERROR(pack_bits_and_clip(image, a.data(), DataType::kInt8, Layout::kNCHW, {}, 1.0f,
                                 b.data(), c.data(), cuda),
              Status::kNotSupported, "queue", "CUDA");
  CHECK_ERROR(unpack_bits(image, a.data(), b.data(), DataType::kInt8, Layout::kNCHW, cuda),
              Status::kNotSupported, "queue", "CUDA");
  CHECK_ERROR(abs_mean(1, 4, a.data(), DataType::kFloat32, b.as<float>(), cuda),
              Status::kNotSupported, "queue", "CUDA");
  CHECK_ERROR(scale_channels(image, a.data(), DataType::kFloat32, Layout::kNCHW, a.as<float>(),
                             b.data(), cuda),
              Status::kNotSupported, "queue", "CUDA");
  b.check_untouched("output");
  c.check_untouched("inside");
}

TEST(ErrorsQueue, UnknownKernelNameIsRejected) {
  for (const Queue& base : queues()) {
    const Queue queue = base.with_kernel("no_such_kernel");
    Call call(base);
    call.queue = queue;
    CHECK_ERROR(call.run(), kInvalid, "kernel", "no_such_kernel");
    CHECK_ERROR(workspace_bytes(call.shape, queue), kInvalid, "kernel", "no_such_kernel");
    CHECK_ERROR(kernel_name(call.shape, queue), kInvalid, "kernel", "no_such_kernel");
    CHECK_ERROR(prepared_weight_bytes(call.shape.weight, queue), kInvalid, "kernel",
                "no_such_kernel");
    CHECK_ERROR(prepare_weight(call.shape.weight, call.input, call.output, queue), kInvalid,
                "kernel", "no_such_kernel");
    CHECK_ERROR(kernel_name(call.shape, base.with_kernel("")), kInvalid, "kernel");
    call.check_nothing_was_written();
  }
}

TEST(ErrorsBits, PackedBytesRejectsChannelsBelowOne) {
  for (int64_t channels : {int64_t{0}, int64_t{-1}, kLowest}) {
    CHECK_ERROR(packed_bytes(channels), kInvalid, "channels", text(channels));
  }
}

TEST(ErrorsBits, BadImageSizesAreRejected) {
  for (const Queue& queue : queues()) {
    const Buffer a(queue, 4096, 16), b(queue, 4096, 16), c(queue, 4096, 16);
    const auto check = [&](const ImageShape& shape, const std::vector<std::string>& words) {
      const auto check_call = [&](const char* what, const std::function<void()>& body) {
        check_error(__FILE__, __LINE__, what, body, kInvalid, words);
      };
      check_call("packed_image_bytes", [&] { packed_image_bytes(shape); });
      check_call("pack_bits", [&] {
        pack_bits(shape, a.data(), DataType::kFloat32, Layout::kNHWC, {}, b.data(), queue);
      });
      check_call("pack_bits_and_clip", [&] {
        pack_bits_and_clip(shape, a.data(), DataType::kFloat32, Layout::kNHWC, {}, 1.0f, b.data(),
                           c.data(), queue);
      });
      check_call("unpack_bits", [&] {
        unpack_bits(shape, a.data(), b.data(), DataType::kInt8, Layout::kNCHW, queue);
      });
      check_call("scale_channels", [&] {
        scale_channels(shape, a.data(), DataType::kFloat32, Layout::kNCHW, a.as<float>(), b.data(),
                       queue);
      });
    };
    for (int64_t value : {int64_t{-1}, -kTwo31, kLowest}) {
      check({value, 3, 2, 2}, {"batch", text(value)});
      check({1, value, 2, 2}, {"channels", text(value)});
      check({1, 3, value, 2}, {"height", text(value)});
      check({1, 3, 2, value}, {"width", text(value)});
    }
    check({1, 0, 2, 2}, {"channels", "0"});
    for (int64_t value : {kTwo62, kHighest}) {
      check({value, 3, 2, 2}, {text(value)});
      check({1, value, 2, 2}, {text(value)});
      check({1, 3, value, 2}, {text(value)});
      check({1, 3, 2, value}, {text(value)});
    }
    check({kTwo31, kTwo31 - 1, kTwo31 - 1, 2}, {text(kTwo31), text(kTwo31 - 1)});
    b.check_untouched("output");
    c.check_untouched("inside");
  }
}

TEST(ErrorsBits, BadPointersAreRejected) {
  const ImageShape shape{1, 3, 2, 2};
  for (const Queue& queue : queues()) {
    const Buffer a(queue, 4096, 16), b(queue, 4096, 16);
    const auto pack = [&](const void* x, DataType type, void* packed,
                          const float* thresholds = nullptr) {
      pack_bits(shape, x, type, Layout::kNCHW, {0.0f, thresholds}, packed, queue);
    };
    CHECK_ERROR(pack(nullptr, DataType::kInt8, b.data()), kInvalid, "x", "null");
    CHECK_ERROR(pack(a.data(), DataType::kInt8, nullptr), kInvalid, "packed", "null");
    CHECK_ERROR(pack(beyond(a.data(), 1), DataType::kFloat16, b.data()), kInvalid, "x",
                "multiple of 2");
    CHECK_ERROR(pack(beyond(a.data(), 1), DataType::kBFloat16, b.data()), kInvalid, "x",
                "multiple of 2");
    CHECK_ERROR(pack(beyond(a.data(), 2), DataType::kFloat32, b.data()), kInvalid, "x",
                "multiple of 4");
    for (int offset : {1, 4, 8}) {
      CHECK_ERROR(pack(a.data(), DataType::kInt8, beyond(b.data(), offset)), kInvalid, "packed",
                  "multiple of 16");
    }
    CHECK_ERROR(
        pack(a.data(), DataType::kInt8, b.data(), static_cast<const float*>(beyond(a.data(), 2))),
        kInvalid, "threshold", "multiple of 4");
    const auto unpack = [&](const void* packed, void* x, DataType type) {
      unpack_bits(shape, packed, x, type, Layout::kNCHW, queue);
    };
    CHECK_ERROR(unpack(nullptr, b.data(), DataType::kInt8), kInvalid, "packed", "null");
    CHECK_ERROR(unpack(a.data(), nullptr, DataType::kInt8), kInvalid, "x", "null");
    CHECK_ERROR(unpack(beyond(a.data(), 8), b.data(), DataType::kInt8), kInvalid, "packed",
                "multiple of 16");
    CHECK_ERROR(unpack(a.data(), beyond(b.data(), 2), DataType::kFloat32), kInvalid, "x",
                "multiple of 4");
    CHECK_ERROR(unpack(a.data(), beyond(b.data(), 1), DataType::kFloat16), kInvalid, "x",
                "multiple of 2");
    b.check_untouched("output");
  }
}

TEST(ErrorsBits, BadPointersOfAClipAreRejected) {
  const ImageShape shape{1, 3, 2, 2};
  for (const Queue& queue : queues()) {
    const Buffer a(queue, 4096, 16), b(queue, 4096, 16), c(queue, 4096, 16);
    const auto clip = [&](const void* x, void* packed, void* inside, const void* thresholds) {
      pack_bits_and_clip(shape, x, DataType::kFloat16, Layout::kNCHW,
                         {0.0f, static_cast<const float*>(thresholds)}, 1.0f, packed, inside,
                         queue);
    };
    CHECK_ERROR(clip(nullptr, b.data(), c.data(), nullptr), kInvalid, "x", "null");
    CHECK_ERROR(clip(beyond(a.data(), 1), b.data(), c.data(), nullptr), kInvalid, "x",
                "multiple of 2");
    CHECK_ERROR(clip(a.data(), nullptr, c.data(), nullptr), kInvalid, "packed", "null");
    CHECK_ERROR(clip(a.data(), b.data(), nullptr, nullptr), kInvalid, "inside", "null");
    for (int offset : {1, 4, 8}) {
      CHECK_ERROR(clip(a.data(), beyond(b.data(), offset), c.data(), nullptr), kInvalid, "packed",
                  "multiple of 16");
      CHECK_ERROR(clip(a.data(), b.data(), beyond(c.data(), offset), nullptr), kInvalid, "inside",
                  "multiple of 16");
    }
    CHECK_ERROR(clip(a.data(), b.data(), c.data(), beyond(a.data(), 2)), kInvalid, "threshold",
                "multiple of 4");
    b.check_untouched("packed");
    c.check_untouched("inside");
  }
}

TEST(ErrorsBits, BadLimitIsRejected) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  constexpr float kSmallest = std::numeric_limits<float>::denorm_min();
  for (const Queue& queue : queues()) {
    const Buffer a(queue, 4096, 16), b(queue, 4096, 16), c(queue, 4096, 16);
    for (const ImageShape& shape : {ImageShape{1, 3, 2, 2}, ImageShape{0, 3, 2, 2}}) {
      const auto clip = [&](float limit) {
        pack_bits_and_clip(shape, a.data(), DataType::kInt8, Layout::kNCHW, {}, limit, b.data(),
                           c.data(), queue);
      };
      CHECK_ERROR(clip(-1.5f), kInvalid, "limit", "-1.5", "at least 0");
      CHECK_ERROR(clip(-kSmallest), kInvalid, "limit", "at least 0");
      CHECK_ERROR(clip(kNaN), kInvalid, "limit", "nan", "finite");
      CHECK_ERROR(clip(kInfinity), kInvalid, "limit", "inf", "finite");
      CHECK_ERROR(clip(-kInfinity), kInvalid, "limit", "-inf", "finite");
    }
    b.check_untouched("packed");
    c.check_untouched("inside");
  }
}

TEST(ErrorsBits, WrongTypesAndLayoutsAreRejected) {
  const ImageShape shape{1, 3, 2, 2};
  for (const Queue& queue : queues()) {
    const Buffer a(queue, 4096, 16), b(queue, 4096, 16), c(queue, 4096, 16);
    const auto clip = [&](DataType type, Layout layout) {
      pack_bits_and_clip(shape, a.data(), type, layout, {}, 1.0f, b.data(), c.data(), queue);
    };
    for (DataType type : {DataType::kInt32, DataType::kBits, static_cast<DataType>(99)}) {
      const char* name = type == DataType::kInt32  ? "int32"
                         : type == DataType::kBits ? "bits"
                                                   : "unknown";
      CHECK_ERROR(pack_bits(shape, a.data(), type, Layout::kNCHW, {}, b.data(), queue), kInvalid,
                  "type", name, "float16");
      CHECK_ERROR(clip(type, Layout::kNCHW), kInvalid, "type", name, "float16");
      CHECK_ERROR(unpack_bits(shape, a.data(), b.data(), type, Layout::kNCHW, queue), kInvalid,
                  "type", name, "float16");
    }
    const Layout layout = static_cast<Layout>(7);
    CHECK_ERROR(pack_bits(shape, a.data(), DataType::kInt8, layout, {}, b.data(), queue), kInvalid,
                "layout", "7");
    CHECK_ERROR(clip(DataType::kInt8, layout), kInvalid, "layout", "7");
    CHECK_ERROR(unpack_bits(shape, a.data(), b.data(), DataType::kInt8, layout, queue), kInvalid,
                "layout", "7");
    b.check_untouched("output");
    c.check_untouched("inside");
  }
}

TEST(ErrorsScale, AbsMeanRejectsBadArguments) {
  for (const Queue& queue : queues()) {
    const Buffer a(queue, 4096, 16), b(queue, 4096, 16);
    const auto call = [&](int64_t rows, int64_t columns, const void* x, DataType type, float* out) {
      abs_mean(rows, columns, x, type, out, queue);
    };
    constexpr DataType kType = DataType::kFloat32;
    float* const out = b.as<float>();
    CHECK_ERROR(call(-1, 4, a.data(), kType, out), kInvalid, "rows", "-1");
    CHECK_ERROR(call(2, 0, a.data(), kType, out), kInvalid, "columns", "0");
    CHECK_ERROR(call(0, 0, a.data(), kType, out), kInvalid, "columns", "0");
    CHECK_ERROR(call(2, -5, a.data(), kType, out), kInvalid, "columns", "-5");
    CHECK_ERROR(call(kTwo62, 4, a.data(), kType, out), kInvalid, text(kTwo62), "64 bits");
    CHECK_ERROR(call(3, kHighest, a.data(), kType, out), kInvalid, text(kHighest), "64 bits");
    CHECK_ERROR(call(2, 4, nullptr, kType, out), kInvalid, "x", "null");
    CHECK_ERROR(call(2, 4, a.data(), kType, nullptr), kInvalid, "out", "null");
    CHECK_ERROR(call(2, 4, beyond(a.data(), 2), kType, out), kInvalid, "x", "multiple of 4");
    CHECK_ERROR(call(2, 4, beyond(a.data(), 1), DataType::kBFloat16, out), kInvalid, "x",
                "multiple of 2");
    CHECK_ERROR(call(2, 4, a.data(), kType, static_cast<float*>(beyond(b.data(), 2))), kInvalid,
                "out", "multiple of 4");
    CHECK_ERROR(call(2, 4, a.data(), DataType::kInt8, out), kInvalid, "type", "int8", "bfloat16");
    CHECK_ERROR(call(2, 4, a.data(), DataType::kInt32, out), kInvalid, "type", "int32");
    CHECK_ERROR(call(2, 4, a.data(), DataType::kBits, out), kInvalid, "type", "bits");
    b.check_untouched("out");
  }
}

TEST(ErrorsScale, ScaleChannelsRejectsBadArguments) {
  const ImageShape shape{1, 3, 2, 2};
  for (const Queue& queue : queues()) {
    const Buffer a(queue, 4096, 16), b(queue, 4096, 16);
    const auto call = [&](const void* x, DataType type, Layout layout, const void* scale,
                          void* out) {
      scale_channels(shape, x, type, layout, static_cast<const float*>(scale), out, queue);
    };
    constexpr DataType kType = DataType::kFloat32;
    constexpr Layout kLayout = Layout::kNCHW;
    CHECK_ERROR(call(nullptr, kType, kLayout, a.data(), b.data()), kInvalid, "x", "null");
    CHECK_ERROR(call(a.data(), kType, kLayout, nullptr, b.data()), kInvalid, "scale", "null");
    CHECK_ERROR(call(a.data(), kType, kLayout, a.data(), nullptr), kInvalid, "out", "null");
    CHECK_ERROR(call(beyond(a.data(), 2), kType, kLayout, a.data(), b.data()), kInvalid, "x",
                "multiple of 4");
    CHECK_ERROR(call(a.data(), kType, kLayout, beyond(a.data(), 2), b.data()), kInvalid, "scale",
                "multiple of 4");
    CHECK_ERROR(call(a.data(), kType, kLayout, a.data(), beyond(b.data(), 1)), kInvalid, "out",
                "multiple of 4");
    for (DataType type : {DataType::kInt8, DataType::kInt32, DataType::kBits}) {
      CHECK_ERROR(call(a.data(), type, kLayout, a.data(), b.data()), kInvalid, "type", "bfloat16");
    }
    CHECK_ERROR(call(a.data(), kType, static_cast<Layout>(7), a.data(), b.data()), kInvalid,
                "layout", "7");
    b.check_untouched("out");
  }
}

TEST(ErrorsConv2d, BadSizesAreRejected) {
  const std::vector<int64_t> not_positive = {0, -1, kLowest, kTwo31, kTwo62, kHighest};
  const std::vector<int64_t> negative = {-1, -kTwo31, kLowest, kTwo31, kTwo62, kHighest};
  check_weight_size("out_channels", &WeightShape::out_channels, not_positive);
  check_weight_size("in_channels", &WeightShape::in_channels, not_positive);
  check_weight_size("kernel_height", &WeightShape::kernel_height, not_positive);
  check_weight_size("kernel_width", &WeightShape::kernel_width, not_positive);
  check_weight_size("groups", &WeightShape::groups, not_positive);
  check_conv2d_size("in_height", &Conv2dShape::in_height, not_positive);
  check_conv2d_size("in_width", &Conv2dShape::in_width, not_positive);
  check_conv2d_size("stride_height", &Conv2dShape::stride_height, not_positive);
  check_conv2d_size("stride_width", &Conv2dShape::stride_width, not_positive);
  check_conv2d_size("dilation_height", &Conv2dShape::dilation_height, not_positive);
  check_conv2d_size("dilation_width", &Conv2dShape::dilation_width, not_positive);
  check_conv2d_size("pad_top", &Conv2dShape::pad_top, negative);
  check_conv2d_size("pad_left", &Conv2dShape::pad_left, negative);
  check_conv2d_size("pad_bottom", &Conv2dShape::pad_bottom, negative);
  check_conv2d_size("pad_right", &Conv2dShape::pad_right, negative);
  check_conv2d_size("batch", &Conv2dShape::batch, {-1, kLowest, kTwo62, kHighest});
}

TEST(ErrorsConv2d, OverflowingProductsAreRejected) {
  constexpr int64_t kMax = kTwo31 - 1;
  for (const Queue& queue : queues()) {
    Conv2dShape shape = shape_3x3(1 << 20, 16, kMax, kMax, 8);
    check_shape_error(queue, shape, {"64 bits", text(kMax)});
    shape = shape_3x3(int64_t{1} << 40, 16, 4, 4, kMax);
    check_shape_error(queue, shape, {"64 bits"});
    // Few bits in many taps of many channels: each takes whole chunks.
    check_weight_error(
        queue,
        {.out_channels = 1 << 30, .in_channels = 1, .kernel_height = 1 << 29, .kernel_width = 1},
        {"prepared bytes", "64 bits"});
  }
}

TEST(ErrorsConv2d, OutputExtentsBeyond31BitsAreRejected) {
  for (const Queue& queue : queues()) {
    Conv2dShape shape = shape_3x3(1, 16, 4, 4, 8);
    shape.pad_bottom = kTwo31 - 1;
    check_shape_error(queue, shape, {"out_height", text(kTwo31 + 2)});
    shape = shape_3x3(1, 16, 4, 4, 8);
    shape.pad_left = kTwo31 - 1;
    check_shape_error(queue, shape, {"out_width", text(kTwo31 + 2)});
  }
}

TEST(ErrorsConv2d, SumsBeyondTheReachOfInt32AreRejected) {
  constexpr int64_t kLimit = (int64_t{1} << 30) - 1;
  for (const Queue& queue : queues()) {
    WeightShape shape{
        .out_channels = 1, .in_channels = kLimit + 1, .kernel_height = 1, .kernel_width = 1};
    check_weight_error(queue, shape,
                       {"kernel_height * kernel_width * in_channels / groups", text(kLimit + 1)});
    shape = {
        .out_channels = 1, .in_channels = 1, .kernel_height = 1 << 15, .kernel_width = 1 << 15};
    check_weight_error(queue, shape,
                       {"kernel_height * kernel_width * in_channels / groups", text(kLimit + 1)});
    shape = {.out_channels = 1,
             .in_channels = kTwo31 - 1,
             .kernel_height = kTwo31 - 1,
             .kernel_width = kTwo31 - 1};
    check_weight_error(queue, shape, {});
    shape = {.out_channels = 1, .in_channels = kLimit, .kernel_height = 1, .kernel_width = 1};
    CHECK(prepared_weight_bytes(shape, queue) >= packed_bytes(kLimit));
    shape = {.out_channels = 2,
             .in_channels = 1 << 30,
             .kernel_height = 1,
             .kernel_width = 1,
             .groups = 2};
    CHECK(prepared_weight_bytes(shape, queue) >= 2 * packed_bytes(1 << 29));
  }
}

TEST(ErrorsConv2d, BadGroupsAreRejected) {
  for (const Queue& queue : queues()) {
    const auto shape = [](int64_t in, int64_t out, int64_t groups) {
      return WeightShape{.out_channels = out,
                         .in_channels = in,
                         .kernel_height = 3,
                         .kernel_width = 3,
                         .groups = groups};
    };
    check_weight_error(queue, shape(16, 6, 3), {"groups", "3", "in_channels", "16"});
    check_weight_error(queue, shape(48, 8, 3), {"groups", "3", "out_channels", "8"});
    check_weight_error(queue, shape(16, 4, 4), {"groups", "4", "multiple of 8"});
    check_weight_error(queue, shape(40, 2, 2), {"groups", "20", "multiple of 8"});
    check_weight_error(queue, shape(16, 32, 32), {"groups", "32"});
    CHECK(prepared_weight_bytes(shape(13, 4, 1), queue) > 0);
    CHECK(prepared_weight_bytes(shape(16, 4, 2), queue) > 0);
  }
}

TEST(ErrorsConv2d, KernelLargerThanThePaddedImageIsRejected) {
  for (const Queue& queue : queues()) {
    Conv2dShape shape = shape_3x3(1, 16, 4, 4, 8);
    shape.dilation_height = 3;
    check_shape_error(queue, shape, {"kernel_height", "7", "6"});
    shape = shape_3x3(1, 16, 4, 4, 8);
    shape.weight.kernel_width = 9;
    check_shape_error(queue, shape, {"kernel_width", "9", "6"});
    shape = shape_3x3(1, 16, 1, 1, 8);
    shape.pad_top = shape.pad_left = 0;
    check_shape_error(queue, shape, {"kernel_height", "3", "2"});
    shape = shape_3x3(1, 16, 4, 4, 8);
    shape.dilation_width = kTwo31 - 1;
    check_shape_error(queue, shape, {"kernel_width", "6"});
    shape.stride_width = 1 << 30;
    check_shape_error(queue, shape, {"kernel_width", "6"});
  }
}

TEST(ErrorsConv2d, BadPadValueIsRejected) {
  for (const Queue& queue : queues()) {
    for (int value : {2, -2, 255, std::numeric_limits<int>::min()}) {
      Conv2dShape shape = shape_3x3(1, 16, 4, 4, 8);
      shape.pad_value = value;
      check_shape_error(queue, shape, {"pad_value", text(value)});
    }
  }
}

TEST(ErrorsConv2d, BadPointersAreRejected) {
  for (const Queue& queue : queues()) {
    Call call(queue);
    const auto run = [&](const void* input, const void* prepared, void* output, DataType out_type) {
      call.epilogue.out_type = out_type;
      binary_conv2d(call.shape, input, prepared, call.epilogue, output, call.workspace, queue);
    };
    constexpr DataType kType = DataType::kFloat32;
    CHECK_ERROR(run(nullptr, call.prepared, call.output, kType), kInvalid, "input", "null");
    CHECK_ERROR(run(call.input, nullptr, call.output, kType), kInvalid, "prepared_weight", "null");
    CHECK_ERROR(run(call.input, call.prepared, nullptr, kType), kInvalid, "output", "null");
    for (int offset : {1, 4, 8}) {
      CHECK_ERROR(run(beyond(call.input, offset), call.prepared, call.output, kType), kInvalid,
                  "input", "multiple of 16");
      CHECK_ERROR(run(call.input, beyond(call.prepared, offset), call.output, kType), kInvalid,
                  "prepared_weight", "multiple of 16");
      CHECK_ERROR(run(call.input, call.prepared, beyond(call.output, offset), DataType::kBits),
                  kInvalid, "output", "multiple of 16");
    }
    CHECK_ERROR(run(call.input, call.prepared, beyond(call.output, 2), kType), kInvalid, "output",
                "multiple of 4");
    CHECK_ERROR(run(call.input, call.prepared, beyond(call.output, 2), DataType::kInt32), kInvalid,
                "output", "multiple of 4");
    CHECK_ERROR(run(call.input, call.prepared, beyond(call.output, 1), DataType::kFloat16),
                kInvalid, "output", "multiple of 2");
    CHECK_ERROR(run(call.input, call.prepared, beyond(call.output, 1), DataType::kBFloat16),
                kInvalid, "output", "multiple of 2");
    call.check_nothing_was_written();

    Buffer out(queue, 4096, 16);
    const auto weight = [&](const void* packed, void* prepared) {
      prepare_weight(call.shape.weight, packed, prepared, queue);
    };
    CHECK_ERROR(weight(nullptr, out.data()), kInvalid, "packed", "null");
    CHECK_ERROR(weight(call.input, nullptr), kInvalid, "prepared", "null");
    CHECK_ERROR(weight(beyond(call.input, 8), out.data()), kInvalid, "packed", "multiple of 16");
    CHECK_ERROR(weight(call.input, beyond(out.data(), 8)), kInvalid, "prepared", "multiple of 16");
    out.check_untouched("prepared");

    const auto values = [&](const void* data, DataType type, void* prepared, float* means,
                            void* workspace) {
      prepare_weight(call.shape.weight, data, type, Layout::kNHWC, prepared, means, workspace,
                     queue);
    };
    Buffer memory(queue, 4096, 16);
    void* const scratch = memory.data();
    CHECK_ERROR(values(nullptr, kType, out.data(), nullptr, scratch), kInvalid, "weight", "null");
    CHECK_ERROR(values(beyond(call.input, 2), kType, out.data(), nullptr, scratch), kInvalid,
                "weight", "multiple of 4");
    CHECK_ERROR(values(call.input, DataType::kInt32, out.data(), nullptr, scratch), kInvalid,
                "type", "int32");
    CHECK_ERROR(values(call.input, DataType::kInt8, out.data(), memory.as<float>(), scratch),
                kInvalid, "means", "int8", "null");
    CHECK_ERROR(values(call.input, kType, nullptr, nullptr, scratch), kInvalid, "prepared", "null");
    CHECK_ERROR(values(call.input, kType, beyond(out.data(), 8), nullptr, scratch), kInvalid,
                "prepared", "multiple of 16");
    CHECK_ERROR(
        values(call.input, kType, out.data(), static_cast<float*>(beyond(scratch, 2)), scratch),
        kInvalid, "means", "multiple of 4");
    if (weight_workspace_bytes(call.shape.weight, queue) > 0) {
      CHECK_ERROR(values(call.input, kType, out.data(), nullptr, nullptr), kInvalid, "workspace",
                  "null");
      CHECK_ERROR(values(call.input, kType, out.data(), nullptr, beyond(scratch, 8)), kInvalid,
                  "workspace", "multiple of 16");
    }
    memory.check_untouched("workspace");
    out.check_untouched("prepared");
  }
}

TEST(ErrorsConv2d, MissingOrMisalignedWorkspaceIsRejectedWhereOneIsNeeded) {
  for (const Queue& queue : kernel_queues()) {
    const Context context(describe(queue));
    Call call(queue);
    if (workspace_bytes(call.shape, queue) == 0) continue;
    void* const workspace = call.workspace;
    call.workspace = nullptr;
    CHECK_ERROR(call.run(), kInvalid, "workspace", "null");
    call.workspace = beyond(workspace, 8);
    CHECK_ERROR(call.run(), kInvalid, "workspace", "multiple of 16");
    call.check_nothing_was_written();
  }
}

TEST(ErrorsConv2d, BadEpiloguesAreRejected) {
  for (const Queue& queue : queues()) {
    Call call(queue);
    const auto run = [&](const Epilogue& epilogue) {
      call.epilogue = epilogue;
      call.run();
    };
    const float* const floats = call.floats;
    const float* const odd = static_cast<const float*>(beyond(static_cast<const void*>(floats), 2));
    CHECK_ERROR(run({.out_type = DataType::kInt8}), kInvalid, "out_type", "int8", "float16");
    CHECK_ERROR(run({.out_type = static_cast<DataType>(99)}), kInvalid, "out_type", "unknown");
    CHECK_ERROR(run({.out_layout = static_cast<Layout>(7)}), kInvalid, "out_layout", "7");
    CHECK_ERROR(run({.out_type = DataType::kInt32, .scale = floats}), kInvalid, "scale", "int32");
    CHECK_ERROR(run({.out_type = DataType::kInt32, .bias = floats}), kInvalid, "bias", "int32");
    CHECK_ERROR(run({.out_type = DataType::kInt32, .residual = floats}), kInvalid, "residual",
                "int32");
    for (DataType type :
         {DataType::kInt32, DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
      CHECK_ERROR(run({.out_type = type, .threshold = {0.0f, floats}}), kInvalid, "threshold",
                  "bits");
    }
    CHECK_ERROR(run({.out_type = DataType::kBits, .out_layout = Layout::kNCHW}), kInvalid,
                "out_layout", "NCHW", "NHWC");
    CHECK_ERROR(run({.scale = odd}), kInvalid, "scale", "multiple of 4");
    CHECK_ERROR(run({.bias = odd}), kInvalid, "bias", "multiple of 4");
    CHECK_ERROR(run({.residual = odd}), kInvalid, "residual", "multiple of 4");
    CHECK_ERROR(run({.residual = beyond(static_cast<const void*>(floats), 1),
                     .residual_type = DataType::kFloat16}),
                kInvalid, "residual", "multiple of 2");
    CHECK_ERROR(run({.out_type = DataType::kBits, .threshold = {0.0f, odd}}), kInvalid, "threshold",
                "multiple of 4");
    for (DataType type : {DataType::kInt8, DataType::kInt32, DataType::kBits}) {
      CHECK_ERROR(run({.residual = floats, .residual_type = type}), kInvalid, "residual_type",
                  "bfloat16");
    }
    call.check_nothing_was_written();
  }
}

TEST(ErrorsConv2d, BadActivationsAreRejected) {
  using Member = const float* Activation::*;
  for (const Queue& queue : queues()) {
    Call call(queue);
    const auto run = [&](DataType type, const Activation& activation) {
      call.epilogue = {.out_type = type, .activation = activation};
      call.run();
    };
    CHECK_ERROR(run(DataType::kInt32, {.enabled = true}), kInvalid, "activation", "int32");
    for (const auto& [name, member] :
         {std::pair<const char*, Member>{"in_shift", &Activation::in_shift},
          {"slope", &Activation::slope},
          {"out_shift", &Activation::out_shift}}) {
      Activation activation;
      activation.*member = call.floats;
      for (DataType type : {DataType::kInt32, DataType::kFloat16, DataType::kBits}) {
        CHECK_ERROR(run(type, activation), kInvalid, name, "enabled");
      }
      activation.enabled = true;
      activation.*member =
          static_cast<const float*>(beyond(static_cast<const void*>(call.floats), 2));
      CHECK_ERROR(run(DataType::kFloat32, activation), kInvalid, name, "multiple of 4");
    }
    call.check_nothing_was_written();
  }
}

TEST(ErrorsConv2d, BadBitsBesideValuesAreRejected) {
  for (const Queue& queue : queues()) {
    Call call(queue);
    const auto run = [&](const Epilogue& epilogue) {
      call.epilogue = epilogue;
      call.run();
    };
    void* const bits = call.bits_buffer.data();
    const uint8_t* const below = reinterpret_cast<const uint8_t*>(call.floats);
    for (DataType type : {DataType::kInt32, DataType::kBits}) {
      CHECK_ERROR(run({.out_type = type, .bits = bits}), kInvalid,
                  "bits:", type == DataType::kBits ? "output of bits" : "int32");
    }
    CHECK_ERROR(run({.bits = beyond(bits, 8)}), kInvalid, "bits:", "multiple of 16");
    for (DataType type :
         {DataType::kInt32, DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
      CHECK_ERROR(run({.out_type = type, .threshold_below = below}), kInvalid, "threshold_below",
                  "bits only");
    }
    const float* const odd = static_cast<const float*>(beyond(static_cast<const void*>(below), 2));
    CHECK_ERROR(run({.threshold = {0.0f, odd}, .bits = bits}), kInvalid,
                "threshold:", "multiple of 4");
    call.check_nothing_was_written();
  }
}

TEST(ErrorsConv2d, OutputExtentIsZeroWhereThereIsNone) {
  Conv2dShape shape = shape_3x3(1, 16, 4, 4, 8);
  CHECK_EQ(shape.out_height(), 4);
  shape.dilation_height = 3;
  CHECK_EQ(shape.out_height(), 0);
  CHECK_EQ(shape.out_width(), 4);
  for (int64_t value : {int64_t{-1}, kLowest, kTwo62, kHighest}) {
    for (auto member : {&Conv2dShape::in_width, &Conv2dShape::stride_width, &Conv2dShape::pad_left,
                        &Conv2dShape::pad_right, &Conv2dShape::dilation_width}) {
      shape = shape_3x3(1, 16, 4, 4, 8);
      shape.*member = value;
      CHECK_EQ(shape.out_width(), 0);
    }
  }
  shape = shape_3x3(1, 16, kTwo31 - 1, 4, 8);
  CHECK_EQ(shape.out_height(), kTwo31 - 1);
  shape.stride_height = kTwo31 - 1;
  CHECK_EQ(shape.out_height(), 1);
}

// Sizes of every magnitude: what is accepted has sizes that fit into 64 bits and hold the data.
TEST(ErrorsConv2d, EveryShapeIsRejectedOrHasSizes) {
  Random random(1);
  const auto draw = [&] {
    return (static_cast<int64_t>(random.bits() >> 1) >> random.between(30, 62)) +
           random.between(0, 1);
  };
  int64_t accepted = 0;
  for (const Queue& queue : kernel_queues()) {
    const Context context(describe(queue));
    for (int i = 0; i < 4000; ++i) {
      Conv2dShape s = shape_3x3(draw(), draw(), draw(), draw(), draw());
      if (random.one_in(2)) s.batch = draw() << random.between(0, 20);
      if (random.one_in(2)) s.weight.kernel_height = draw();
      if (random.one_in(2)) s.weight.kernel_width = draw();
      if (random.one_in(2)) s.stride_height = draw();
      if (random.one_in(2)) s.dilation_width = draw();
      if (random.one_in(2)) s.pad_left = draw();
      if (random.one_in(2)) s.pad_bottom = draw();
      if (random.one_in(4)) s.weight.in_channels = 8 * (s.weight.groups = random.between(1, 9));
      try {
        CHECK(prepared_weight_bytes(s.weight, queue) >= s.weight.out_channels);
        CHECK(workspace_bytes(s, queue) >= 0);
        CHECK(values_workspace_bytes(s, queue) >= workspace_bytes(s, queue));
        CHECK(*kernel_name(s, queue) != '\0');
        ++accepted;
      } catch (const Error& error) {
        // What a kernel leaves to another one is no invalid shape.
        const bool is_declined = error.status() == Status::kNotSupported;
        CHECK(is_declined ? takes(queue.with_kernel(nullptr), s) : error.status() == kInvalid);
      }
    }
  }
  CHECK(accepted > 100);
}

TEST(ValuesErrors, WrongTypesAndLayoutsAreRejected) {
  for (const Queue& queue : queues()) {
    ValuesCall call(queue);
    const auto run = [&](DataType type, Layout layout) {
      call.x.type = type;
      call.x.layout = layout;
      call.run();
    };
    for (int64_t batch : {1, 0}) {
      call.shape.batch = batch;
      CHECK_ERROR(run(DataType::kInt32, Layout::kNHWC), kInvalid, "type", "int32", "float16");
      CHECK_ERROR(run(DataType::kBits, Layout::kNHWC), kInvalid, "type", "bits", "float16");
      CHECK_ERROR(run(static_cast<DataType>(99), Layout::kNHWC), kInvalid, "type", "unknown");
      CHECK_ERROR(run(DataType::kFloat16, static_cast<Layout>(7)), kInvalid, "layout", "7");
    }
    call.check_nothing_was_written();
  }
}

TEST(ValuesErrors, BadPointersAreRejected) {
  for (const Queue& queue : kernel_queues()) {
    const Context context(describe(queue));
    for (int64_t kernel : {1, 3}) {
      ValuesCall call(queue);
      call.shape.weight.kernel_height = call.shape.weight.kernel_width = kernel;
      const int64_t pad = kernel / 2;
      call.shape.pad_top = call.shape.pad_left = call.shape.pad_bottom = call.shape.pad_right = pad;
      const auto of = [&](const void* data, DataType type, const void* thresholds = nullptr) {
        call.x = {
            .data = data, .type = type, .threshold = {0.0f, static_cast<const float*>(thresholds)}};
        call.run();
      };
      const void* const data = call.floats;
      CHECK_ERROR(of(nullptr, DataType::kInt8), kInvalid, "x", "null");
      CHECK_ERROR(of(beyond(data, 2), DataType::kFloat32), kInvalid, "x", "multiple of 4");
      CHECK_ERROR(of(beyond(data, 1), DataType::kFloat16), kInvalid, "x", "multiple of 2");
      CHECK_ERROR(of(beyond(data, 1), DataType::kBFloat16), kInvalid, "x", "multiple of 2");
      for (DataType type : {DataType::kFloat32, DataType::kInt8}) {
        CHECK_ERROR(of(data, type, beyond(data, 2)), kInvalid, "threshold", "multiple of 4");
      }
      call.x = {.data = data};

      const auto with = [&](const void* prepared, void* output, void* workspace) {
        binary_conv2d(call.shape, call.x, prepared, {}, output, workspace, queue);
      };
      CHECK_ERROR(with(nullptr, call.output, call.workspace), kInvalid, "prepared_weight", "null");
      CHECK_ERROR(with(beyond(call.prepared, 8), call.output, call.workspace), kInvalid,
                  "prepared_weight", "multiple of 16");
      CHECK_ERROR(with(call.prepared, nullptr, call.workspace), kInvalid, "output", "null");
      CHECK_ERROR(with(call.prepared, beyond(call.output, 2), call.workspace), kInvalid, "output",
                  "multiple of 4");
      CHECK_ERROR(with(call.prepared, call.output, nullptr), kInvalid, "workspace", "null");
      for (int offset : {1, 4, 8}) {
        CHECK_ERROR(with(call.prepared, call.output, beyond(call.workspace, offset)), kInvalid,
                    "workspace", "multiple of 16");
      }
      call.check_nothing_was_written();
    }
  }
}

TEST(ValuesErrors, BadEpiloguesAreRejected) {
  for (const Queue& queue : queues()) {
    ValuesCall call(queue);
    const auto run = [&](const Epilogue& epilogue) {
      call.epilogue = epilogue;
      call.run();
    };
    const float* const floats = call.floats;
    CHECK_ERROR(run({.out_type = DataType::kInt8}), kInvalid, "out_type", "int8");
    CHECK_ERROR(run({.out_type = DataType::kInt32, .scale = floats}), kInvalid, "scale", "int32");
    CHECK_ERROR(run({.threshold = {0.0f, floats}}), kInvalid, "threshold", "bits");
    CHECK_ERROR(run({.out_type = DataType::kBits, .out_layout = Layout::kNCHW}), kInvalid,
                "out_layout", "NHWC");
    CHECK_ERROR(run({.activation = {.slope = floats}}), kInvalid, "slope", "enabled");
    CHECK_ERROR(run({.bits = beyond(call.bits_buffer.data(), 8)}), kInvalid,
                "bits:", "multiple of 16");
    call.check_nothing_was_written();
  }
}

TEST(ValuesErrors, UnknownKernelNameIsRejected) {
  for (const Queue& base : queues()) {
    ValuesCall call(base);
    call.queue = base.with_kernel("no_such_kernel");
    CHECK_ERROR(call.run(), kInvalid, "kernel", "no_such_kernel");
    CHECK_ERROR(values_workspace_bytes(call.shape, call.queue), kInvalid, "kernel",
                "no_such_kernel");
    call.check_nothing_was_written();
  }
}

// Their bits would fit.
TEST(ValuesErrors, ValuesOf2To63BytesAreRejected) {
  for (const Queue& queue : queues()) {
    ValuesCall call(queue);
    call.shape = {
        .batch = 1,
        .in_height = 1 << 27,
        .in_width = 1 << 27,
        .weight = {.out_channels = 8, .in_channels = 128, .kernel_height = 1, .kernel_width = 1},
        .stride_height = 1 << 27,
        .stride_width = 1 << 27};
    CHECK_ERROR(call.run(), kInvalid, "64 bits", text(1 << 27));
    CHECK_ERROR(values_workspace_bytes(call.shape, queue), kInvalid, "64 bits", text(1 << 27));
    call.check_nothing_was_written();
  }
}

}  // namespace binconv::test

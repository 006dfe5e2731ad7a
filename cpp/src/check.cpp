#include "check.h"

#include <algorithm>
#include <limits>

namespace binconv {

const char* to_string(DataType type) {
  switch (type) {
    case DataType::kInt8:
      return "int8";
    case DataType::kInt32:
      return "int32";
    case DataType::kFloat32:
      return "float32";
    case DataType::kFloat16:
      return "float16";
    case DataType::kBFloat16:
      return "bfloat16";
    case DataType::kBits:
      return "bits";
  }
  return "an unknown type";
}

int64_t element_bytes(DataType type) {
  switch (type) {
    case DataType::kInt8:
      return 1;
    case DataType::kFloat16:
    case DataType::kBFloat16:
      return 2;
    default:
      return 4;
  }
}

int64_t checked_product(const std::string& name, const char* meaning,
                        std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (int64_t factor : factors) {
    if (factor != 0 && product > std::numeric_limits<int64_t>::max() / factor) {
      std::string sizes;
      for (int64_t size : factors) sizes += (sizes.empty() ? "" : " * ") + std::to_string(size);
      fail(Status::kInvalidArgument, name, ": got ", meaning, " = ", sizes,
           ", expected what fits into 64 bits");
    }
    product *= factor;
  }
  return product;
}

void check_type(const char* name, DataType type, std::initializer_list<DataType> allowed) {
  if (std::find(allowed.begin(), allowed.end(), type) != allowed.end()) return;
  std::string expected;
  for (DataType choice : allowed) {
    if (!expected.empty()) expected += ", ";
    expected += to_string(choice);
  }
  fail(Status::kInvalidArgument, name, ": got ", to_string(type), ", expected one of ", expected);
}

void check_layout(const char* name, Layout layout) {
  require(layout == Layout::kNCHW || layout == Layout::kNHWC, name, ": got ",
          static_cast<int>(layout), ", expected kNCHW or kNHWC");
}

void check_pointer(const char* name, const void* pointer, int64_t alignment) {
  require(pointer != nullptr, name, ": got a null pointer, expected memory");
  require(reinterpret_cast<uintptr_t>(pointer) % alignment == 0, name, ": got address ", pointer,
          ", expected a multiple of ", alignment, " bytes");
}

namespace {

void check_at_least(const char* name, int64_t value, int64_t minimum) {
  require(value >= minimum, name, ": got ", value, ", expected at least ", minimum);
}

// Bounds every intermediate of the geometry, so that no later sum can overflow.
void check_extent(const char* name, int64_t value, int64_t minimum) {
  check_at_least(name, value, minimum);
  require(value <= std::numeric_limits<int32_t>::max(), name, ": got ", value,
          ", expected at most 2^31 - 1");
}

}  // namespace

void check_image(const ImageShape& shape, const std::string& prefix) {
  check_at_least("batch", shape.batch, 0);
  check_extent((prefix + "channels").c_str(), shape.channels, 1);
  check_extent((prefix + "height").c_str(), shape.height, 0);
  check_extent((prefix + "width").c_str(), shape.width, 0);
  constexpr int64_t kLargestElement = 4;
  checked_product("image", "batch * height * width * channel bytes",
                  {shape.batch, shape.height, shape.width,
                   std::max(packed_bytes(shape.channels), shape.channels), kLargestElement});
}

bool is_empty(const ImageShape& shape) {
  return shape.batch == 0 || shape.height == 0 || shape.width == 0;
}

void check_weight(const WeightShape& shape) {
  check_extent("out_channels", shape.out_channels, 1);
  check_extent("in_channels", shape.in_channels, 1);
  check_extent("kernel_height", shape.kernel_height, 1);
  check_extent("kernel_width", shape.kernel_width, 1);
  check_extent("groups", shape.groups, 1);
  require(shape.in_channels % shape.groups == 0, "groups: got ", shape.groups,
          ", expected a divisor of in_channels = ", shape.in_channels);
  require(shape.out_channels % shape.groups == 0, "groups: got ", shape.groups,
          ", expected a divisor of out_channels = ", shape.out_channels);
  const int64_t group_channels = shape.in_channels / shape.groups;
  require(shape.groups == 1 || group_channels % 8 == 0, "groups: got ", shape.groups, " groups of ",
          group_channels, " input channels, expected a multiple of 8 channels each");
  constexpr int64_t kMaxBits = (int64_t{1} << 30) - 1;
  const int64_t bits =
      checked_product("weight", "kernel_height * kernel_width * in_channels / groups",
                      {shape.kernel_height, shape.kernel_width, group_channels});
  require(bits <= kMaxBits,
          "weight: got kernel_height * kernel_width * in_channels / groups = ", bits,
          ", expected at most 2^30 - 1, the reach of an int32 result");
  // A tap of one of up to out_channels + 127 channels takes whole chunks, and a count or two.
  const int64_t chunks = (group_channels + 127) / 128;
  checked_product("weight", "prepared bytes",
                  {shape.out_channels + 128, shape.kernel_height * shape.kernel_width + 1, chunks,
                   int64_t{64}});
}

void check_conv2d(const Conv2dShape& shape) {
  check_weight(shape.weight);
  check_at_least("batch", shape.batch, 0);
  check_extent("in_height", shape.in_height, 1);
  check_extent("in_width", shape.in_width, 1);
  check_extent("stride_height", shape.stride_height, 1);
  check_extent("stride_width", shape.stride_width, 1);
  check_extent("dilation_height", shape.dilation_height, 1);
  check_extent("dilation_width", shape.dilation_width, 1);
  check_extent("pad_top", shape.pad_top, 0);
  check_extent("pad_left", shape.pad_left, 0);
  check_extent("pad_bottom", shape.pad_bottom, 0);
  check_extent("pad_right", shape.pad_right, 0);
  require(shape.pad_value >= -1 && shape.pad_value <= 1, "pad_value: got ", shape.pad_value,
          ", expected 0, 1 or -1");
  const int64_t out_height = shape.out_height(), out_width = shape.out_width();
  require(out_height >= 1, "kernel_height: the kernel reaches over ",
          shape.dilation_height * (shape.weight.kernel_height - 1) + 1,
          " rows, expected at most the ", shape.in_height + shape.pad_top + shape.pad_bottom,
          " rows of the padded image");
  require(out_width >= 1, "kernel_width: the kernel reaches over ",
          shape.dilation_width * (shape.weight.kernel_width - 1) + 1,
          " columns, expected at most the ", shape.in_width + shape.pad_left + shape.pad_right,
          " columns of the padded image");
  check_image({shape.batch, shape.weight.in_channels, shape.in_height, shape.in_width}, "in_");
  check_image({shape.batch, shape.weight.out_channels, out_height, out_width}, "out_");
}

}  // namespace binconv

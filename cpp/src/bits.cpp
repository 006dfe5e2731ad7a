#include "binconv/bits.h"

#include "check.h"
#include "cpu/cpu.h"
#include "cuda/cuda.h"

namespace binconv {
namespace {

constexpr std::initializer_list<DataType> kValueTypes = {DataType::kFloat32, DataType::kFloat16,
                                                         DataType::kBFloat16, DataType::kInt8};

bool is_empty(const ImageShape& shape) {
  return shape.batch == 0 || shape.height == 0 || shape.width == 0;
}

}  // namespace

int64_t packed_bytes(int64_t channels) {
  require(channels >= 1, "channels: got ", channels, ", expected at least 1");
  return 16 * ((channels - 1) / 128 + 1);
}

int64_t packed_image_bytes(const ImageShape& shape) {
  check_image(shape);
  return shape.batch * shape.height * shape.width * packed_bytes(shape.channels);
}

void pack_bits(const ImageShape& shape, const void* x, DataType type, Layout layout,
               const Threshold& threshold, void* packed, const Queue& queue) {
  check_image(shape);
  check_type("type", type, kValueTypes);
  check_layout("layout", layout);
  if (is_empty(shape)) return;
  check_pointer("x", x, element_bytes(type));
  check_pointer("packed", packed, kPackedAlignment);
  if (threshold.per_channel) check_pointer("threshold", threshold.per_channel, sizeof(float));
  uint8_t* bits = static_cast<uint8_t*>(packed);
  if (queue.is_cuda()) {
    cuda::pack_bits(shape, x, type, layout, threshold, bits, queue);
  } else {
    cpu::pack_bits(shape, x, type, layout, threshold, bits, queue.threads());
  }
}

void unpack_bits(const ImageShape& shape, const void* packed, void* x, DataType type, Layout layout,
                 const Queue& queue) {
  check_image(shape);
  check_type("type", type, kValueTypes);
  check_layout("layout", layout);
  if (is_empty(shape)) return;
  check_pointer("packed", packed, kPackedAlignment);
  check_pointer("x", x, element_bytes(type));
  const uint8_t* bits = static_cast<const uint8_t*>(packed);
  if (queue.is_cuda()) {
    cuda::unpack_bits(shape, bits, x, type, layout, queue);
  } else {
    cpu::unpack_bits(shape, bits, x, type, layout, queue.threads());
  }
}

}  // namespace binconv

#include "binconv/bits.h"

#include <cmath>

#include "check.h"
#include "cpu/cpu.h"
#include "cuda/cuda.h"

namespace binconv {
namespace {

void pack(const ImageShape& shape, const void* x, DataType type, Layout layout,
          const Threshold& threshold, void* packed, const ClipBits& clip, const Queue& queue) {
  check_pointer("x", x, element_bytes(type));
  check_pointer("packed", packed, kPackedAlignment);
  if (threshold.per_channel) check_pointer("threshold", threshold.per_channel, sizeof(float));
  uint8_t* bits = static_cast<uint8_t*>(packed);
  if (queue.is_cuda()) {
    cuda::pack_bits(shape, x, type, layout, threshold, bits, clip, queue);
  } else {
    cpu::pack_bits(shape, x, type, layout, threshold, bits, clip, queue.threads());
  }
}

void check_values(const ImageShape& shape, DataType type, Layout layout) {
  check_image(shape);
  check_type("type", type, kValueTypes);
  check_layout("layout", layout);
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
  check_values(shape, type, layout);
  if (!is_empty(shape)) pack(shape, x, type, layout, threshold, packed, {}, queue);
}

void pack_bits_and_clip(const ImageShape& shape, const void* x, DataType type, Layout layout,
                        const Threshold& threshold, float limit, void* packed, void* inside,
                        const Queue& queue) {
  check_values(shape, type, layout);
  require(limit >= 0.0f && std::isfinite(limit), "limit: got ", limit,
          ", expected a finite number of at least 0");
  if (is_empty(shape)) return;
  check_pointer("inside", inside, kPackedAlignment);
  pack(shape, x, type, layout, threshold, packed, {limit, static_cast<uint8_t*>(inside)}, queue);
}

void unpack_bits(const ImageShape& shape, const void* packed, void* x, DataType type, Layout layout,
                 const Queue& queue) {
  check_values(shape, type, layout);
  if (is_empty(shape)) return;
  check_pointer("packed", packed, kPackedAlignment);
  check_pointer("x", x, element_bytes(type));
  const uint8_t* bits = static_cast<const uint8_t*>(packed);
  if (queue.is_cuda()) {
    cuda::unpack_bits(shape, bits, x, type, layout, queue);
  } else {
    const PixelBits pixels = {bits, packed_bytes(shape.channels)};
    cpu::sign_values(shape, pixels, x, type, layout, queue.threads());
  }
}

}  // namespace binconv

#include "binconv/gradient.h"

#include "check.h"
#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "pixel_bits.h"

namespace binconv {
namespace {

// Whether there are values.
bool check_values(const ImageShape& shape, const PixelBits& bits, const void* x, DataType type,
                  Layout layout) {
  check_image(shape);
  check_type("type", type, kFloatTypes);
  check_layout("layout", layout);
  const int64_t least = (shape.channels + 7) / 8;
  require(bits.pixel_bytes >= least, "pixel_bytes: got ", bits.pixel_bytes, ", expected at least ",
          least, " for ", shape.channels, " channels");
  checked_product("bits", "batch * height * width * pixel_bytes",
                  {shape.batch, shape.height, shape.width, bits.pixel_bytes});
  if (is_empty(shape)) return false;
  check_pointer("bits", bits.data, 1);
  check_pointer("x", x, element_bytes(type));
  return true;
}

void check_rows(int64_t rows, int64_t columns) {
  require(rows >= 0, "rows: got ", rows, ", expected at least 0");
  require(columns >= 0, "columns: got ", columns, ", expected at least 0");
}

void check_array(const char* name, const void* data, DataType type, int64_t rows, int64_t columns) {
  checked_product(name, "rows * columns * element bytes", {rows, columns, element_bytes(type)});
  if (rows > 0 && columns > 0) check_pointer(name, data, element_bytes(type));
}

}  // namespace

void sign_values(const ImageShape& shape, const void* bits, int64_t pixel_bytes, void* x,
                 DataType type, Layout layout, const Queue& queue) {
  const PixelBits from = {static_cast<const uint8_t*>(bits), pixel_bytes};
  if (!check_values(shape, from, x, type, layout)) return;
  if (queue.is_cuda()) {
    cuda::sign_values(shape, from, x, type, layout, queue);
  } else {
    cpu::sign_values(shape, from, x, type, layout, queue.threads());
  }
}

void mask_values(const ImageShape& shape, const void* bits, int64_t pixel_bytes, void* x,
                 DataType type, Layout layout, const Queue& queue) {
  const PixelBits from = {static_cast<const uint8_t*>(bits), pixel_bytes};
  if (!check_values(shape, from, x, type, layout)) return;
  if (queue.is_cuda()) {
    cuda::mask_values(shape, from, x, type, layout, queue);
  } else {
    cpu::mask_values(shape, from, x, type, layout, queue.threads());
  }
}

void scaled_signs(int64_t rows, int64_t columns, const void* weight, DataType weight_type,
                  const float* scale, void* out, DataType out_type, const Queue& queue) {
  check_rows(rows, columns);
  check_type("weight_type", weight_type, kValueTypes);
  check_type("out_type", out_type, kFloatTypes);
  check_array("weight", weight, weight_type, rows, columns);
  check_array("out", out, out_type, rows, columns);
  if (rows == 0 || columns == 0) return;
  if (scale) check_pointer("scale", scale, sizeof(float));
  if (queue.is_cuda()) {
    cuda::scaled_signs(rows, columns, weight, weight_type, scale, out, out_type, queue);
  } else {
    cpu::scaled_signs(rows, columns, weight, weight_type, scale, out, out_type, queue.threads());
  }
}

void weight_gradient(int64_t rows, int64_t columns, const void* gradient, DataType gradient_type,
                     const void* weight, DataType weight_type, const float* scale, float limit,
                     void* out, DataType out_type, const Queue& queue) {
  check_rows(rows, columns);
  check_type("gradient_type", gradient_type, kFloatTypes);
  check_type("weight_type", weight_type, kValueTypes);
  check_type("out_type", out_type, kFloatTypes);
  require(limit >= 0.0f, "limit: got ", limit, ", expected a number of at least 0");
  check_array("gradient", gradient, gradient_type, rows, columns);
  check_array("weight", weight, weight_type, rows, columns);
  check_array("out", out, out_type, rows, columns);
  if (rows == 0 || columns == 0) return;
  if (scale) check_pointer("scale", scale, sizeof(float));
  if (queue.is_cuda()) {
    cuda::weight_gradient(rows, columns, gradient, gradient_type, weight, weight_type, scale, limit,
                          out, out_type, queue);
  } else {
    cpu::weight_gradient(rows, columns, gradient, gradient_type, weight, weight_type, scale, limit,
                         out, out_type, queue.threads());
  }
}

}  // namespace binconv

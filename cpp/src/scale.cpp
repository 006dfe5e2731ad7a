#include "binconv/scale.h"

#include "check.h"
#include "cpu/cpu.h"
#include "cuda/cuda.h"

namespace binconv {

void abs_mean(int64_t rows, int64_t columns, const void* x, DataType type, float* out,
              const Queue& queue) {
  require(rows >= 0, "rows: got ", rows, ", expected at least 0");
  require(columns >= 1, "columns: got ", columns,
          ", expected at least 1: a mean of no values is undefined");
  check_type("type", type, kFloatTypes);
  checked_product("x", "rows * columns * element bytes", {rows, columns, element_bytes(type)});
  if (rows == 0) return;
  check_pointer("x", x, element_bytes(type));
  check_pointer("out", out, sizeof(float));
  if (queue.is_cuda()) {
    cuda::abs_mean(rows, columns, x, type, out, queue);
  } else {
    cpu::abs_mean(rows, columns, x, type, out, queue.threads());
  }
}

void scale_channels(const ImageShape& shape, const void* x, DataType type, Layout layout,
                    const float* scale, void* out, const Queue& queue) {
  check_image(shape);
  check_type("type", type, kFloatTypes);
  check_layout("layout", layout);
  if (is_empty(shape)) return;
  check_pointer("x", x, element_bytes(type));
  check_pointer("scale", scale, sizeof(float));
  check_pointer("out", out, element_bytes(type));
  if (queue.is_cuda()) {
    cuda::scale_channels(shape, x, type, layout, scale, out, queue);
  } else {
    cpu::scale_channels(shape, x, type, layout, scale, out, queue.threads());
  }
}

}  // namespace binconv

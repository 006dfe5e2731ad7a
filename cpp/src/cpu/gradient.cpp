#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "cpu/cpu.h"
#include "cpu/numeric.h"
#include "cpu/parallel.h"

namespace binconv::cpu {
namespace {

// value, or +0. Bits are as good as random, so that a branch would be mispredicted every other
// time.
template <class T>
T keep_if(bool is_kept, T value) {
  using Few = std::conditional_t<sizeof(T) == 1, uint8_t, uint16_t>;
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, Few>;
  return std::bit_cast<T>(static_cast<Bits>(std::bit_cast<Bits>(value) & -Bits{is_kept}));
}

// change(x, is_one) for up to 8 values that lie `stride` apart, of the bits of one byte. With a
// known count and stride, compilers make it vectors.
template <class T, class Change>
void change_byte(uint8_t byte, T* x, int64_t count, int64_t stride, const Change& change) {
  for (int64_t k = 0; k < count; ++k) change(x[k * stride], (byte & (1 << k)) != 0);
}

// The same for every value of an image.
template <class T, class Change>
void change_values(const ImageShape& shape, const PixelBits& bits, T* x, Layout layout, int threads,
                   const Change& change) {
  const int64_t plane = shape.height * shape.width, channels = shape.channels;
  const int64_t channel_stride = layout == Layout::kNHWC ? 1 : plane;
  const int64_t pixel_stride = layout == Layout::kNHWC ? channels : 1;
  parallel_for(threads, shape.batch * plane, chunk_for(channels),
               [&](int, int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const uint8_t* byte = bits.data + i * bits.pixel_bytes;
                   T* pixel = x + i / plane * plane * channels + i % plane * pixel_stride;
                   int64_t c = 0;
                   if (channel_stride == 1) {
                     for (; c + 8 <= channels; c += 8)
                       change_byte(*byte++, pixel + c, 8, 1, change);
                   }
                   for (; c < channels; c += 8) {
                     change_byte(*byte++, pixel + c * channel_stride,
                                 std::min<int64_t>(8, channels - c), channel_stride, change);
                   }
                 }
               });
}

constexpr int64_t kBlock = 256;  // Values that are worked on as floats at once.

void to_floats(const void* from, DataType type, int64_t first, int64_t count, float* to) {
  with_type(type, [&](auto tag) {
    const auto* values = static_cast<const decltype(tag)*>(from) + first;
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(values[i]);
  });
}

void from_floats(const float* from, int64_t count, void* to, DataType type, int64_t first) {
  with_type(type, [&](auto tag) {
    using T = decltype(tag);
    T* values = static_cast<T*>(to) + first;
    for (int64_t i = 0; i < count; ++i) values[i] = from_float<T>(from[i]);
  });
}

// make(row, first, count) for blocks of a row's values, which begin with value `first` of all.
template <class Make>
void each_block(int64_t rows, int64_t columns, int threads, const Make& make) {
  const int64_t blocks = ceil_div(columns, kBlock);
  parallel_for(threads, rows * blocks, chunk_for(kBlock), [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / blocks, first = i % blocks * kBlock;
      make(row, row * columns + first, std::min(kBlock, columns - first));
    }
  });
}

}  // namespace

void sign_values(const ImageShape& shape, const PixelBits& bits, void* x, DataType type,
                 Layout layout, int threads) {
  with_type(type, [&](auto tag) {
    using T = decltype(tag);
    const T signs[2] = {from_float<T>(-1.0f), from_float<T>(1.0f)};
    change_values(shape, bits, static_cast<T*>(x), layout, threads,
                  [&](T& value, bool is_one) { value = signs[is_one]; });
  });
}

void mask_values(const ImageShape& shape, const PixelBits& bits, void* x, DataType type,
                 Layout layout, int threads) {
  with_type(type, [&](auto tag) {
    using T = decltype(tag);
    change_values(shape, bits, static_cast<T*>(x), layout, threads,
                  [](T& value, bool is_one) { value = keep_if(is_one, value); });
  });
}

void scaled_signs(int64_t rows, int64_t columns, const void* weight, DataType weight_type,
                  const float* scale, void* out, DataType out_type, int threads) {
  each_block(rows, columns, threads, [&](int64_t row, int64_t first, int64_t count) {
    const float factor = scale ? scale[row] : 1.0f;
    float values[kBlock];
    to_floats(weight, weight_type, first, count, values);
    for (int64_t i = 0; i < count; ++i) values[i] = values[i] >= 0.0f ? factor : -factor;
    from_floats(values, count, out, out_type, first);
  });
}

void weight_gradient(int64_t rows, int64_t columns, const void* gradient, DataType gradient_type,
                     const void* weight, DataType weight_type, const float* scale, float limit,
                     void* out, DataType out_type, int threads) {
  const bool passes_all = std::isinf(limit);
  each_block(rows, columns, threads, [&](int64_t row, int64_t first, int64_t count) {
    const float factor = scale ? scale[row] : 1.0f;
    float values[kBlock], weights[kBlock];
    to_floats(gradient, gradient_type, first, count, values);
    to_floats(weight, weight_type, first, count, weights);
    for (int64_t i = 0; i < count; ++i) values[i] *= factor;
    for (int64_t i = 0; !passes_all && i < count; ++i) {
      values[i] = keep_if(std::fabs(weights[i]) <= limit, values[i]);
    }
    from_floats(values, count, out, out_type, first);
  });
}

}  // namespace binconv::cpu

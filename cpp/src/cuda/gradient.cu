#include "check.h"
#include "cuda/cuda.h"
#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"
#include "cuda/piece.cuh"

namespace binconv::cuda {
namespace {

constexpr int kThreads = 256;

// Bits in the order of the values that they belong to.
class ValueBits {
 public:
  ValueBits(const ImageShape& shape, const PixelBits& bits, Layout layout)
      : bits_(bits),
        channels_(shape.channels),
        inner_(layout == Layout::kNHWC ? shape.channels : shape.height * shape.width),
        by_pixel_(layout == Layout::kNHWC) {}

  // Of neighbours in memory that differ in their channel alone (kNHWC), or their pixel (kNCHW).
  bool has_pieces(int values) const { return inner_ % values == 0; }

  // Of kCount such neighbours; other bits may follow.
  template <int kCount>
  __device__ uint32_t at(int64_t first) const {
    const int64_t outer = first / inner_, position = first - outer * inner_;
    if (by_pixel_) return bits_.data[outer * bits_.pixel_bytes + position / 8] >> position % 8;
    const int64_t image = outer / channels_, channel = outer - image * channels_;
    const int64_t pixel = image * inner_ + position;
    const uint8_t* byte = bits_.data + pixel * bits_.pixel_bytes + channel / 8;
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i, byte += bits_.pixel_bytes) {
      bits |= (*byte >> channel % 8 & 1u) << i;
    }
    return bits;
  }

 private:
  PixelBits bits_;
  int64_t channels_;
  int64_t inner_;  // Values that follow each other without a step in the other dimension.
  bool by_pixel_;
};

// x as +1 and -1, or what of it is left where bits are 0.
template <bool kMasks, bool kPieces, class T>
__global__ void __launch_bounds__(kThreads) change_values(int64_t count, ValueBits bits, T* x) {
  constexpr int kValues = kPieces ? kPieceValues<T> : 1;
  await_previous_kernel();
  for (int64_t i = grid_index() * kValues; i < count; i += grid_step() * kValues) {
    const uint32_t these = bits.at<kValues>(i);
    if constexpr (kPieces) {
      const Piece<T> piece = *reinterpret_cast<const Piece<T>*>(x + i);
      store_whole(x + i, kMasks ? mask_piece(piece, these) : unpack_piece<T>(these));
    } else if (kMasks) {
      if (these % 2 == 0) x[i] = from_float<T>(0.0f);
    } else {
      x[i] = from_float<T>(these % 2 ? 1.0f : -1.0f);
    }
  }
}

template <bool kMasks>
void change(const char* operation, const ImageShape& shape, const PixelBits& bits, void* x,
            DataType type, Layout layout, const Queue& queue) {
  const int64_t count = shape.batch * shape.channels * shape.height * shape.width;
  const ValueBits of_values(shape, bits, layout);
  dispatch_float_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool is_aligned = reinterpret_cast<uintptr_t>(x) % sizeof(Piece<T>) == 0;
    dispatch_bool(is_aligned && of_values.has_pieces(kPieceValues<T>), [&](auto pieces) {
      const int64_t threads = count / (pieces ? kPieceValues<T> : 1);
      launch(operation, queue, ceil_div<int64_t>(threads, kThreads), kThreads,
             change_values<kMasks, pieces, T>, count, of_values, static_cast<T*>(x));
    });
  });
}

// The values of a weight and what is made of them, by blocks: a block has a part of a row. Types
// are known at run time only, as weights are small.
struct Rows {
  static constexpr int kBatch = 4;  // Values of a thread.

  Rows(int64_t rows, int64_t columns)
      : rows(rows),
        columns(columns),
        threads(static_cast<int>(
            std::min<int64_t>(ceil_div<int64_t>(columns, kWarpSize) * kWarpSize, kThreads))),
        parts(ceil_div<int64_t>(columns, kBatch * threads)) {}

  int64_t blocks() const { return rows * parts; }

  // make(row, index) for every value.
  template <class Make>
  __device__ void each(const Make& make) const {
    for (int64_t block = blockIdx.x; block < rows * parts; block += gridDim.x) {
      const int64_t row = block / parts;
      const int64_t first = (block - row * parts) * kBatch * threads + threadIdx.x;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t column = first + i * threads;
        if (column < columns) make(row, row * columns + column);
      }
    }
  }

  int64_t rows, columns;
  int threads;
  int64_t parts;
};

__device__ float load_weight(const void* weight, DataType type, int64_t i) {
  if (type == DataType::kInt8) return static_cast<const int8_t*>(weight)[i];
  return load_float(weight, type, i);
}

__global__ void __launch_bounds__(kThreads)
    scaled_signs_kernel(Rows rows, const void* weight, DataType weight_type, const float* scale,
                        void* out, DataType out_type) {
  await_previous_kernel();
  rows.each([&](int64_t row, int64_t i) {
    const float factor = scale ? scale[row] : 1.0f;
    const bool is_positive = load_weight(weight, weight_type, i) >= 0.0f;
    store_float(out, out_type, i, is_positive ? factor : -factor);
  });
}

__global__ void __launch_bounds__(kThreads)
    weight_gradient_kernel(Rows rows, const void* gradient, DataType gradient_type,
                           const void* weight, DataType weight_type, const float* scale,
                           float limit, void* out, DataType out_type) {
  await_previous_kernel();
  rows.each([&](int64_t row, int64_t i) {
    const float factor = scale ? scale[row] : 1.0f;
    const bool passes = limit == INFINITY || fabsf(load_weight(weight, weight_type, i)) <= limit;
    const float product = __fmul_rn(load_float(gradient, gradient_type, i), factor);
    store_float(out, out_type, i, passes ? product : 0.0f);
  });
}

}  // namespace

void sign_values(const ImageShape& shape, const PixelBits& bits, void* x, DataType type,
                 Layout layout, const Queue& queue) {
  change<false>("sign_values", shape, bits, x, type, layout, queue);
}

void mask_values(const ImageShape& shape, const PixelBits& bits, void* x, DataType type,
                 Layout layout, const Queue& queue) {
  change<true>("mask_values", shape, bits, x, type, layout, queue);
}

void scaled_signs(int64_t rows, int64_t columns, const void* weight, DataType weight_type,
                  const float* scale, void* out, DataType out_type, const Queue& queue) {
  const Rows all(rows, columns);
  launch("scaled_signs", queue, all.blocks(), all.threads, scaled_signs_kernel, all, weight,
         weight_type, scale, out, out_type);
}

void weight_gradient(int64_t rows, int64_t columns, const void* gradient, DataType gradient_type,
                     const void* weight, DataType weight_type, const float* scale, float limit,
                     void* out, DataType out_type, const Queue& queue) {
  const Rows all(rows, columns);
  launch("weight_gradient", queue, all.blocks(), all.threads, weight_gradient_kernel, all, gradient,
         gradient_type, weight, weight_type, scale, limit, out, out_type);
}

}  // namespace binconv::cuda

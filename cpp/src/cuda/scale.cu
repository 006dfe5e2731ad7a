#include "check.h"
#include "cuda/abs_mean.cuh"
#include "cuda/cuda.h"
#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"

namespace binconv::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kMeanThreads)
    abs_mean_kernel(int64_t rows, int64_t columns, const T* x, float* out) {
  await_previous_kernel();
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    write_abs_mean(x + i * columns, columns, out + i);
  }
}

constexpr int kScaleThreads = 256;

// The channel changes every `inner` values: 1 for kNHWC, a plane for kNCHW.
template <int kWidth, class T>
__global__ void __launch_bounds__(kScaleThreads)
    scale_channels_kernel(int64_t vectors, int64_t inner, int32_t channels, const T* x,
                          const float* scale, T* out) {
  await_previous_kernel();
  for (int64_t i = grid_index(); i < vectors; i += grid_step()) {
    const int64_t group = i * kWidth / inner;
    int64_t position = i * kWidth - group * inner;
    int32_t channel = static_cast<int32_t>(group % channels);
    Vector<T, kWidth> vector = load_vector<kWidth>(x + i * kWidth);
#pragma unroll
    for (T& value : vector.values) {
      value = from_float<T>(__fmul_rn(to_float(value), scale[channel]));
      if (++position < inner) continue;
      position = 0;
      if (++channel == channels) channel = 0;
    }
    store_vector(out + i * kWidth, vector);
  }
}

}  // namespace

void abs_mean(int64_t rows, int64_t columns, const void* x, DataType type, float* out,
              const Queue& queue) {
  dispatch_float_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch("abs_mean", queue, rows, mean_threads<T>(columns), abs_mean_kernel<T>, rows, columns,
           static_cast<const T*>(x), out);
  });
}

void scale_channels(const ImageShape& shape, const void* x, DataType type, Layout layout,
                    const float* scale, void* out, const Queue& queue) {
  const int64_t plane_pixels = shape.height * shape.width;
  const int64_t count = shape.batch * shape.channels * plane_pixels;
  const int64_t inner = layout == Layout::kNCHW ? plane_pixels : 1;
  dispatch_float_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool has_vectors =
        is_vector_aligned(x) && is_vector_aligned(out) && count % kVectorWidth<T> == 0;
    dispatch_bool(has_vectors, [&](auto vectors) {
      constexpr int kWidth = vectors ? kVectorWidth<T> : 1;
      launch("scale_channels", queue, ceil_div<int64_t>(count / kWidth, kScaleThreads),
             kScaleThreads, scale_channels_kernel<kWidth, T>, count / kWidth, inner,
             static_cast<int32_t>(shape.channels), static_cast<const T*>(x), scale,
             static_cast<T*>(out));
    });
  });
}

}  // namespace binconv::cuda

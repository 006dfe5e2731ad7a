#include <cmath>

#include "cpu/cpu.h"
#include "cpu/numeric.h"
#include "cpu/parallel.h"

namespace binconv::cpu {
namespace {

// Several running sums hide the latency of the addition; combined in a fixed order.
template <class T>
double abs_sum(const T* x, int64_t count) {
  constexpr int kSums = 8;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int s = 0; s < kSums; ++s) sums[s] += std::fabs(to_float(x[i + s]));
  }
  double sum = 0.0;
  for (double partial : sums) sum += partial;
  for (; i < count; ++i) sum += std::fabs(to_float(x[i]));
  return sum;
}

}  // namespace

void abs_mean(int64_t rows, int64_t columns, const void* x, DataType type, float* out,
              int threads) {
  with_type(type, [&](auto tag) {
    const auto* values = static_cast<const decltype(tag)*>(x);
    parallel_for(threads, rows, chunk_for(columns), [&](int, int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        out[r] = static_cast<float>(abs_sum(values + r * columns, columns) /
                                    static_cast<double>(columns));
      }
    });
  });
}

void scale_channels(const ImageShape& shape, const void* x, DataType type, Layout layout,
                    const float* scale, void* out, int threads) {
  const int64_t plane = shape.height * shape.width, channels = shape.channels;
  const bool nhwc = layout == Layout::kNHWC;
  // A run: all channels of a pixel, or all pixels of a channel.
  const int64_t run = nhwc ? channels : plane;
  with_type(type, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(threads, shape.batch * (nhwc ? plane : channels), chunk_for(run),
                 [&](int, int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const T* from = static_cast<const T*>(x) + i * run;
                     T* to = static_cast<T*>(out) + i * run;
                     for (int64_t j = 0; j < run; ++j) {
                       to[j] = from_float<T>(to_float(from[j]) * scale[nhwc ? j : i % channels]);
                     }
                   }
                 });
  });
}

}  // namespace binconv::cpu

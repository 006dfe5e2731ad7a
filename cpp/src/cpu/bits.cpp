#include <algorithm>
#include <cstring>

#include "cpu/cpu.h"
#include "cpu/numeric.h"
#include "cpu/parallel.h"

namespace binconv::cpu {
namespace {

// Bit i of the result is flags[i], each of the 8 being 0 or 1: the product moves byte i to bit
// 56 + i.
uint8_t gather_bits(const uint8_t* flags) {
  if constexpr (std::endian::native == std::endian::little) {
    uint64_t bytes;
    std::memcpy(&bytes, flags, sizeof bytes);
    return static_cast<uint8_t>((bytes * 0x0102040810204080u) >> 56);
  }
  uint8_t bits = 0;
  for (int i = 0; i < 8; ++i) bits |= static_cast<uint8_t>(flags[i] << i);
  return bits;
}

constexpr int64_t kChunkChannels = 128;  // The channels of 16 packed bytes.

// One NHWC pixel. test(x, channel) tells whether a value becomes a 1.
template <class T, class Test>
void pack_pixel(const T* x, int64_t channels, const Test& test, uint8_t* packed) {
  for (int64_t first = 0; first < channels; first += kChunkChannels) {
    uint8_t flags[kChunkChannels] = {};
    const int64_t count = std::min(kChunkChannels, channels - first);
    for (int64_t c = 0; c < count; ++c) flags[c] = test(to_float(x[first + c]), first + c);
    for (int64_t byte = 0; byte < kChunkChannels / 8; ++byte)
      *packed++ = gather_bits(flags + 8 * byte);
  }
}

// Up to kRun neighbouring pixels of an NCHW image whose channels lie `plane` elements apart.
constexpr int64_t kRun = 256;

template <class T, class Test>
void pack_run(const T* x, int64_t plane, int64_t count, int64_t channels, const Test& test,
              uint8_t* packed) {
  const int64_t pixel_bytes = packed_bytes(channels);
  for (int64_t byte = 0; byte < pixel_bytes; ++byte) {
    uint8_t bits[kRun] = {};
    for (int64_t c = 8 * byte; c < std::min(channels, 8 * byte + 8); ++c) {
      const T* row = x + c * plane;
      for (int64_t i = 0; i < count; ++i) bits[i] |= test(to_float(row[i]), c) << (c % 8);
    }
    for (int64_t i = 0; i < count; ++i) packed[i * pixel_bytes + byte] = bits[i];
  }
}

template <class T, class Test>
void pack(const ImageShape& shape, const T* x, Layout layout, const Test& test, uint8_t* packed,
          int threads) {
  const int64_t plane = shape.height * shape.width, channels = shape.channels;
  const int64_t pixel_bytes = packed_bytes(channels);
  if (layout == Layout::kNHWC) {
    parallel_for(threads, shape.batch * plane, chunk_for(channels),
                 [&](int, int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i)
                     pack_pixel(x + i * channels, channels, test, packed + i * pixel_bytes);
                 });
    return;
  }
  const int64_t runs = ceil_div(plane, kRun);
  parallel_for(threads, shape.batch * runs, chunk_for(kRun * channels),
               [&](int, int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t image = i / runs, first = i % runs * kRun;
                   pack_run(x + image * channels * plane + first, plane,
                            std::min(kRun, plane - first), channels, test,
                            packed + (image * plane + first) * pixel_bytes);
                 }
               });
}

// threshold_of(channel) is what Threshold says.
template <class T, class ThresholdOf>
void pack_all(const ImageShape& shape, const T* x, Layout layout, const ThresholdOf& threshold_of,
              uint8_t* packed, const ClipBits& clip, int threads) {
  pack(
      shape, x, layout, [&](float value, int64_t c) { return value >= threshold_of(c); }, packed,
      threads);
  if (clip.inside == nullptr) return;
  const auto is_inside = [&](float value, int64_t c) {
    return (value >= threshold_of(c) - clip.limit) & (value <= threshold_of(c) + clip.limit);
  };
  pack(shape, x, layout, is_inside, clip.inside, threads);
}

}  // namespace

void pack_bits(const ImageShape& shape, const void* x, DataType type, Layout layout,
               const Threshold& threshold, uint8_t* packed, const ClipBits& clip, int threads) {
  with_type(type, [&](auto tag) {
    const auto run = [&](const auto& threshold_of) {
      pack_all(shape, static_cast<const decltype(tag)*>(x), layout, threshold_of, packed, clip,
               threads);
    };
    if (const float* thresholds = threshold.per_channel) {
      run([=](int64_t c) { return thresholds[c]; });
    } else {
      run([value = threshold.value](int64_t) { return value; });
    }
  });
}

}  // namespace binconv::cpu

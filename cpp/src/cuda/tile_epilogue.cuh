#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/predicated.cuh"
#include "cuda/tile_channels.cuh"
#include "cuda/tile_output.cuh"

// The end of the tensor-core kernels: a warp turns its 16 pixels of a run into outputs. Nothing is
// shared with other warps, so that nothing has to wait, and a lane's channels are neighbours, so
// that they leave as they are.

namespace binconv::cuda {

// From accumulators to scale * acc + bias, or to acc where the output is int32.
template <int kColumns, bool kIsSimple>
__device__ void scale_group(const TileOutput& out, const WarpRun<kColumns>& run, int group,
                            const GroupScale& by, const GroupTable table, Group& y) {
  const bool is_integer = !kIsSimple && out.epilogue.out_type == DataType::kInt32;
  const bool is_clamped = !kIsSimple && out.epilogue.clamp;
#pragma unroll
  for (int row = 0; row < kLanePixels; ++row) {
    const float window = -2.0f * run.window_bits[row] - kMagic;
#pragma unroll
    for (int k = 0; k < kLaneChannels; ++k) {
      const int i = k / kQuad, j = k % kQuad;
      const int32_t sum = 4 * accumulator(run, group, row, k) + table.rows[row][i].values[j];
      float a = __int_as_float(sum) + window;
      if (is_clamped) a = fmaxf(a, 0.0f);
      y[row][k] = is_integer ? a : __fmaf_rn(a, by.scale[i].values[j], by.bias[i].values[j]);
    }
  }
}

// A lane's values of a group in memory.
struct Place {
  int64_t index[kLanePixels], step;  // Of the first channel; from channel to channel.
  bool is_valid[kLanePixels];
  int channels;  // That exist, of the lane's.
};

template <int kColumns>
__device__ Place locate_group(const TileOutput& out, const Lane& lane, const WarpRun<kColumns>& run,
                              int group) {
  const bool nhwc = out.epilogue.out_layout == Layout::kNHWC;
  const int64_t channel = lane.channel + group * kGroup;
  Place place;
  place.step = nhwc ? 1 : out.plane_pixels;
  place.channels =
      static_cast<int>(min(max(out.channels - channel, int64_t{0}), int64_t{kLaneChannels}));
#pragma unroll
  for (int row = 0; row < kLanePixels; ++row) {
    const Pixel& pixel = run.pixels[row];
    place.is_valid[row] = pixel.index >= 0;
    // Channel 0 of the pixel, then the channel.
    place.index[row] = pixel.index * (nhwc ? out.channels : 1) + channel * place.step;
    if (!nhwc) {
      const int32_t image = pixel.index / static_cast<int32_t>(out.plane_pixels);
      place.index[row] += image * (out.channels - 1) * out.plane_pixels;
    }
  }
  return place;
}

// visit(value, index) for all of a lane's values that exist, one by one. Both pixels of a channel
// follow one another: where channels are planes, they are mostly in the same 32 bytes.
template <class Visit>
__device__ void for_each(const Place& place, Group& y, const Visit& visit) {
  int64_t offset = 0;
#pragma unroll
  for (int k = 0; k < kLaneChannels; ++k, offset += place.step) {
#pragma unroll
    for (int row = 0; row < kLanePixels; ++row) {
      if (place.is_valid[row] && k < place.channels) visit(y[row][k], place.index[row] + offset);
    }
  }
}

// visit(first value, index) for the first of every kWidth.
template <int kWidth, class Visit>
__device__ void for_each_piece(const Place& place, const Visit& visit) {
#pragma unroll
  for (int row = 0; row < kLanePixels; ++row) {
#pragma unroll
    for (int k = 0; k < kLaneChannels; k += kWidth) {
      if (place.is_valid[row] && k < place.channels) visit(row, k, place.index[row] + k);
    }
  }
}

template <class T, int kCount>
__device__ void add_piece(const Vector<T, kCount>& piece, float* y) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) y[k] = __fadd_rn(y[k], to_float(piece.values[k]));
}

template <class T>
__device__ Vector<T, kVectorWidth<T>> make_piece(const float* y) {
  Vector<T, kVectorWidth<T>> piece;
#pragma unroll
  for (int k = 0; k < kVectorWidth<T>; ++k) piece.values[k] = from_float<T>(y[k]);
  return piece;
}

template <class T>
__device__ void add_residual_pieces(const TileOutput& out, const Place& place, Group& y) {
  constexpr int kCount = kVectorWidth<T>;
  const T* data = static_cast<const T*>(out.epilogue.residual);
  for_each_piece<kCount>(place, [&](int row, int first, int64_t index) {
    add_piece(load_vector<kCount>(data + index), y[row] + first);
  });
}

__device__ inline void add_residual(const TileOutput& out, const Place& place, Group& y) {
  if (!out.residual_in_pieces) {
    return for_each(place, y, [&](float& value, int64_t index) {
      value = add_residual(out.epilogue, index, value);
    });
  }
  switch (out.epilogue.residual_type) {
    case DataType::kFloat16:
      return add_residual_pieces<__half>(out, place, y);
    case DataType::kBFloat16:
      return add_residual_pieces<__nv_bfloat16>(out, place, y);
    default:
      return add_residual_pieces<float>(out, place, y);
  }
}

__device__ inline void activate_group(const TileOutput& out, const Lane& lane, int group,
                                      Group& y) {
  const bool is_relu = !out.epilogue.activation.slope;
  LaneVector<float> in, slope, shift;
  load_lane(lane.terms + kInShift * kMostChannels + group * kGroup, in);
  load_lane(lane.terms + kSlope * kMostChannels + group * kGroup, slope);
  load_lane(lane.terms + kOutShift * kMostChannels + group * kGroup, shift);
#pragma unroll
  for (int k = 0; k < kLaneChannels; ++k) {
    const int i = k / kQuad, j = k % kQuad;
    const ActivationTerms terms = {in[i].values[j], slope[i].values[j], shift[i].values[j],
                                   is_relu};
#pragma unroll
    for (int row = 0; row < kLanePixels; ++row) y[row][k] = apply_activation(y[row][k], terms);
  }
}

// The bits of a lane's channels, for each of its pixels one byte of a word.
__device__ inline void compare_group(const Lane& lane, int group, const Group& y,
                                     uint32_t (&bytes)[kLanePixels]) {
  float hits[kLanePixels] = {};  // As floats, comparing and adding take one step each.
  LaneVector<float> limit, sign;
  load_lane(lane.terms + kThreshold * kMostChannels + group * kGroup, limit);
  load_lane(lane.terms + kThresholdSign * kMostChannels + group * kGroup, sign);
#pragma unroll
  for (int row = 0; row < kLanePixels; ++row) {
#pragma unroll
    for (int k = 0; k < kLaneChannels; ++k) {
      const int i = k / kQuad, j = k % kQuad;
      const bool hit = passes(y[row][k], limit[i].values[j], sign[i].values[j]);
      hits[row] = __fmaf_rn(hit ? 1.0f : 0.0f, 1 << k, hits[row]);
    }
    bytes[row] |= static_cast<uint32_t>(hits[row]) << 8 * group;
  }
}

// A row's four lanes have a byte of each of four words; lane q gets word q.
__device__ inline uint32_t join_bytes(int q, uint32_t bytes) {
  const uint32_t neighbour = __shfl_xor_sync(kWholeWarp, bytes, 1);
  bytes = __byte_perm(bytes, neighbour, q % 2 == 0 ? 0x6240 : 0x3715);
  const uint32_t opposite = __shfl_xor_sync(kWholeWarp, bytes, 2);
  return __byte_perm(bytes, opposite, q < 2 ? 0x5410 : 0x3276);
}

// bytes: of the lane's channels in each group. Lane q of a row's four stores word q of the run's
// channels; those of the last channels also the zeros behind them.
template <int kColumns>
__device__ void store_bits(const TileOutput& out, const Lane& lane, const WarpRun<kColumns>& run,
                           void* bits, const uint32_t (&bytes)[kLanePixels], uint32_t flipped) {
  const int32_t first = lane.first_channel / kGroup + lane.q;
  const int64_t left = out.channels - int64_t{first} * kGroup;
  const uint32_t exist = left >= kGroup ? ~0u : left > 0 ? (1u << left) - 1 : 0;
  const bool is_last = lane.first_channel + kColumns >= out.channels;
  const bool is_mine = first < out.packed_words && (lane.q < kColumns / kGroup || is_last);
#pragma unroll
  for (int row = 0; row < kLanePixels; ++row) {
    const uint32_t word = (join_bytes(lane.q, bytes[row]) ^ flipped) & exist;
    const int64_t pixel = run.pixels[row].index;
    if (is_mine && pixel >= 0) {
      static_cast<uint32_t*>(bits)[pixel * out.packed_words + first] = word;
    }
  }
}

template <class T>
__device__ void store_pieces(T* data, const Place& place, const Group& y) {
  for_each_piece<kVectorWidth<T>>(place, [&](int row, int first, int64_t index) {
    store_vector(data + index, make_piece<T>(y[row] + first));
  });
}

template <class T>
__device__ void store_values(const TileOutput& out, const Place& place, Group& y) {
  T* data = static_cast<T*>(out.data);
  if (out.has_pieces) return store_pieces(data, place, y);
  for_each(place, y, [&](float value, int64_t index) { data[index] = from_float<T>(value); });
}

__device__ inline void store_values(const TileOutput& out, const Place& place, Group& y) {
  switch (out.epilogue.out_type) {
    case DataType::kFloat16:
      return store_values<__half>(out, place, y);
    case DataType::kBFloat16:
      return store_values<__nv_bfloat16>(out, place, y);
    case DataType::kFloat32:
      return store_values<float>(out, place, y);
    case DataType::kInt32:
      return store_values<int32_t>(out, place, y);
    default:
      return;
  }
}

// Values of a lane's channels of a group, for each of its pixels.
template <class T>
struct LaneValues {
  Vector<T, kLaneChannels> rows[kLanePixels];
};

template <class T>
__device__ void add_values(const LaneValues<T>& values, Group& y) {
#pragma unroll
  for (int row = 0; row < kLanePixels; ++row) add_piece(values.rows[row], y[row]);
}

// A lane's values in memory where a pixel's channels are neighbours (NHWC): 16 bytes at a time.
template <class T>
class PixelMemory {
 public:
  template <int kColumns>
  __device__ PixelMemory(const TileOutput& out, const Lane& lane, const WarpRun<kColumns>& run) {
#pragma unroll
    for (int row = 0; row < kLanePixels; ++row) {
      const int64_t pixel = run.pixels[row].index;
      exists_[row] = pixel >= 0;
      at_[row] = max(pixel, int64_t{0}) * out.channels + lane.channel;
    }
  }

  __device__ void store(void* data, int group, const Group& y) const {
#pragma unroll
    for (int row = 0; row < kLanePixels; ++row) {
      T* to = static_cast<T*>(data) + at_[row] + group * kGroup;
#pragma unroll
      for (int first = 0; first < kLaneChannels; first += kVectorWidth<T>) {
        store_if(exists_[row], to + first, make_piece<T>(y[row] + first));
      }
    }
  }

  // Where no pixel is, another one's.
  __device__ LaneValues<T> load(const void* data, int group) const {
    LaneValues<T> values;
#pragma unroll
    for (int row = 0; row < kLanePixels; ++row) {
      const T* from = static_cast<const T*>(data) + at_[row] + group * kGroup;
      values.rows[row] = load_vector<kLaneChannels>(from);
    }
    return values;
  }

 private:
  int64_t at_[kLanePixels];
  bool exists_[kLanePixels];
};

// The same where each channel is a plane (NCHW). Neighbouring lanes exchange values so that each
// stores those of one pixel, and a warp 16 neighbouring pixels of a channel at a time: memory is
// slow where less than 32 bytes are written together.
template <class T>
class PlaneMemory {
 public:
  template <int kColumns>
  __device__ PlaneMemory(const TileOutput& out, const Lane& lane, const WarpRun<kColumns>& run)
      : plane_(static_cast<int32_t>(out.plane_pixels)), has_low_(lane.q % 2 == 0) {
    const int32_t index = has_low_ ? run.pixels[0].index : run.pixels[1].index;
    const int32_t pixel = max(index, 0), image = pixel / plane_;
    exists_ = index >= 0;
    // The channels of the lane of even q, then those of its neighbour.
    const int32_t channel = lane.channel - (has_low_ ? 0 : kLaneChannels);
    at_ = pixel + (image * (out.channels - 1) + channel) * plane_;
  }

  __device__ void store(void* data, int group, const Group& y) const {
    T* to = static_cast<T*>(data) + at_;
#pragma unroll
    for (int k = 0; k < kLaneChannels; ++k) {
      const float kept = has_low_ ? y[0][k] : y[1][k];
      const float other = __shfl_xor_sync(kWholeWarp, has_low_ ? y[1][k] : y[0][k], 1);
      const int64_t channel = group * kGroup + k;
      store_if(exists_, to + channel * plane_, from_float<T>(has_low_ ? kept : other));
      store_if(exists_, to + (channel + kLaneChannels) * plane_,
               from_float<T>(has_low_ ? other : kept));
    }
  }

 private:
  int32_t plane_;
  bool has_low_, exists_;
  int64_t at_;
};

// The common case, in which nothing is decided for each value or group.
template <class Memory, int kColumns, class Scale>
__device__ void store_plain_run(const TileOutput& out, const Lane& lane,
                                const WarpRun<kColumns>& run, const Scale& scale,
                                GroupTable table) {
  constexpr int kGroups = kColumns / kGroup;
  const Memory memory(out, lane, run);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    Group y;
    scale_group<kColumns, true>(out, run, group, scale.of(group), table, y);
    if (group + 1 < kGroups) table = load_table(run, group + 1);
    memory.store(out.data, group, y);
  }
}

// The residual is loaded at once, so that it is waited for once.
template <class T, int kColumns, class Scale>
__device__ void store_fused_run(const TileOutput& out, const Lane& lane,
                                const WarpRun<kColumns>& run, const Scale& scale,
                                GroupTable table) {
  constexpr int kGroups = kColumns / kGroup;
  const Epilogue& epilogue = out.epilogue;
  const PixelMemory<T> memory(out, lane, run);
  LaneValues<T> residual[kGroups];
  if (epilogue.residual) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      residual[group] = memory.load(epilogue.residual, group);
    }
  }
  uint32_t bytes[kLanePixels] = {};
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    Group y;
    scale_group<kColumns, false>(out, run, group, scale.of(group), table, y);
    if (group + 1 < kGroups) table = load_table(run, group + 1);
    if (epilogue.residual) add_values(residual[group], y);
    if (epilogue.activation.enabled) activate_group(out, lane, group, y);
    if (epilogue.bits) compare_group(lane, group, y, bytes);
    memory.store(out.data, group, y);
  }
  if (epilogue.bits) store_bits(out, lane, run, epilogue.bits, bytes, 0);
}

// Bits alone, from comparing sums with limits.
template <int kColumns, class Scale>
__device__ void store_bits_run(const TileOutput& out, const Lane& lane,
                               const WarpRun<kColumns>& run, const Scale& limits, GroupTable table,
                               uint32_t flipped) {
  constexpr int kGroups = kColumns / kGroup;
  uint32_t bytes[kLanePixels] = {};
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const GroupScale limit = limits.of(group);
#pragma unroll
    for (int row = 0; row < kLanePixels; ++row) {
      const int32_t window = -2 * run.window_bits[row];
      uint32_t misses = 0;  // The last channel first: the signs of acc - limit.
#pragma unroll
      for (int k = kLaneChannels - 1; k >= 0; --k) {
        const int i = k / kQuad, j = k % kQuad;
        const int32_t t = table.rows[row][i].values[j];
        const int32_t sum = 4 * accumulator(run, group, row, k) + t;
        const int32_t above = sum + window + __float_as_int(limit.scale[i].values[j]);
        misses = __funnelshift_l(above, misses, 1);
      }
      bytes[row] |= (~misses & 0xff) << 8 * group;
    }
    if (group + 1 < kGroups) table = load_table(run, group + 1);
  }
  store_bits(out, lane, run, out.data, bytes, flipped);
}

template <int kColumns, class Scale>
__device__ void store_any_run(const TileOutput& out, const Lane& lane, const WarpRun<kColumns>& run,
                              const Scale& scale, GroupTable table) {
  constexpr int kGroups = kColumns / kGroup;
  void* bits = out.epilogue.out_type == DataType::kBits ? out.data : out.epilogue.bits;
  uint32_t bytes[kLanePixels] = {};
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    if (lane.first_channel + group * kGroup >= out.channels) break;
    const Place place = locate_group(out, lane, run, group);
    Group y;
    scale_group<kColumns, false>(out, run, group, scale.of(group), table, y);
    if (group + 1 < kGroups) table = load_table(run, group + 1);
    if (out.epilogue.residual) add_residual(out, place, y);
    if (out.epilogue.activation.enabled) activate_group(out, lane, group, y);
    if (bits) compare_group(lane, group, y, bytes);
    store_values(out, place, y);
  }
  if (bits) store_bits(out, lane, run, bits, bytes, 0);
}

// A run whose sums are still to come. pixel: the one of a number among the warp's 16.
template <int kColumns, class GetPixel>
__device__ WarpRun<kColumns> locate_run(const HaloConv& conv, const Lane& lane,
                                        const GetPixel& pixel) {
  WarpRun<kColumns> run;
#pragma unroll
  for (int row = 0; row < kLanePixels; ++row) {
    run.pixels[row] = pixel(lane.row + row * kWarpPixels / kLanePixels);
    run.table[row] = shared<int32_t>(conv.at.table) + run.pixels[row].table + lane.column;
  }
  return run;
}

// With its sums. table: of its first group.
template <int kColumns, class Scale>
__device__ void store_run(const TileConv& args, const Lane& lane, const WarpRun<kColumns>& run,
                          const Scale& scale, GroupTable table) {
  const auto& [conv, out] = args;
  if (lane.compares) {
    const int word = (lane.column - lane.q * kLaneChannels) / kGroup + lane.q;
    return store_bits_run(out, lane, run, scale, table, flipped_words(conv)[word % 4]);
  }
  const bool all_exist = lane.first_channel + kColumns <= out.channels;
  const Finish finish = all_exist ? out.finish : Finish::kAny;
  // Not by a table of jumps, which takes long to read.
  if (finish == Finish::kPlainFloat16) {
    return store_plain_run<PixelMemory<__half>>(out, lane, run, scale, table);
  }
  switch (finish) {
    case Finish::kPlainBFloat16:
      return store_plain_run<PixelMemory<__nv_bfloat16>>(out, lane, run, scale, table);
    case Finish::kPlainFloat32:
      return store_plain_run<PixelMemory<float>>(out, lane, run, scale, table);
    case Finish::kPlanesFloat16:
      return store_plain_run<PlaneMemory<__half>>(out, lane, run, scale, table);
    case Finish::kPlanesBFloat16:
      return store_plain_run<PlaneMemory<__nv_bfloat16>>(out, lane, run, scale, table);
    case Finish::kPlanesFloat32:
      return store_plain_run<PlaneMemory<float>>(out, lane, run, scale, table);
    case Finish::kFusedFloat16:
      return store_fused_run<__half>(out, lane, run, scale, table);
    case Finish::kFusedBFloat16:
      return store_fused_run<__nv_bfloat16>(out, lane, run, scale, table);
    default:
      return store_any_run(out, lane, run, scale, table);
  }
}

}  // namespace binconv::cuda

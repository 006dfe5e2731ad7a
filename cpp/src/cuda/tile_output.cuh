#pragma once

#include "binconv/conv2d.h"
#include "check.h"
#include "cuda/halo.cuh"
#include "cuda/numeric.cuh"

// What the tensor-core kernels are to make of their sums, and what a warp holds while it does.
//
// Of a warp's 16 pixels and each group of 32 channels, lane 4 * r + q holds pixels r and r + 8 and
// the 8 neighbouring channels from 8 * q on: a value's channel 2 * j + c among them is column 8 * j
// + 2 * q + c of the multiplication (prepared_weight.h).

namespace binconv::cuda {

constexpr int kWarpPixels = 16;
constexpr int kGroup = 32;  // Channels that are finished together.
constexpr int kLaneChannels = 8;
constexpr int kLanePixels = 2;

// Ways to finish a run. Plain values come straight from scale and bias; they lie in 16-byte pieces
// of a lane's channels, or in planes (NCHW). Fused ones are 16-bit values in pieces, with a clamp,
// a residual like them, an activation or bits. kBits alone are found by comparing sums with limits.
enum class Finish {
  kAny,
  kPlainFloat16,
  kPlainBFloat16,
  kPlainFloat32,
  kPlanesFloat16,
  kPlanesBFloat16,
  kPlanesFloat32,
  kFusedFloat16,
  kFusedBFloat16,
  kBits
};

struct TileOutput {
  Epilogue epilogue;
  void* data;
  int64_t plane_pixels;  // out_height * out_width
  int64_t channels;
  int32_t packed_words;     // Of a pixel of bits.
  bool has_pieces;          // A lane's values are in 16-byte pieces, also in memory.
  bool residual_in_pieces;  // The same of the residual.
  Finish finish;            // Where all channels of a run exist.
};

// The parameter of a kernel.
struct TileConv {
  HaloConv conv;
  TileOutput out;
};

inline Finish finish_of(const Epilogue& epilogue, bool has_pieces, bool residual_in_pieces) {
  const auto of_type = [&](Finish float16, Finish bfloat16, Finish float32) {
    switch (epilogue.out_type) {
      case DataType::kFloat16:
        return float16;
      case DataType::kBFloat16:
        return bfloat16;
      case DataType::kFloat32:
        return float32;
      default:
        return Finish::kAny;
    }
  };
  const bool is_direct = !epilogue.residual && !epilogue.activation.enabled;
  if (epilogue.out_type == DataType::kBits) return is_direct ? Finish::kBits : Finish::kAny;
  const bool is_plain = is_direct && !epilogue.clamp && !epilogue.bits;
  if (epilogue.out_layout == Layout::kNCHW) {
    if (!is_plain) return Finish::kAny;
    return of_type(Finish::kPlanesFloat16, Finish::kPlanesBFloat16, Finish::kPlanesFloat32);
  }
  if (!has_pieces) return Finish::kAny;
  if (is_plain) {
    return of_type(Finish::kPlainFloat16, Finish::kPlainBFloat16, Finish::kPlainFloat32);
  }
  const bool has_other_residual =
      epilogue.residual && !(residual_in_pieces && epilogue.residual_type == epilogue.out_type);
  if (has_other_residual) return Finish::kAny;
  return of_type(Finish::kFusedFloat16, Finish::kFusedBFloat16, Finish::kAny);
}

inline TileOutput tile_output(const Conv2dArgs& args) {
  const Epilogue& epilogue = args.epilogue;
  const int64_t channels = args.shape.weight.out_channels;
  const auto in_pieces = [&](const void* data, int64_t value_bytes) {
    return epilogue.out_layout == Layout::kNHWC && channels * value_bytes % kVectorBytes == 0 &&
           is_vector_aligned(data);
  };
  const bool has_pieces = epilogue.out_type != DataType::kBits &&
                          in_pieces(args.output, element_bytes(epilogue.out_type));
  const bool residual_in_pieces =
      epilogue.residual && in_pieces(epilogue.residual, element_bytes(epilogue.residual_type));
  return {.epilogue = epilogue,
          .data = args.output,
          .plane_pixels = args.shape.out_height() * args.shape.out_width(),
          .channels = channels,
          .packed_words = static_cast<int32_t>(packed_bytes(channels) / sizeof(uint32_t)),
          .has_pieces = has_pieces,
          .residual_in_pieces = residual_in_pieces,
          .finish = finish_of(epilogue, has_pieces, residual_in_pieces)};
}

inline TileConv tile_conv(const Conv2dArgs& args, const HaloPlan& plan) {
  return {halo_conv(args, plan), tile_output(args)};
}

// What one lane has of a group.
using Group = float[kLanePixels][kLaneChannels];

constexpr int kQuad = 4;  // Numbers that come at a time from shared memory.
constexpr int kQuads = kLaneChannels / kQuad;
template <class T>
using LaneVector = Vector<T, kQuad>[kQuads];  // Of the lane's channels of a group.

template <class T>
__device__ void load_lane(const T* from, LaneVector<T>& to) {
#pragma unroll
  for (int i = 0; i < kQuads; ++i) to[i] = load_vector<kQuad>(from + i * kQuad);
}

// A lane's place among those of a warp, and the channels of all runs that it finishes.
struct Lane {
  int32_t row, q;         // Number 4 * row + q.
  int32_t column;         // The first channel, of the block.
  int32_t channel;        // The same, of all.
  int32_t first_channel;  // Of the warp's runs.
  bool compares;          // Bits are found by comparing sums with limits.
  const float* terms;     // kScale and so on of `column`.
};

// What a lane needs of its channels at all times: what they scale their sums with or, where only
// bits are asked for, what limits they compare them with.
struct GroupScale {
  LaneVector<float> scale, bias;  // Limits are the bits of integers, in `scale`.
};

// Shared memory feeds the tensor cores too and is slow while they work: where registers are to
// spare, they keep this.
template <int kColumns, bool kIsKept>
class LaneScale {
 public:
  explicit __device__ LaneScale(const Lane& lane)
      : scale_(lane.terms + (lane.compares ? kBitLimit : kScale) * kMostChannels),
        bias_(lane.terms + kBias * kMostChannels) {
    if constexpr (kIsKept) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) load(group, kept_[group]);
    }
  }

  __device__ GroupScale of(int group) const {
    if constexpr (kIsKept) return kept_[group];
    GroupScale loaded;
    load(group, loaded);
    return loaded;
  }

 private:
  static constexpr int kGroups = kColumns / kGroup;

  __device__ void load(int group, GroupScale& to) const {
    load_lane(scale_ + group * kGroup, to.scale);
    load_lane(bias_ + group * kGroup, to.bias);
  }

  const float *scale_, *bias_;
  GroupScale kept_[kIsKept ? kGroups : 1];
};

// What a warp turns into outputs.
template <int kColumns>
struct WarpRun {
  Pixel pixels[kLanePixels];          // Of this lane.
  const int32_t* table[kLanePixels];  // T of the pixel, from the lane's first channel on.
  const int32_t* acc;                 // kColumns / 2 of them.
  int32_t window_bits[kLanePixels];   // popcount(a)
};

// T of a group, for the lane's pixels.
struct GroupTable {
  LaneVector<int32_t> rows[kLanePixels];
};

template <int kColumns>
__device__ GroupTable load_table(const WarpRun<kColumns>& run, int group) {
  GroupTable table;
#pragma unroll
  for (int row = 0; row < kLanePixels; ++row) {
    load_lane(run.table[row] + group * kGroup, table.rows[row]);
  }
  return table;
}

// What a lane has of pixel `row` of its pixels and channel `channel` of a group's.
template <int kColumns>
__device__ int32_t accumulator(const WarpRun<kColumns>& run, int group, int row, int channel) {
  return run.acc[4 * (4 * group + channel / 2) + 2 * row + channel % 2];
}

}  // namespace binconv::cuda

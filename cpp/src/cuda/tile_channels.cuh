#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/tile_output.cuh"

// What the epilogue of the tensor-core kernels needs of a block's channels, brought to shared
// memory once for all of the block's tiles.

namespace binconv::cuda {

// For two channels at a time: scales, then biases; and thresholds, then signs that turn y <=
// threshold into y >= threshold. For all of them: the activation's first shifts, slopes, second
// shifts. Work for `threads` threads, of which this one is number `thread`.
__device__ inline void load_channels(const TileOutput& out, const HaloConv& conv, int thread,
                                     int threads) {
  float* scaling = shared<float>(conv.at.scaling);
  float* limits = shared<float>(conv.at.limits);
  float* activation = shared<float>(conv.at.activation);
  const int32_t channels = conv.plan.block_channels;
  for (int32_t i = thread; i < channels; i += threads) {
    const int64_t channel = first_channel(conv) + i;
    const ChannelTerms terms =
        channel < out.channels ? load_channel_terms(out.epilogue, channel) : ChannelTerms{};
    const int32_t at = i / 2 * 4 + i % 2;
    scaling[at] = terms.scale, scaling[at + 2] = terms.bias;
    limits[at] = terms.below ? -terms.threshold : terms.threshold;
    limits[at + 2] = terms.below ? -0.0f : 0.0f;
    activation[i] = terms.activation.in_shift;
    activation[channels + i] = terms.activation.slope;
    activation[2 * channels + i] = terms.activation.out_shift;
  }
}

__device__ inline bool passes(float y, float limit, float sign) {
  return __int_as_float(__float_as_int(y) ^ __float_as_int(sign)) >= limit;
}

// Where out.is_bits, y rises or falls with acc, and all that y is needed for is where it passes the
// threshold: bit = (acc >= limit) != is_flipped.
struct BitLimit {
  int32_t limit;
  bool is_flipped;
};

__device__ inline BitLimit find_bit_limit(const ChannelTerms& terms, bool clamp) {
  const auto bit = [&](int32_t acc) {
    const float y = scale_and_bias(clamp ? max(acc, 0) : acc, terms);
    return passes(y, terms.threshold, terms.below);
  };
  int32_t below = -(1 << 22), limit = 1 << 22;  // Beyond all sums.
  const bool is_flipped = bit(below);
  while (limit - below > 1) {
    const int32_t middle = below + (limit - below) / 2;
    (bit(middle) == is_flipped ? below : limit) = middle;
  }
  return {limit, is_flipped};
}

// The block's, in shared memory.
struct BitLimits {
  int32_t* limits;       // Of each channel.
  uint32_t* flipped;     // Of each 32 channels, a word of bits.
  uint32_t* not_rising;  // Of each 32 channels: whether y neither rises nor falls in some channel.
  int32_t* are_used;     // Whether T (halo.cuh) has the limits subtracted, and no kMagicBits.
};

__device__ inline BitLimits bit_limits(const HaloConv& conv) {
  const int32_t channels = conv.plan.block_channels;
  int32_t* limits = shared<int32_t>(conv.at.bit_limits);
  uint32_t* words = reinterpret_cast<uint32_t*>(limits + channels);
  return {limits, words, words + channels / kGroup,
          reinterpret_cast<int32_t*>(words + 2 * channels / kGroup)};
}

// As load_channels.
__device__ inline void make_bit_limits(const TileOutput& out, const HaloConv& conv, int thread,
                                       int threads) {
  const BitLimits to = bit_limits(conv);
  for (int32_t i = thread; i < conv.plan.block_channels; i += threads) {
    const int64_t channel = first_channel(conv) + i;
    const ChannelTerms terms =
        channel < out.channels ? load_channel_terms(out.epilogue, channel) : ChannelTerms{};
    const BitLimit found = find_bit_limit(terms, out.epilogue.clamp);
    to.limits[i] = found.limit;
    const uint32_t flipped = __ballot_sync(kWholeWarp, found.is_flipped);
    const uint32_t not_rising = __ballot_sync(kWholeWarp, isinf(terms.scale));  // 0 gives NaN.
    if (i % kGroup == 0) to.flipped[i / kGroup] = flipped, to.not_rising[i / kGroup] = not_rising;
  }
}

__device__ inline bool can_use_bit_limits(const TileOutput& out, const HaloConv& conv) {
  bool can = out.is_bits;
  for (int32_t i = 0; can && i < conv.plan.block_channels / kGroup; ++i) {
    can = bit_limits(conv).not_rising[i] == 0;
  }
  return can;
}

// All that the epilogue needs of the block's channels: work for `threads` threads, a multiple of
// the channels. get_tap_counts(): returns when they are in shared memory; synchronize(): waits for
// all these threads.
template <class GetTapCounts, class Synchronize>
__device__ void prepare_channels(const TileConv& args, int thread, int threads,
                                 const GetTapCounts& get_tap_counts,
                                 const Synchronize& synchronize) {
  const auto& [conv, out] = args;
  load_channels(out, conv, thread, threads);
  if (out.is_bits) make_bit_limits(out, conv, thread, threads);
  get_tap_counts();
  sum_tap_counts(conv, thread, threads);
  synchronize();
  const BitLimits bits = bit_limits(conv);
  const bool are_used = can_use_bit_limits(out, conv);
  if (thread == 0) *bits.are_used = are_used;
  const int32_t channel = thread % conv.plan.block_channels;
  make_table(conv, thread, threads, are_used ? -kMagicBits - bits.limits[channel] : 0);
  synchronize();
}

}  // namespace binconv::cuda

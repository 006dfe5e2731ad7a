#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/tile_output.cuh"

// What the epilogue of the tensor-core kernels needs of a block's channels, brought to shared
// memory once for all of the block's tiles.

namespace binconv::cuda {

__device__ inline bool passes(float y, float limit, float sign) {
  return __int_as_float(__float_as_int(y) ^ __float_as_int(sign)) >= limit;
}

// For Finish::kBits, y rises or falls with acc, and all that y is needed for is where it passes the
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
  constexpr int32_t kBeyond = 1 << 22;  // All sums.
  const bool is_flipped = bit(-kBeyond);
  // Mostly it is where the real numbers cross; rounding can move it far away, though.
  const float crossing = (terms.threshold - terms.bias) / terms.scale;
  const int32_t guess =
      __float2int_rn(fminf(fmaxf(ceilf(crossing), 1.0f - kBeyond), float{kBeyond - 1}));
  for (int32_t limit = guess - 1; limit <= guess + 1; ++limit) {
    if (bit(limit) != is_flipped && bit(limit - 1) == is_flipped) return {limit, is_flipped};
  }
  int32_t below = -kBeyond, limit = kBeyond;
  while (limit - below > 1) {
    const int32_t middle = below + (limit - below) / 2;
    (bit(middle) == is_flipped ? below : limit) = middle;
  }
  return {limit, is_flipped};
}

__device__ inline float* channel_terms(const HaloConv& conv, ChannelTerm which) {
  return shared<float>(conv.at.terms) + which * kMostChannels;
}

// For every 32 channels of the block, words of bits: where bits are flipped, and where y neither
// rises nor falls.
__device__ inline uint32_t* flipped_words(const HaloConv& conv) {
  return reinterpret_cast<uint32_t*>(channel_terms(conv, kChannelTerms));
}
__device__ inline uint32_t* unordered_words(const HaloConv& conv) {
  return flipped_words(conv) + conv.plan.block_channels / kGroup;
}

// Of the block's channel i; a warp has 32 neighbours.
__device__ inline void make_bit_limit(const HaloConv& conv, int32_t i, const ChannelTerms& terms,
                                      bool clamp) {
  const BitLimit found = find_bit_limit(terms, clamp);
  // The sums that this is compared with come as the bits of kMagic + T.
  channel_terms(conv, kBitLimit)[i] = __int_as_float(-kMagicBits - found.limit);
  const uint32_t flipped = __ballot_sync(kWholeWarp, found.is_flipped);
  const uint32_t unordered = __ballot_sync(kWholeWarp, isinf(terms.scale));  // 0 gives NaN.
  if (i % kGroup != 0) return;
  flipped_words(conv)[i / kGroup] = flipped;
  unordered_words(conv)[i / kGroup] = unordered;
}

// All that the epilogue needs of the block's channels: work for `threads` threads, a multiple of
// the channels, of which this one is number `thread`.
__device__ inline void prepare_channels(const TileConv& args, int thread, int threads) {
  const auto& [conv, out] = args;
  for (int32_t i = thread; i < conv.plan.block_channels; i += threads) {
    const int64_t channel = first_channel(conv) + i;
    const ChannelTerms terms =
        channel < out.channels ? load_channel_terms(out.epilogue, channel) : ChannelTerms{};
    channel_terms(conv, kScale)[i] = terms.scale;
    channel_terms(conv, kBias)[i] = terms.bias;
    channel_terms(conv, kThreshold)[i] = terms.below ? -terms.threshold : terms.threshold;
    channel_terms(conv, kThresholdSign)[i] = terms.below ? -0.0f : 0.0f;
    channel_terms(conv, kInShift)[i] = terms.activation.in_shift;
    channel_terms(conv, kSlope)[i] = terms.activation.slope;
    channel_terms(conv, kOutShift)[i] = terms.activation.out_shift;
    if (out.finish == Finish::kBits) make_bit_limit(conv, i, terms, out.epilogue.clamp);
  }
  make_table(conv, thread, threads);
}

// After prepare_channels. column: the first channel, of the block, of the warp's runs.
__device__ inline Lane make_lane(const TileConv& args, int32_t column) {
  const auto& [conv, out] = args;
  Lane lane;
  lane.row = threadIdx.x % kWarpSize / 4, lane.q = threadIdx.x % 4;
  lane.first_channel = first_channel(conv) + column;
  lane.column = column + lane.q * kLaneChannels;
  lane.channel = lane.first_channel + lane.q * kLaneChannels;
  lane.terms = shared<float>(conv.at.terms) + lane.column;
  lane.compares = out.finish == Finish::kBits;
  for (int32_t i = 0; lane.compares && i < conv.plan.block_channels / kGroup; ++i) {
    lane.compares = unordered_words(conv)[i] == 0;
  }
  return lane;
}

}  // namespace binconv::cuda

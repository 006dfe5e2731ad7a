#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>

#include "check.h"
#include "cuda/cuda.h"
#include "cuda/halo.cuh"
#include "cuda/launch.cuh"
#include "cuda/prepared_weight.h"
#include "cuda/tile_epilogue.cuh"

// Ampere and Ada: mma.sync with AND and popcount, from the halo tiles of halo.h. All warps of a
// block load together with cp.async, and each multiplies 64 pixels (a run) with 64 channels.

namespace binconv::cuda {
namespace {

using Multiply = cute::SM80_16x8x256_S32U1U1S32_TN_ANDPOPC;
using CopyAsync = cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kUnitChannels = 64;
constexpr int kRowBlocks = kRunPixels / kWarpPixels;
constexpr int kColumnBlocks = kUnitChannels / 8;
constexpr int kStreamedChannels = 128;
constexpr int kStreamedRuns = kWarps / (kStreamedChannels / kUnitChannels);

// Of 64 pixels and 64 channels, as tile_epilogue.cuh wants 16 pixels of them.
using Accumulators = int32_t[kRowBlocks][4 * kColumnBlocks];

__device__ void copy_async(const void* from, void* to, bool is_inside) {
  CopyAsync::copy(*static_cast<const cute::uint128_t*>(from), *static_cast<cute::uint128_t*>(to),
                  is_inside);
}

// Starts to load the halo of a tile, stage_chunks chunks from chunk `first`.
__device__ void load_halo(const HaloConv& conv, const TilePosition& tile, int32_t first, int slot) {
  const HaloPlan& plan = conv.plan;
  const int32_t pixels = plan.halo_pixels();
  for (int32_t i = threadIdx.x; i < plan.phases() * pixels; i += kThreads) {
    const int32_t phase = i / pixels, pixel = i - phase * pixels;
    const TilePosition in_tile = halo_position(conv, pixel);
    const int32_t phase_row = phase / plan.phases_width;
    const int32_t phase_column = phase - phase_row * plan.phases_width;
    const int32_t n = tile.image + in_tile.image;
    const int32_t h = (tile.row + in_tile.row) * conv.stride_height - conv.pad_top + phase_row;
    const int32_t w =
        (tile.column + in_tile.column) * conv.stride_width - conv.pad_left + phase_column;
    const bool is_inside =
        n < conv.batch && h >= 0 && h < conv.in_height && w >= 0 && w < conv.in_width;
    const int64_t index = is_inside ? (int64_t{n} * conv.in_height + h) * conv.in_width + w : 0;
    const uint4* from = conv.input + index * conv.pixel_chunks + first_chunk(conv) + first;
    uint4* to = shared<uint4>(conv.at.halo + slot * plan.stage_bytes()) +
                phase * plan.region_pixels + pixel;
    for (int32_t chunk = 0; chunk < plan.stage_chunks; ++chunk) {
      const bool is_chunk = first + chunk < conv.chunks;
      copy_async(is_chunk ? from + chunk : from, to, is_inside && is_chunk);
      to += plan.phases() * plan.region_pixels;
    }
  }
}

// Starts to load 16 bytes of the weights of one chunk and tap, atom = chunk * taps + tap, to a
// place in units of 16 bytes.
__device__ void load_weights(const HaloConv& conv, int32_t atom, int32_t channel, int32_t to) {
  const int64_t from = atom * conv.prepared_channels + first_channel(conv) + channel;
  copy_async(conv.weights + from * kChunkBytes, shared<uint4>(conv.at.weights) + to, true);
}

__device__ void load_resident_weights(const HaloConv& conv) {
  const int32_t channels = conv.plan.block_channels;
  for (int32_t i = threadIdx.x; i < conv.chunks * conv.taps * channels; i += kThreads) {
    const int32_t atom = i / channels;
    load_weights(conv, atom, i - atom * channels, i);
  }
}

// Starts to load the pairs of up to kStreamPairs taps from `first` for chunks 2 * step, 2 * step
// + 1.
__device__ void stream_weights(const HaloConv& conv, int32_t step, int32_t first, int slot) {
  const int32_t channels = conv.plan.block_channels;
  const int32_t atoms = 2 * min(conv.taps - first, kStreamPairs);
  for (int32_t i = threadIdx.x; i < atoms * channels; i += kThreads) {
    const int32_t atom = i / channels, channel = i - atom * channels;
    const int32_t half = atom % 2, tap = atom / 2;
    // Where the number of chunks is odd, the last pair's second half meets a halo of zeros.
    const int32_t chunk = min(2 * step + half, conv.chunks - 1);
    load_weights(conv, chunk * conv.taps + first + tap, channel,
                 ((2 * slot + half) * kStreamPairs + tap) * channels + channel);
  }
}

__device__ void load_tap_counts(const HaloConv& conv) {
  const int32_t channels = conv.plan.block_channels;
  for (int32_t i = threadIdx.x; i < conv.taps * channels; i += kThreads) {
    const int32_t tap = i / channels;
    shared<int32_t>(conv.at.tap_counts)[i] =
        conv.tap_counts[tap * conv.prepared_channels + first_channel(conv) + i - tap * channels];
  }
}

// Four 8x16-byte matrices; lane l gives row l % 8 of matrix l / 8, as a unit of 16 bytes.
__device__ void load_matrices(uint32_t unit, uint32_t (&matrices)[4]) {
  const auto* row = reinterpret_cast<const cute::uint128_t*>(shared_memory) + unit;
  cute::SM75_U32x4_LDSM_N::copy(*row, matrices[0], matrices[1], matrices[2], matrices[3]);
}

// halo, weights: where the warp's pixels and channels start, in units of 16 bytes.
__device__ void multiply_pair(Accumulators& acc, uint32_t halo, uint32_t weights,
                              const HaloPair& pair) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  halo += (pair.halo & 0xffff) + lane % 16 + lane / 16 * (pair.halo >> 16);
  weights +=
      (pair.weights & 0xffff) + lane / 16 * 8 + lane % 8 + lane / 8 % 2 * (pair.weights >> 16);
  uint32_t a[kRowBlocks][4];
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i) load_matrices(halo + i * kWarpPixels, a[i]);
#pragma unroll
  for (int j = 0; j < kColumnBlocks; j += 2) {
    uint32_t b[4];
    load_matrices(weights + j * 8, b);
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        int32_t* d = acc[i] + 4 * (j + k);
        uint32_t sums[4];
        Multiply::fma(sums[0], sums[1], sums[2], sums[3], a[i][0], a[i][1], a[i][2], a[i][3],
                      b[2 * k], b[2 * k + 1], d[0], d[1], d[2], d[3]);
#pragma unroll
        for (int s = 0; s < 4; ++s) d[s] = static_cast<int32_t>(sums[s]);
      }
    }
  }
}

// A warp's share of a tile.
struct Unit {
  int32_t run, column;
};

__device__ Unit unit_at(const HaloPlan& plan, int32_t index) {
  const int32_t columns = plan.block_channels / kUnitChannels;
  return {index / columns, index % columns * kUnitChannels};
}

__device__ void finish(const TileConv& args, const Unit& unit, const Accumulators& acc,
                       int pixels_slot) {
  const Pixel* pixels = pixels_at(args.conv, pixels_slot, unit.run);
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i) {
    store_run<kUnitChannels>(args.out, args.conv, unit.column, acc[i], pixels + i * kWarpPixels,
                             threadIdx.x / kWarpSize);
  }
}

// Counts a halo that has arrived and, after the last step of a tile, makes its pixels.
__device__ void count_halo(const HaloConv& conv, const TilePosition& tile, int slot, int32_t step,
                           bool is_last_step) {
  count_pixels(conv, slot, step == 0, threadIdx.x, kThreads);
  if (!is_last_step) return;
  __syncthreads();
  make_pixels(conv, tile, 0, threadIdx.x, kThreads);
  __syncthreads();
}

// Resident weights: the next tile's halo loads while this one is multiplied.
__device__ void multiply_resident(const TileConv& args) {
  const HaloConv& conv = args.conv;
  const HaloPlan& plan = conv.plan;
  load_resident_weights(conv);
  int slot = 0;
  const auto load = [&](int32_t tile, int to) {
    if (tile < plan.tiles) load_halo(conv, tile_position(plan, tile), 0, to);
    cute::cp_async_fence();
  };
  load(blockIdx.x, slot);
  for (int32_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    load(tile + gridDim.x, slot ^ 1);
    cute::cp_async_wait<1>();
    __syncthreads();
    count_halo(conv, tile_position(plan, tile), slot, 0, true);
    const int32_t units = plan.runs * (plan.block_channels / kUnitChannels);
    for (int32_t i = threadIdx.x / kWarpSize; i < units; i += kWarps) {
      const Unit unit = unit_at(plan, i);
      const uint32_t halo = (conv.at.halo + slot * plan.stage_bytes()) / kChunkBytes;
      Accumulators acc = {};
      for (int32_t k = 0; k < plan.pairs; ++k) {
        multiply_pair(acc, halo + unit.run * kRunPixels,
                      conv.at.weights / kChunkBytes + unit.column, conv.tables.pairs[k]);
      }
      finish(args, unit, acc, 0);
    }
    __syncthreads();
    slot ^= 1;
  }
}

// Streamed weights: a tile has at most one unit for each warp. Its work is cut into slots of up to
// kStreamPairs taps of two chunks; the loads run a few slots ahead, but not so far that a halo
// would overwrite one in use.
__device__ void multiply_streamed(const TileConv& args) {
  const HaloConv& conv = args.conv;
  const HaloPlan& plan = conv.plan;
  const int32_t step_slots = ceil_div(conv.taps, kStreamPairs);
  const int32_t steps = stage_steps(conv), slots = steps * step_slots;
  const int32_t ahead = min(step_slots, kStreamStages - 1);
  const Unit unit = unit_at(plan, threadIdx.x / kWarpSize);
  for (int32_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const TilePosition at = tile_position(plan, tile);
    const auto load = [&](int32_t index) {
      const int32_t step = index / step_slots, first = index % step_slots * kStreamPairs;
      if (index < slots) {
        if (first == 0) load_halo(conv, at, 2 * step, step % kHaloStages);
        stream_weights(conv, step, first, index % kStreamStages);
      }
      cute::cp_async_fence();
    };
    for (int32_t i = 0; i < ahead; ++i) load(i);
    Accumulators acc = {};
    for (int32_t index = 0; index < slots; ++index) {
      load(index + ahead);
      // All loads but those of the slots ahead have arrived.
      if (ahead == 1) cute::cp_async_wait<1>();
      if (ahead == 2) cute::cp_async_wait<2>();
      __syncthreads();
      const int32_t step = index / step_slots, first = index % step_slots * kStreamPairs;
      if (first == 0) count_halo(conv, at, step % kHaloStages, step, step + 1 == steps);
      const uint32_t halo = (conv.at.halo + step % kHaloStages * plan.stage_bytes()) / kChunkBytes;
      const uint32_t weights = conv.at.weights / kChunkBytes +
                               index % kStreamStages * kStreamPairs * 2 * kStreamedChannels;
      // What a warp without a run would multiply may just be loading.
      const int32_t pairs = unit.run < plan.runs ? min(conv.taps - first, kStreamPairs) : 0;
      for (int32_t k = 0; k < pairs; ++k) {
        multiply_pair(acc, halo + unit.run * kRunPixels, weights + unit.column,
                      conv.tables.pairs[first + k]);
      }
      __syncthreads();
    }
    if (unit.run < plan.runs) finish(args, unit, acc, 0);
    __syncthreads();
  }
}

template <bool kStreamed>
__global__ void __launch_bounds__(kThreads, 1)
    conv2d_kernel(const __grid_constant__ TileConv args) {
#if __CUDA_ARCH__ >= 800
  write_zeros(args.conv, threadIdx.x, kThreads);
  const auto get_tap_counts = [&] {
    load_tap_counts(args.conv);
    __syncthreads();
  };
  prepare_channels(args, threadIdx.x, kThreads, get_tap_counts, [] { __syncthreads(); });
  if constexpr (kStreamed) {
    multiply_streamed(args);
  } else {
    multiply_resident(args);
  }
#endif
}

// Machine code runs on later minor versions too, but for 8.7, which is Tegra. Later architectures
// only emulate these instructions.
bool runs_on(const Target& target) {
  if (!target.is_cuda) return false;
  switch (target.compute_capability) {
    case 80:
    case 86:
    case 89:
      return has_machine_code("80");
    case 90:
      return has_machine_code("90a");
    default:
      return false;
  }
}

bool accepts(const Conv2dShape& shape) {
  constexpr int64_t kLeastShared = 99 * 1024;  // What a block can have on sm_86 and sm_89.
  return halo_accepts(shape, kLeastShared);
}

void launch_conv2d(const Conv2dArgs& args, const Queue& queue) {
  const HaloLimits limits = {.multiprocessors = multiprocessors(queue.device()),
                             .shared_bytes = shared_bytes(queue.device()),
                             .streamed_runs = kStreamedRuns,
                             .least_channels = kUnitChannels};
  const TileConv conv = tile_conv(args, plan_halo(args.shape, limits));
  const HaloPlan& plan = conv.conv.plan;
  launch("binary_conv2d", queue,
         {tile_blocks(args.shape, plan, limits), kThreads, static_cast<size_t>(conv.conv.at.total)},
         plan.is_streamed ? conv2d_kernel<true> : conv2d_kernel<false>, conv);
}

}  // namespace

const Kernel kConv2dSm80 = {.name = "cuda_sm80",
                            .runs_on = runs_on,
                            .accepts = accepts,
                            .prepared_bytes = prepared_bytes,
                            .prepare = prepare_weight,
                            .workspace_bytes = no_workspace,
                            .launch = launch_conv2d};

}  // namespace binconv::cuda

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>

#include "check.h"
#include "cuda/architectures.h"
#include "cuda/conv2d_pointwise.h"
#include "cuda/cuda.h"
#include "cuda/halo.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma_b1.cuh"
#include "cuda/prepared_weight.h"
#include "cuda/tile_epilogue.cuh"

// Ampere and Ada: mma.sync with AND and popcount, from the halo tiles of halo.h. All warps of a
// block load together with cp.async, and each multiplies 32 pixels with 64 channels.

namespace binconv::cuda {
namespace {

using CopyAsync = cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>;

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kUnitChannels = 64;
constexpr int kUnitPixels = 32;
constexpr int kRowBlocks = kUnitPixels / kWarpPixels;
constexpr int kRunUnits = kRunPixels / kUnitPixels;
constexpr int kColumnBlocks = kUnitChannels / 8;
constexpr int kStreamedChannels = 128;
constexpr int kStreamedRuns = kWarps / kRunUnits / (kStreamedChannels / kUnitChannels);

// A lane's sums of 16 pixels of a unit, as tile_epilogue.cuh wants them; 8 columns are of ones.
constexpr int kSums = 4 * (kColumnBlocks + 1);
using Accumulators = int32_t[kRowBlocks][kSums];

__device__ void copy_async(const void* from, void* to, bool is_inside) {
  CopyAsync::copy(*static_cast<const cute::uint128_t*>(from), *static_cast<cute::uint128_t*>(to),
                  is_inside);
}

// Where a number of a tile's halo comes from, as a pixel of the input; negative if from nowhere.
__device__ int64_t halo_source(const HaloConv& conv, const TilePosition& tile, int32_t number) {
  const HaloPlan& plan = conv.plan;
  const int32_t phase = number / plan.region_pixels, pixel = number - phase * plan.region_pixels;
  const TilePosition in_tile = halo_position(conv, pixel);
  const int32_t phase_row = phase / plan.phases_width;
  const int32_t phase_column = phase - phase_row * plan.phases_width;
  const int32_t n = tile.image + in_tile.image;
  const int32_t h = (tile.row + in_tile.row) * conv.stride_height - conv.pad_top + phase_row;
  const int32_t w =
      (tile.column + in_tile.column) * conv.stride_width - conv.pad_left + phase_column;
  const bool is_inside = pixel < plan.halo_pixels() && n < conv.batch && h >= 0 &&
                         h < conv.in_height && w >= 0 && w < conv.in_width;
  return is_inside ? (int64_t{n} * conv.in_height + h) * conv.in_width + w : -1;
}

// Starts to load a stage of a halo, from chunk `first`. source_of: halo_source of a number.
template <class SourceOf>
__device__ void load_halo(const HaloConv& conv, int32_t first, int slot,
                          const SourceOf& source_of) {
  const HaloPlan& plan = conv.plan;
  const int32_t numbers = plan.phases() * plan.region_pixels;
  const uint4* input = conv.input + first_chunk(conv) + first;
  uint4* stage = shared<uint4>(conv.at.halo + slot * plan.stage_bytes());
  for (int32_t i = threadIdx.x; i < numbers; i += kThreads) {
    const int64_t source = source_of(i);
    const uint4* from = input + max(source, int64_t{0}) * conv.pixel_chunks;
    for (int32_t chunk = 0; chunk < plan.stage_chunks; ++chunk) {
      const bool is_chunk = first + chunk < conv.chunks;
      copy_async(is_chunk ? from + chunk : from, stage + chunk * numbers + i,
                 source >= 0 && is_chunk);
    }
  }
}

// Starts to load `taps` taps of one chunk of the block's weights, from tap `tap`, to a chunk of a
// part in shared memory.
__device__ void load_weights(const HaloConv& conv, int32_t chunk, int32_t tap, int32_t taps,
                             int32_t part, int32_t part_chunk) {
  const HaloPlan& plan = conv.plan;
  const int32_t first = first_channel(conv) / kCoreRows, groups = plan.block_channels / kCoreRows;
  uint4* start = shared<uint4>(conv.at.weights + part * plan.part_bytes()) +
                 part_chunk * plan.part_taps * kCoreRows;
  for (int32_t group = threadIdx.x / kWarpSize; group < groups; group += kWarps) {
    const int64_t atom = (int64_t{first + group} * conv.chunks + chunk) * conv.taps + tap;
    const uint4* from = conv.weights + atom * kCoreRows;
    uint4* to = start + group * plan.part_atoms() * kCoreRows;
    for (int32_t row = threadIdx.x % kWarpSize; row < taps * kCoreRows; row += kWarpSize) {
      copy_async(from + row, to + row, true);
    }
  }
}

__device__ void load_resident_weights(const HaloConv& conv) {
  const int32_t part_chunks = conv.plan.part_chunks;
  for (int32_t chunk = 0; chunk < conv.chunks; ++chunk) {
    load_weights(conv, chunk, 0, conv.taps, chunk / part_chunks, chunk % part_chunks);
  }
}

// A slot of a tile's work with streamed weights: up to kStreamTaps taps from `first` of chunks
// `chunk` and the next, and where these are in shared memory.
struct Slot {
  int32_t chunk = 0, first = 0, stage = 0, part = 0;

  __device__ int32_t taps(const HaloConv& conv) const {
    return min(conv.taps - first, kStreamTaps);
  }
  __device__ bool exists(const HaloConv& conv) const { return chunk < conv.chunks; }

  __device__ void advance(const HaloConv& conv) {
    part = part + 1 < conv.plan.parts ? part + 1 : 0;
    first += kStreamTaps;
    if (first < conv.taps) return;
    first = 0;
    chunk += 2;
    stage = stage + 1 < conv.plan.halo_stages ? stage + 1 : 0;
  }
};

// Starts to load a slot. Where its second chunk does not exist, what is there meets a halo of
// zeros. sources: halo_source of all numbers.
__device__ void load_slot(const HaloConv& conv, const Slot& slot, const int64_t* sources) {
  if (slot.first == 0) {
    load_halo(conv, slot.chunk, slot.stage, [&](int32_t number) { return sources[number]; });
  }
  for (int32_t k = 0; k < 2 && slot.chunk + k < conv.chunks; ++k) {
    load_weights(conv, slot.chunk + k, slot.first, slot.taps(conv), slot.part, k);
  }
}

// A warp's share of a tile, and what the lane loads of it: rows and matrices in units of 16 bytes.
struct Unit {
  int32_t pixel, column;      // The first ones.
  uint32_t rows[kRowBlocks];  // Of its pixels.
  uint32_t half;              // Whether it loads from the second chunk of a pair.
  uint32_t weights;           // Its row of the first two matrices of weights, first chunk.
  uint32_t weights_half;      // The same for the weights.
};

__device__ Unit unit_at(const HaloPlan& plan, int32_t index) {
  const int32_t columns = plan.block_channels / kUnitChannels;
  Unit unit = {index / columns * kUnitPixels, index % columns * kUnitChannels};
  const uint32_t lane = threadIdx.x % kWarpSize;
  unit.half = lane / 16;
  unit.weights = unit.column * plan.part_atoms() + lane / 16 * plan.part_atoms() * kCoreRows +
                 lane % kCoreRows;
  unit.weights_half = lane / 8 % 2;
  // The last run can have more pixels than the tile; what their taps reach may just be loading.
  const int32_t last = (plan.tile_rows * plan.tile_images - 1) * plan.pitch + plan.tile_columns - 1;
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i) {
    const int32_t row = threadIdx.x % kWarpPixels;
    unit.rows[i] = min(unit.pixel + i * kWarpPixels + row, last);
  }
  return unit;
}

// Four 8x16-byte matrices; lane l gives row l % 8 of matrix l / 8, as a unit of 16 bytes.
__device__ void load_matrices(uint32_t unit, uint32_t (&matrices)[4]) {
  const auto* row = reinterpret_cast<const cute::uint128_t*>(shared_memory) + unit;
  cute::SM75_U32x4_LDSM_N::copy(*row, matrices[0], matrices[1], matrices[2], matrices[3]);
}

// Whether a pair of resident weights is a lone tap, whose partner's are the atom of zeros.
__device__ bool is_lone(const HaloConv& conv, const HaloPair& pair) {
  const HaloPlan& plan = conv.plan;
  const uint32_t second = (pair.weights & 0xffff) + (pair.weights >> 16);
  const uint32_t zeros = conv.chunks / 2 * (plan.part_bytes() / kChunkBytes) +
                         static_cast<uint32_t>(conv.taps * kCoreRows);
  return conv.chunks % 2 == 1 && second == zeros;
}

// halo, weights: the stage and the weights, in units of 16 bytes. has_partner: else the pair is a
// lone tap, beside which there may be nothing, or something just loading.
__device__ void multiply_pair(Accumulators& acc, const HaloConv& conv, const Unit& unit,
                              uint32_t halo, uint32_t weights, const HaloPair& pair,
                              bool has_partner) {
  const uint32_t group_rows = conv.plan.part_atoms() * kCoreRows;
  halo += (pair.halo & 0xffff) + (has_partner ? unit.half * (pair.halo >> 16) : 0);
  weights += unit.weights + (pair.weights & 0xffff) + unit.weights_half * (pair.weights >> 16);
  uint32_t a[kRowBlocks][4];
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i) load_matrices(halo + unit.rows[i], a[i]);
#pragma unroll
  for (int j = 0; j < kColumnBlocks; j += 2) {
    uint32_t b[4];
    load_matrices(weights + j * group_rows, b);
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
      mma_and_popcount(acc[i] + 4 * j, a[i], b[0], b[1]);
      mma_and_popcount(acc[i] + 4 * (j + 1), a[i], b[2], b[3]);
    }
  }
  // The bits of the pixels, but not of a lone tap's partner.
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i) {
    mma_and_popcount(acc[i] + 4 * kColumnBlocks, a[i], ~0u, has_partner ? ~0u : 0);
  }
}

__device__ void finish(const TileConv& args, const Unit& unit, const Accumulators& acc,
                       const TilePosition& tile) {
  const Lane lane = make_lane(args, unit.column);
  const LaneScale<kUnitChannels, false> scale(lane);
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i) {
    WarpRun<kUnitChannels> run = locate_run<kUnitChannels>(args.conv, lane, [&](int32_t pixel) {
      return locate_pixel(args.conv, tile, unit.pixel + i * kWarpPixels + pixel);
    });
    run.acc = acc[i];
#pragma unroll
    for (int row = 0; row < kLanePixels; ++row) {
      run.window_bits[row] = acc[i][4 * kColumnBlocks + 2 * row];
    }
    store_run(args, lane, run, scale, load_table(run, 0));
  }
}

// Resident weights: the next tile's halo loads while this one is multiplied.
__device__ void multiply_resident(const TileConv& args) {
  const HaloConv& conv = args.conv;
  const HaloPlan& plan = conv.plan;
  load_resident_weights(conv);
  int slot = 0;
  const auto load = [&](int32_t tile, int to) {
    if (tile < plan.tiles) {
      const TilePosition at = tile_position(conv, tile);
      load_halo(conv, 0, to, [&](int32_t number) { return halo_source(conv, at, number); });
    }
    cute::cp_async_fence();
  };
  load(blockIdx.x, slot);
  prepare_channels(args, threadIdx.x, kThreads);  // While these are on their way.
  for (int32_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    load(tile + gridDim.x, slot ^ 1);
    cute::cp_async_wait<1>();
    __syncthreads();
    const int32_t units = plan.runs * kRunUnits * (plan.block_channels / kUnitChannels);
    for (int32_t i = threadIdx.x / kWarpSize; i < units; i += kWarps) {
      const Unit unit = unit_at(plan, i);
      const uint32_t halo = (conv.at.halo + slot * plan.stage_bytes()) / kChunkBytes;
      const uint32_t weights = conv.at.weights / kChunkBytes;
      Accumulators acc = {};
      for (int32_t k = 0; k < plan.pairs; ++k) {
        const HaloPair& pair = conv.tables.pairs[k];
        multiply_pair(acc, conv, unit, halo, weights, pair, !is_lone(conv, pair));
      }
      finish(args, unit, acc, tile_position(conv, tile));
    }
    __syncthreads();
    slot ^= 1;
  }
}

// Streamed weights: a tile has at most one unit for each warp. The loads run a few slots ahead, but
// not so far that a halo would overwrite one in use.
__device__ void multiply_streamed(const TileConv& args) {
  const HaloConv& conv = args.conv;
  const HaloPlan& plan = conv.plan;
  const int32_t ahead = min(ceil_div(conv.taps, kStreamTaps), plan.parts - 1);  // 1 or 2
  const Unit unit = unit_at(plan, threadIdx.x / kWarpSize);
  // What a warp without a run would multiply may just be loading.
  const bool has_run = unit.pixel < plan.runs * kRunPixels;
  int64_t* sources = shared<int64_t>(conv.at.sources);
  for (int32_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const TilePosition at = tile_position(conv, tile);
    for (int32_t i = threadIdx.x; i < plan.phases() * plan.region_pixels; i += kThreads) {
      sources[i] = halo_source(conv, at, i);  // For this thread alone.
    }
    Slot next;
    const auto load_next = [&] {
      if (next.exists(conv)) load_slot(conv, next, sources);
      cute::cp_async_fence();
      next.advance(conv);
    };
    for (int32_t i = 0; i < ahead; ++i) load_next();
    if (tile == static_cast<int32_t>(blockIdx.x)) prepare_channels(args, threadIdx.x, kThreads);
    Accumulators acc = {};
    for (Slot slot; slot.exists(conv); slot.advance(conv)) {
      // The loads of this slot have arrived, and nobody needs the one before any more.
      if (ahead == 1) cute::cp_async_wait<0>();
      if (ahead == 2) cute::cp_async_wait<1>();
      __syncthreads();
      load_next();
      const uint32_t halo = (conv.at.halo + slot.stage * plan.stage_bytes()) / kChunkBytes;
      const uint32_t weights = (conv.at.weights + slot.part * plan.part_bytes()) / kChunkBytes;
      const int32_t pairs = has_run ? slot.taps(conv) : 0;
      for (int32_t k = 0; k < pairs; ++k) {
        multiply_pair(acc, conv, unit, halo, weights, conv.tables.pairs[slot.first + k], true);
      }
    }
    if (has_run) finish(args, unit, acc, at);
    __syncthreads();
  }
}

template <bool kStreamed>
__global__ void __launch_bounds__(kThreads, 1)
    conv2d_kernel(const __grid_constant__ TileConv args) {
#if __CUDA_ARCH__ >= 800
  write_constants(args.conv, threadIdx.x, kThreads);
  __syncthreads();
  await_previous_kernel();
  if constexpr (kStreamed) {
    multiply_streamed(args);
  } else {
    multiply_resident(args);
  }
#endif
}

bool runs_on(const Target& target) {
  return target.is_cuda && sm80_runs_on(target.compute_capability, used_architectures());
}

bool accepts(const Conv2dShape& shape) { return halo_accepts(shape, kSm80Limits); }

void launch_conv2d(const Conv2dArgs& args, const Queue& queue) {
  HaloLimits limits = kSm80Limits;
  limits.multiprocessors = multiprocessors(queue.device());
  limits.shared_bytes = shared_bytes(queue.device());
  const TileConv conv = tile_conv(args, plan_halo(args.shape, limits));
  const HaloPlan& plan = conv.conv.plan;
  launch("binary_conv2d", queue,
         {tile_blocks(args.shape, plan, limits), kThreads, static_cast<size_t>(conv.conv.at.total)},
         plan.is_streamed ? conv2d_kernel<true> : conv2d_kernel<false>, conv);
}

}  // namespace

const HaloLimits kSm80Limits = {.multiprocessors = 84,  // Of the smallest GPU: 8.6 and 8.9
                                .shared_bytes = 99 * 1024,
                                .wide_runs = kStreamedRuns,
                                .narrow_runs = 2 * kStreamedRuns,
                                .streamed_runs = kStreamedRuns,
                                .least_channels = kUnitChannels,
                                .ones = 0,  // In registers.
                                .lists_pixels = false,
                                .keeps_step = true,
                                .most_halo_stages = 2,
                                .most_streamed_parts = 3};

const Kernel kConv2dSm80 = {.name = "cuda_sm80",
                            .runs_on = runs_on,
                            .accepts = accepts,
                            .prepared_bytes = prepared_bytes,
                            .prepare = prepare_weight,
                            .prepare_values = prepare_values,
                            .workspace_bytes = no_workspace,
                            .launch = launch_conv2d,
                            .takes_values = pointwise_takes,
                            .launch_values = launch_pointwise};

}  // namespace binconv::cuda

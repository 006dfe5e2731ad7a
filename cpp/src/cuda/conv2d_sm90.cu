// The asserts of CUTLASS's barriers are calls, across which ptxas does not overlap multiplications.
#if !defined(NDEBUG)
#define NDEBUG
#endif

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "check.h"
#include "cuda/architectures.h"
#include "cuda/conv2d_pointwise.h"
#include "cuda/cuda.h"
#include "cuda/halo.cuh"
#include "cuda/launch.cuh"
#include "cuda/prepared_weight.h"
#include "cuda/tile_epilogue.cuh"
#include "cuda/wgmma_b1.cuh"

// Hopper: b1 wgmma from the halo tiles of halo.h. A thread block has one block of output channels
// and walks over tiles. One warpgroup feeds the others, which multiply and finish runs of 64
// pixels; some multiply while others finish.
//
// Resident weights: the warpgroups take the runs of all tiles one after the other. Streamed
// weights: a tile has two runs for each of them, so that each piece of the weights is loaded once
// for all.

namespace binconv::cuda {
namespace {

using cutlass::arch::ClusterBarrier;
using cutlass::arch::ClusterTransactionBarrier;
using cutlass::arch::NamedBarrier;

constexpr int kWarpgroup = 128;
constexpr int kWarpgroupWarps = kWarpgroup / kWarpSize;
constexpr int kOnes = 16;  // 8 would do, but b1 multiplications grow by 16 columns.
constexpr int kMostHaloStages = 4, kMostStreamedParts = 8;
// Resident weights arrive in parts too, so that the first multiplications need not wait for the
// last weights. What is beyond these counts with the last of them.
constexpr int kMostParts = kMostStreamedParts;

// How a block of a number of channels is worked on. One warpgroup more feeds the others: its first
// thread loads, its other warps list pixels. Registers are those of each thread: a block starts
// with an equal share for each, and the sum over its warpgroups cannot grow.
template <int kChannels>
struct Block {
  static constexpr int kConsumers = 3;  // Warpgroups that multiply.
  static constexpr int kConsumerRegisters = 152, kFeederRegisters = 56;
};
template <>
struct Block<kMostChannels> {
  static constexpr int kConsumers = 2;
  static constexpr int kConsumerRegisters = 232, kFeederRegisters = 40;
};
template <int kChannels>
constexpr int kMultipliers = Block<kChannels>::kConsumers * kWarpgroup;  // Threads.
template <int kChannels>
constexpr int kThreads = kMultipliers<kChannels> + kWarpgroup;
constexpr int kStreamedRuns = 2;               // Of a warpgroup.
constexpr int kListers = kWarpgroupWarps - 1;  // Warps.
constexpr int kMultipliersBarrier = 1;         // A named one.

struct Barriers {
  ClusterTransactionBarrier halo_full[kMostHaloStages];
  ClusterBarrier halo_empty[kMostHaloStages];
  ClusterBarrier pixels_full[kMostHaloStages];
  ClusterTransactionBarrier weights_full[kMostParts];
  ClusterBarrier weights_empty[kMostParts];  // Where they are streamed.
  ClusterBarrier turn[2];                    // Of two warpgroups.
};

static_assert(sizeof(Barriers) <= kBarrierBytes);

// Position in a ring of buffers, and the parity of the barriers' phase there.
struct Ring {
  int slots;
  int slot = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++slot == slots) slot = 0, parity ^= 1;
  }
};

__device__ void init_barriers(Barriers& barriers, const HaloPlan& plan, int consumers) {
  // A stage is empty when every warp is done with it, also one that has no run there: nobody may
  // fall behind by a whole round of the ring.
  const int readers = consumers * kWarpgroupWarps;
  for (int i = 0; i < kMostHaloStages; ++i) {
    barriers.halo_full[i].init(1);
    barriers.halo_empty[i].init(readers);
    barriers.pixels_full[i].init(kListers * kWarpSize);
  }
  for (int i = 0; i < kMostParts; ++i) {
    const bool is_last = i + 1 == kMostParts && plan.parts > kMostParts;
    barriers.weights_full[i].init(is_last ? plan.parts - i : 1);
    barriers.weights_empty[i].init(readers);
  }
  for (ClusterBarrier& turn : barriers.turn) turn.init(kWarpgroupWarps);
  cutlass::arch::fence_barrier_init();
}

struct Maps {
  CUtensorMap input;    // [chunk][row][image][column][16 bytes], the order that halo.h asks for.
  CUtensorMap weights;  // [channel / 8][chunk][tap][8 * 16 bytes]; a box is a part.
};

// One thread: loads everything, in the order in which it is used.
template <bool kStreamed>
class Loader {
 public:
  __device__ Loader(const Maps& maps, const HaloConv& conv, Barriers& barriers)
      : maps_(maps),
        conv_(conv),
        plan_(conv.plan),
        barriers_(barriers),
        halo_{plan_.halo_stages},
        weights_{plan_.parts} {}

  __device__ void run() {
    const int32_t first = blockIdx.x, steps = stage_steps(conv_);
    for (int32_t tile = first; tile < plan_.tiles; tile += gridDim.x) {
      const TilePosition at = tile_position(conv_, tile);
      for (int32_t step = 0; step < steps; ++step) {
        load_halo(at, step * plan_.stage_chunks);
        if constexpr (kStreamed) stream_weights(step);
      }
      if (!kStreamed && tile == first) load_resident_weights();
    }
  }

 private:
  static constexpr uint64_t kCacheHint =
      static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);

  __device__ void load_halo(const TilePosition& at, int32_t first) {
    ClusterTransactionBarrier& full = barriers_.halo_full[halo_.slot];
    barriers_.halo_empty[halo_.slot].wait(halo_.parity ^ 1);
    full.arrive_and_expect_tx(plan_.stage_chunks * plan_.phases() * plan_.halo_pixels() *
                              kChunkBytes);
    int32_t to = conv_.at.halo + halo_.slot * plan_.stage_bytes();
    for (int32_t chunk = first; chunk < first + plan_.stage_chunks; ++chunk) {
      // Beyond the last chunk: outside the image, which the copy fills with zeros.
      const int32_t from = chunk < conv_.chunks ? first_chunk(conv_) + chunk : kOutsideChunk;
      for (int32_t y = 0; y < plan_.phases_height; ++y) {
        for (int32_t x = 0; x < plan_.phases_width; ++x) {
          cute::SM90_TMA_LOAD_5D::copy(
              &maps_.input, reinterpret_cast<uint64_t*>(&full), kCacheHint, shared<uint8_t>(to), 0,
              at.column * conv_.stride_width - conv_.pad_left + x, at.image,
              at.row * conv_.stride_height - conv_.pad_top + y, from);
          to += plan_.region_pixels * kChunkBytes;
        }
      }
    }
    halo_.advance();
  }

  // A part, from chunk `chunk` and tap `tap` on; zeros beyond the last chunk and tap.
  __device__ void load_weights(int32_t part, int32_t chunk, int32_t tap,
                               ClusterTransactionBarrier& full) {
    full.arrive_and_expect_tx(plan_.block_channels * plan_.part_atoms() * kChunkBytes);
    cute::SM90_TMA_LOAD_4D::copy(&maps_.weights, reinterpret_cast<uint64_t*>(&full), kCacheHint,
                                 shared<uint8_t>(conv_.at.weights + part * plan_.part_bytes()), 0,
                                 tap, chunk, first_channel(conv_) / kCoreRows);
  }

  __device__ void load_resident_weights() {
    for (int32_t part = 0; part < plan_.parts; ++part) {
      load_weights(part, part * plan_.part_chunks, 0,
                   barriers_.weights_full[min(part, kMostParts - 1)]);
    }
  }

  // The pairs of two chunks, one for each tap.
  __device__ void stream_weights(int32_t step) {
    for (int32_t tap = 0; tap < conv_.taps; tap += kStreamTaps) {
      barriers_.weights_empty[weights_.slot].wait(weights_.parity ^ 1);
      load_weights(weights_.slot, 2 * step, tap, barriers_.weights_full[weights_.slot]);
      weights_.advance();
    }
  }

  static constexpr int32_t kOutsideChunk = 1 << 30;
  const Maps& maps_;
  const HaloConv& conv_;
  const HaloPlan& plan_;
  Barriers& barriers_;
  Ring halo_, weights_;
};

// The listing warps: where the output pixels of each tile belong.
__device__ void list_pixels(const HaloConv& conv, Barriers& barriers, int warp) {
  const HaloPlan& plan = conv.plan;
  const int lane = threadIdx.x % kWarpSize;
  Ring stage{plan.halo_stages};
  for (int32_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const TilePosition at = tile_position(conv, tile);
    barriers.halo_empty[stage.slot].wait(stage.parity ^ 1);
    Pixel* list = listed_pixels(conv, stage.slot);
    for (int32_t i = warp * kWarpSize + lane; i < plan.runs * kRunPixels;
         i += kListers * kWarpSize) {
      list[i] = locate_pixel(conv, at, i);
    }
    // Each thread for itself: racecheck sees no order between one's writes and another's arrival.
    barriers.pixels_full[stage.slot].arrive();
    stage.advance();
  }
}

// What a multiplying warpgroup knows of itself.
struct Consumer {
  int index, warp;
  Lane lane;
};

template <int kChannels>
using Accumulators = int32_t[(kChannels + kOnes) / 2];

template <int kChannels, class Scale>
__device__ void finish(const TileConv& args, const Consumer& self, WarpRun<kChannels> run,
                       const Scale& scale, const GroupTable& table,
                       const Accumulators<kChannels>& acc) {
  run.acc = acc;
#pragma unroll
  for (int row = 0; row < kLanePixels; ++row) run.window_bits[row] = acc[kChannels / 2 + 2 * row];
  store_run(args, self.lane, run, scale, table);
}

// Both operands are rows of 16-byte chunks without swizzle: 8 rows 16 bytes apart are a core
// matrix, and the high word of a descriptor says how much further the next one lies. Where the
// operand starts, and how much further the second chunk of a row lies, is the low word, in units of
// 16 bytes as in HaloPair.
struct Operands {
  uint64_t halo, weights;
};

__device__ Operands operands_at(const HaloConv& conv, int32_t halo, int32_t weights) {
  return {uint64_t{kCoreRows} << 32 | shared_unit(halo),
          static_cast<uint64_t>(conv.plan.part_atoms() * kCoreRows) << 32 | shared_unit(weights)};
}

template <bool kAccumulate, int kSize>
__device__ void multiply_pair(int32_t (&acc)[kSize], const Operands& at, const HaloPair& pair) {
  wgmma_and_popcount<kAccumulate>(acc, at.halo + pair.halo, at.weights + pair.weights);
}

// Starts the multiplications of a run. The first one of a warpgroup waits for each part of the
// weights.
template <int kSize>
__device__ void multiply_run(int32_t (&acc)[kSize], const HaloConv& conv, const Operands& at,
                             Barriers& barriers, bool& has_weights) {
  const HaloPlan& plan = conv.plan;
  const HaloPair* pairs = conv.tables.pairs;
  if (!has_weights) barriers.weights_full[0].wait(0);
  wgmma_fence();
  multiply_pair<false>(acc, at, pairs[0]);
  int32_t k = 1;
  for (int32_t part = 1; !has_weights && part < plan.parts; ++part) {
    for (; k < part * conv.taps; ++k) multiply_pair<true>(acc, at, pairs[k]);
    barriers.weights_full[min(part, kMostParts - 1)].wait(0);
  }
  has_weights = true;
#pragma unroll 4
  for (; k < plan.pairs; ++k) multiply_pair<true>(acc, at, pairs[k]);
  wgmma_commit();
}

// Resident weights: runs are numbered over all tiles of the block. Two warpgroups begin them in
// turn: if they multiplied at the same time, they would also finish at the same time, and the
// tensor cores would wait.
template <int kChannels>
__device__ void multiply_resident(const TileConv& args, Barriers& barriers, const Consumer& self) {
  const HaloConv& conv = args.conv;
  const HaloPlan& plan = conv.plan;
  const LaneScale<kChannels, true> scale(self.lane);
  constexpr int kConsumers = Block<kChannels>::kConsumers;
  constexpr bool kTakesTurns = kConsumers == 2;
  Ring stage{plan.halo_stages};
  bool has_weights = false;
  uint32_t turn = 0;
  // The first turn is the first warpgroup's.
  if (kTakesTurns && self.index == 1 && cute::elect_one_sync()) barriers.turn[0].arrive();
  int run = self.index;
  for (int32_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    barriers.halo_full[stage.slot].wait(stage.parity);
    if (run >= plan.runs) {
      __syncwarp();
      if (cute::elect_one_sync()) barriers.halo_empty[stage.slot].arrive();
    }
    for (; run < plan.runs; run += kConsumers) {
      const int32_t halo =
          conv.at.halo + stage.slot * plan.stage_bytes() + run * kRunPixels * kChunkBytes;
      const Operands at = operands_at(conv, halo, conv.at.weights);
      Accumulators<kChannels> acc;
      if constexpr (kTakesTurns) {
        barriers.turn[self.index].wait(turn);
        turn ^= 1;
      }
      multiply_run(acc, conv, at, barriers, has_weights);
      if (kTakesTurns && cute::elect_one_sync()) barriers.turn[1 - self.index].arrive();
      barriers.pixels_full[stage.slot].wait(stage.parity);
      const Pixel* pixels =
          listed_pixels(conv, stage.slot) + run * kRunPixels + self.warp * kWarpPixels;
      const auto located =
          locate_run<kChannels>(conv, self.lane, [&](int32_t pixel) { return pixels[pixel]; });
      const GroupTable table = load_table(located, 0);
      wgmma_wait<0>();
      __syncwarp();  // All lanes have read their pixels.
      if (run + kConsumers >= plan.runs && cute::elect_one_sync()) {
        barriers.halo_empty[stage.slot].arrive();
      }
      finish<kChannels>(args, self, located, scale, table, acc);
    }
    run -= plan.runs;
    stage.advance();
  }
}

// A stage of streamed weights. Straight-line code: only then does waiting for the stage before not
// also wait for this one.
template <int kTaps, int kSize>
__device__ void multiply_stage(int32_t (&acc)[kStreamedRuns][kSize], Operands at,
                               const HaloPair* pairs) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kTaps; ++k) {
#pragma unroll
    for (int r = 0; r < kStreamedRuns; ++r) {
      const Operands of_run = {at.halo + r * kRunPixels, at.weights};
      multiply_pair<true>(acc[r], of_run, pairs[k]);
    }
  }
  wgmma_commit();
}

template <int kSize>
__device__ void multiply_stage(int32_t (&acc)[kStreamedRuns][kSize], const Operands& at,
                               const HaloPair* pairs, int32_t taps) {
  static_assert(kStreamTaps == 4);
  switch (taps) {
    case 1:
      return multiply_stage<1>(acc, at, pairs);
    case 2:
      return multiply_stage<2>(acc, at, pairs);
    case 3:
      return multiply_stage<3>(acc, at, pairs);
    default:
      return multiply_stage<4>(acc, at, pairs);
  }
}

// The second warpgroup begins some stages behind the first and so multiplies while that finishes a
// tile. The buffers must hold what is between them.
__device__ int32_t stages_ahead(const HaloConv& conv) {
  const int32_t halo = (conv.plan.halo_stages - 1) * ceil_div(conv.taps, kStreamTaps);
  return min(conv.plan.parts / 2, halo);
}

template <int kChannels, class Scale>
__device__ void finish_runs(const TileConv& args, const Consumer& self, int32_t tile,
                            int32_t first_run, const Scale& scale,
                            const Accumulators<kChannels> (&acc)[kStreamedRuns]) {
  const HaloConv& conv = args.conv;
#pragma unroll
  for (int r = 0; r < kStreamedRuns; ++r) {
    if (first_run + r >= conv.plan.runs) break;
    const int32_t first = (first_run + r) * kRunPixels + self.warp * kWarpPixels;
    const auto located = locate_run<kChannels>(conv, self.lane, [&](int32_t pixel) {
      return locate_pixel(conv, tile_position(conv, tile), first + pixel);
    });
    finish<kChannels>(args, self, located, scale, load_table(located, 0), acc[r]);
  }
}

template <int kChannels>
__device__ void multiply_streamed(const TileConv& args, Barriers& barriers, const Consumer& self) {
  const HaloConv& conv = args.conv;
  const HaloPlan& plan = conv.plan;
  const LaneScale<kChannels, false> scale(self.lane);
  const int32_t steps = stage_steps(conv), first_run = self.index * kStreamedRuns;
  static_assert(Block<kChannels>::kConsumers == 2);
  int32_t until_turn = stages_ahead(conv);
  if (self.index == 1) barriers.turn[1].wait(0);
  Ring halo{plan.halo_stages}, weights{plan.parts};
  for (int32_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    Accumulators<kChannels> acc[kStreamedRuns] = {};
    int last_halo = -1, last_weights = -1;  // What the multiplications in flight read.
    for (int32_t step = 0; step < steps; ++step) {
      barriers.halo_full[halo.slot].wait(halo.parity);
      const int32_t from =
          conv.at.halo + halo.slot * plan.stage_bytes() + first_run * kRunPixels * kChunkBytes;
      for (int32_t first = 0; first < conv.taps; first += kStreamTaps) {
        const Operands at =
            operands_at(conv, from, conv.at.weights + weights.slot * plan.part_bytes());
        const HaloPair* pairs = conv.tables.pairs + first;
        barriers.weights_full[weights.slot].wait(weights.parity);
        multiply_stage(acc, at, pairs, min(conv.taps - first, kStreamTaps));
        if (self.index == 0 && until_turn >= 0 && until_turn-- == 0 && cute::elect_one_sync()) {
          barriers.turn[1].arrive();
        }
        // All but the multiplications just begun are over: what they read can be loaded anew.
        wgmma_wait<1>();
        if (cute::elect_one_sync()) {
          if (last_weights >= 0) barriers.weights_empty[last_weights].arrive();
          if (first == 0 && last_halo >= 0) barriers.halo_empty[last_halo].arrive();
        }
        last_weights = weights.slot;
        weights.advance();
      }
      last_halo = halo.slot;
      halo.advance();
    }
    if (self.index == 0 && until_turn >= 0) {  // The tile was shorter.
      until_turn = -1;
      if (cute::elect_one_sync()) barriers.turn[1].arrive();
    }
    wgmma_wait<0>();
    if (cute::elect_one_sync()) {
      barriers.weights_empty[last_weights].arrive();
      barriers.halo_empty[last_halo].arrive();
    }
    finish_runs<kChannels>(args, self, tile, first_run, scale, acc);
  }
}

template <int kChannels, bool kStreamed>
__global__ void __launch_bounds__(kThreads<kChannels>, 1)
    conv2d_kernel(const __grid_constant__ Maps maps, const __grid_constant__ TileConv args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kConsumers = Block<kChannels>::kConsumers;
  const HaloConv& conv = args.conv;
  Barriers& barriers = *shared<Barriers>(conv.at.barriers);
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&maps.input));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&maps.weights));
    init_barriers(barriers, conv.plan, kConsumers);
  }
  write_constants(conv, threadIdx.x, kThreads<kChannels>);
  cutlass::arch::fence_view_async_shared();
  __syncthreads();
  await_previous_kernel();

  // The shuffle tells the compiler that the warp agrees.
  const int warpgroup = __shfl_sync(kWholeWarp, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<Block<kChannels>::kFeederRegisters>();
    const int warp = __shfl_sync(kWholeWarp, threadIdx.x % kWarpgroup / kWarpSize, 0);
    if (warp > 0) {
      if constexpr (!kStreamed) list_pixels(conv, barriers, warp - 1);
    } else if (threadIdx.x % kWarpSize == 0) {
      Loader<kStreamed>(maps, conv, barriers).run();
    }
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<Block<kChannels>::kConsumerRegisters>();
  // While the first halo and weights are on their way.
  prepare_channels(args, threadIdx.x, kMultipliers<kChannels>);
  NamedBarrier::sync(kMultipliers<kChannels>, kMultipliersBarrier);
  const Consumer self = {warpgroup, static_cast<int>(threadIdx.x % kWarpgroup / kWarpSize),
                         make_lane(args, 0)};
  if constexpr (kStreamed) {
    multiply_streamed<kChannels>(args, barriers, self);
  } else {
    multiply_resident<kChannels>(args, barriers, self);
  }
#endif
}

bool runs_on(const Target& target) {
  return target.is_cuda && sm90_runs_on(target.compute_capability, used_architectures());
}

// cuTensorMapEncodeTiled, without linking the driver's library.
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                              cudaEnableDefault, &found),
             "binary_conv2d");
  if (found != cudaDriverEntryPointSuccess) {
    fail(Status::kCudaError, "binary_conv2d: the driver has no cuTensorMapEncodeTiled");
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// sizes, steps, box: of each dimension from the innermost; steps, in bytes, of all but that one.
template <int kRank>
CUtensorMap tensor_map(const uint8_t* data, const cuuint64_t (&sizes)[kRank],
                       const cuuint64_t (&steps)[kRank - 1], const cuuint32_t (&box)[kRank],
                       const cuuint32_t (&strides)[kRank]) {
  static const auto encode = tensor_map_encoder();
  CUtensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, kRank, const_cast<uint8_t*>(data), sizes, steps,
             box, strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    fail(Status::kCudaError, "binary_conv2d: the driver refuses a tensor map, error ", result);
  }
  return map;
}

CUtensorMap input_map(const Conv2dArgs& args, const HaloPlan& plan) {
  const Conv2dShape& shape = args.shape;
  const cuuint64_t pixel = packed_bytes(shape.weight.in_channels);
  const cuuint64_t width = shape.in_width, height = shape.in_height, batch = shape.batch;
  const cuuint32_t stride_height = shape.stride_height, stride_width = shape.stride_width;
  const cuuint32_t images = plan.tile_images;
  return tensor_map<5>(args.input, {kChunkBytes, width, batch, height, pixel / kChunkBytes},
                       {pixel, height * width * pixel, width * pixel, kChunkBytes},
                       {kChunkBytes, (plan.pitch - 1) * stride_width + 1, images,
                        (plan.halo_rows - 1) * stride_height + 1, 1},
                       {1, stride_width, 1, stride_height, 1});
}

CUtensorMap weight_map(const Conv2dArgs& args, const HaloPlan& plan) {
  const PreparedLayout prepared = prepared_layout(args.shape.weight);
  const cuuint64_t taps = prepared.taps, chunks = prepared.chunks;
  const cuuint64_t groups = prepared.channels / kCoreRows;
  const cuuint32_t part_taps = plan.part_taps, part_chunks = plan.part_chunks;
  const cuuint32_t part_groups = plan.block_channels / kCoreRows;
  return tensor_map<4>(args.prepared_weight, {kCoreBytes, taps, chunks, groups},
                       {kCoreBytes, taps * kCoreBytes, chunks * taps * kCoreBytes},
                       {kCoreBytes, part_taps, part_chunks, part_groups}, {1, 1, 1, 1});
}

bool accepts(const Conv2dShape& shape) { return halo_accepts(shape, kSm90Limits); }

void launch_conv2d(const Conv2dArgs& args, const Queue& queue) {
  const DeviceGuard guard(queue.device(), "binary_conv2d");  // For the tensor maps.
  HaloLimits limits = kSm90Limits;
  limits.multiprocessors = multiprocessors(queue.device());
  limits.shared_bytes = shared_bytes(queue.device());
  const TileConv conv = tile_conv(args, plan_halo(args.shape, limits));
  const HaloPlan& plan = conv.conv.plan;
  const auto launch_block = [&](auto channels, auto kernel) {
    launch("binary_conv2d", queue,
           {tile_blocks(args.shape, plan, limits), kThreads<decltype(channels)::value>,
            static_cast<size_t>(conv.conv.at.total)},
           kernel, Maps{input_map(args, plan), weight_map(args, plan)}, conv);
  };
  switch (plan.block_channels) {
    case 32:
      return launch_block(std::integral_constant<int, 32>{}, conv2d_kernel<32, false>);
    case 64:
      return launch_block(std::integral_constant<int, 64>{}, conv2d_kernel<64, false>);
    default:
      return launch_block(std::integral_constant<int, 128>{},
                          plan.is_streamed ? conv2d_kernel<128, true> : conv2d_kernel<128, false>);
  }
}

}  // namespace

const HaloLimits kSm90Limits = {.multiprocessors = 132,  // Of an H100 or H200, and its memory.
                                .shared_bytes = 227 * 1024,
                                .wide_runs = Block<128>::kConsumers,
                                .narrow_runs = Block<64>::kConsumers,
                                .streamed_runs = Block<128>::kConsumers * kStreamedRuns,
                                .least_channels = 32,
                                .ones = kOnes,
                                .lists_pixels = true,
                                .keeps_step = false,
                                .most_halo_stages = kMostHaloStages,
                                .most_streamed_parts = kMostStreamedParts};

const Kernel kConv2dSm90 = {.name = "cuda_sm90",
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

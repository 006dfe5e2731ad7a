// The asserts of CUTLASS's barriers are calls, across which ptxas does not overlap multiplications.
#if !defined(NDEBUG)
#define NDEBUG
#endif

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "check.h"
#include "cuda/cuda.h"
#include "cuda/halo.cuh"
#include "cuda/launch.cuh"
#include "cuda/prepared_weight.h"
#include "cuda/tile_epilogue.cuh"
#include "cuda/wgmma_b1.cuh"

// Hopper: b1 wgmma from the halo tiles of halo.h. A thread block has one block of output channels
// and walks over tiles. Its first warpgroup feeds the others: one warp loads halos (and weights),
// the other three count the bits of the halo and work out, for each pixel, what the epilogue needs.
// The other two warpgroups multiply and finish.
//
// Resident weights: the warpgroups take runs in turn, and one multiplies while the other finishes.
// Streamed weights: both multiply at the same time, so that each piece of the weights is loaded
// once for the whole tile.

namespace binconv::cuda {
namespace {

using cutlass::arch::ClusterBarrier;
using cutlass::arch::ClusterTransactionBarrier;

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kThreads = kWarpgroup * (1 + kConsumers);
// Of each thread. A block starts with 168 for each, and the sum over its warpgroups cannot grow.
constexpr int kFeederRegisters = 88, kConsumerRegisters = 208;
constexpr int kCounters = kWarpgroup - kWarpSize;  // Threads.
constexpr int kMultipliers = kConsumers * kWarpgroup;
constexpr int kCounterBarrier = 1, kConsumerBarrier = 2;
constexpr int kWarpgroupWarps = kWarpgroup / kWarpSize;
constexpr int kStreamedRunsPerConsumer = 2;
constexpr int kStreamedRuns = kStreamedRunsPerConsumer * kConsumers;
// Resident weights arrive in parts, so that the first multiplications need not wait for the last
// weights.
constexpr int kWeightParts = kStreamStages;

struct Barriers {
  ClusterTransactionBarrier halo_full[kHaloStages];
  ClusterBarrier halo_empty[kHaloStages];
  ClusterTransactionBarrier weights_full[kStreamStages];  // Of a stage, or of a resident part.
  ClusterBarrier weights_empty[kStreamStages];
  ClusterTransactionBarrier counts_full;
  ClusterBarrier pixels_full[kHaloStages];
  ClusterBarrier pixels_empty[kHaloStages];
  ClusterBarrier turn[kConsumers];
};

// Position in a ring of buffers, and the parity of the barriers' phase there.
struct Ring {
  int slots;
  int slot = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++slot == slots) slot = 0, parity ^= 1;
  }
};

__device__ void init_barriers(Barriers& barriers, const HaloPlan& plan) {
  for (int i = 0; i < kHaloStages; ++i) {
    barriers.halo_full[i].init(1);
    // Who has read a stage: the counters, and every run or, streaming, every consumer.
    barriers.halo_empty[i].init(1 + (plan.is_streamed ? kConsumers : plan.runs));
    barriers.pixels_full[i].init(kCounters);
    barriers.pixels_empty[i].init(kWarpgroupWarps * (plan.is_streamed ? kStreamedRuns : plan.runs));
  }
  for (int i = 0; i < kStreamStages; ++i) {
    barriers.weights_full[i].init(1);
    barriers.weights_empty[i].init(kConsumers);
  }
  barriers.counts_full.init(1);
  for (int i = 0; i < kConsumers; ++i) barriers.turn[i].init(kWarpgroupWarps);
  cutlass::arch::fence_barrier_init();
}

// The end of the chunks whose weights are in a part. The first part is never empty.
__device__ int32_t part_chunks(const HaloConv& conv, int part) {
  const int32_t chunk_pairs = ceil_div(conv.chunks, 2);
  return min(2 * ceil_div(chunk_pairs * (part + 1), kWeightParts), conv.chunks);
}

// The end of their multiplications.
__device__ int32_t part_pairs(const HaloConv& conv, int part) {
  const int32_t chunks = part_chunks(conv, part);
  return chunks == conv.chunks ? conv.plan.pairs : chunks / 2 * conv.taps;
}

// Tensor maps; one unit of a weight map's second dimension is this many output channels.
constexpr int kMapChannels = 16;
struct Maps {
  CUtensorMap input;    // [chunk][row][image][column][16 bytes], the order that halo.h asks for.
  CUtensorMap weights;  // [chunk][tap][channel / kMapChannels][kMapChannels * 16 bytes]
};

// One thread: loads everything, in the order in which it is used.
template <bool kStreamed>
class Loader {
 public:
  __device__ Loader(const Maps& maps, const HaloConv& conv, Barriers& barriers)
      : maps_(maps), conv_(conv), plan_(conv.plan), barriers_(barriers) {}

  __device__ void run() {
    load_tap_counts();
    const int32_t first = blockIdx.x, steps = stage_steps(conv_);
    for (int32_t tile = first; tile < plan_.tiles; tile += gridDim.x) {
      const TilePosition at = tile_position(plan_, tile);
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

  __device__ void load_tap_counts() {
    const int32_t bytes = plan_.block_channels * sizeof(int32_t);
    const int32_t* from = conv_.tap_counts + first_channel(conv_);
    barriers_.counts_full.arrive_and_expect_tx(conv_.taps * bytes);
    for (int32_t tap = 0; tap < conv_.taps; ++tap, from += conv_.prepared_channels) {
      cute::SM90_BULK_COPY_G2S::copy(from, reinterpret_cast<uint64_t*>(&barriers_.counts_full),
                                     shared<uint8_t>(conv_.at.tap_counts + tap * bytes), bytes);
    }
  }

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

  // As many taps as a box of the map has, from `tap`; zeros beyond the last tap and chunk.
  __device__ void load_weights(int32_t chunk, int32_t tap, int32_t to,
                               ClusterTransactionBarrier& full) {
    cute::SM90_TMA_LOAD_4D::copy(&maps_.weights, reinterpret_cast<uint64_t*>(&full), kCacheHint,
                                 shared<uint8_t>(to), 0, first_channel(conv_) / kMapChannels, tap,
                                 chunk);
  }

  __device__ void load_resident_weights() {
    const int32_t bytes = conv_.taps * plan_.block_channels * kChunkBytes;
    for (int32_t part = 0, chunk = 0; part < kWeightParts; ++part) {
      ClusterTransactionBarrier& full = barriers_.weights_full[part];
      const int32_t end = part_chunks(conv_, part);
      full.arrive_and_expect_tx((end - chunk) * bytes);
      for (; chunk < end; ++chunk) load_weights(chunk, 0, conv_.at.weights + chunk * bytes, full);
    }
  }

  // The pairs of two chunks, one for each tap.
  __device__ void stream_weights(int32_t step) {
    const int32_t bytes = kStreamPairs * plan_.block_channels * kChunkBytes;
    for (int32_t tap = 0; tap < conv_.taps; tap += kStreamPairs) {
      ClusterTransactionBarrier& full = barriers_.weights_full[weights_.slot];
      barriers_.weights_empty[weights_.slot].wait(weights_.parity ^ 1);
      full.arrive_and_expect_tx(2 * bytes);
      const int32_t to = conv_.at.weights + weights_.slot * 2 * bytes;
      load_weights(2 * step, tap, to, full);
      load_weights(2 * step + 1, tap, to + bytes, full);
      weights_.advance();
    }
  }

  static constexpr int32_t kOutsideChunk = 1 << 30;
  const Maps& maps_;
  const HaloConv& conv_;
  const HaloPlan& plan_;
  Barriers& barriers_;
  Ring halo_{kHaloStages}, weights_{kStreamStages};
};

// Three warps: the pixels of each tile.
__device__ void count_bits(const HaloConv& conv, Barriers& barriers) {
  const int thread = threadIdx.x - kWarpSize;
  const auto synchronize = [] { cutlass::arch::NamedBarrier::sync(kCounters, kCounterBarrier); };
  const int32_t steps = stage_steps(conv);
  Ring halo{kHaloStages}, pixels{kHaloStages};
  for (int32_t tile = blockIdx.x; tile < conv.plan.tiles; tile += gridDim.x) {
    for (int32_t step = 0; step < steps; ++step) {
      barriers.halo_full[halo.slot].wait(halo.parity);
      count_pixels(conv, halo.slot, step == 0, thread, kCounters);
      synchronize();
      if (thread == 0) barriers.halo_empty[halo.slot].arrive();
      halo.advance();
    }
    barriers.pixels_empty[pixels.slot].wait(pixels.parity ^ 1);
    make_pixels(conv, tile_position(conv.plan, tile), pixels.slot, thread, kCounters);
    barriers.pixels_full[pixels.slot].arrive();
    pixels.advance();
    synchronize();  // The counts are free again.
  }
}

// Each warpgroup may hold a stage while it waits for its turn.
static_assert(kHaloStages >= kConsumers);

// What a multiplying warpgroup knows of itself.
struct Consumer {
  int index, warp;
  bool is_leader_lane;  // One of each warp.
  bool is_leader;       // One of the warpgroup.
};

template <int kChannels>
__device__ void finish(const TileConv& args, const Consumer& self,
                       const int32_t (&acc)[kChannels / 2], const Pixel* run_pixels) {
  store_run<kChannels>(args.out, args.conv, 0, acc, run_pixels + self.warp * kWarpPixels,
                       self.index * kWarpgroupWarps + self.warp);
  __syncwarp();  // No lane still reads the pixels.
}

// Both operands are rows of 16-byte chunks without swizzle: 8 rows 16 bytes apart are a core
// matrix, and the next 8 rows follow. That is the high word of their descriptors; where they start,
// and how much further the second chunk of a row lies, is the low word, in units of 16 bytes as in
// HaloPair.
constexpr uint64_t kRowStepDescriptor = uint64_t{128 / kChunkBytes} << 32;

// halo, weights: addresses in units of 16 bytes.
template <bool kAccumulate, int kSize>
__device__ void multiply_pair(int32_t (&acc)[kSize], uint32_t halo, uint32_t weights,
                              HaloPair pair) {
  wgmma_and_popcount<kAccumulate>(acc, kRowStepDescriptor | (halo + pair.halo),
                                  kRowStepDescriptor | (weights + pair.weights));
}

// Resident weights: runs are numbered over all tiles of the block, and taken in turn.
template <int kChannels>
__device__ void multiply_resident(const TileConv& args, Barriers& barriers, const Consumer& self) {
  const HaloConv& conv = args.conv;
  const HaloPlan& plan = conv.plan;
  const HaloPair* pairs = conv.tables.pairs;
  const uint32_t weights = shared_unit(conv.at.weights);
  Ring stage{kHaloStages};
  uint32_t turn = self.index == 0 ? 1 : 0;  // The first turn is the first warpgroup's.
  int next = self.index;
  for (int32_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    for (; next < plan.runs; next += kConsumers) {
      const int run = next;
      barriers.halo_full[stage.slot].wait(stage.parity);
      const uint32_t halo =
          shared_unit(conv.at.halo + stage.slot * plan.stage_bytes()) + run * kRunPixels;
      int32_t acc[kChannels / 2];
      barriers.turn[self.index].wait(turn);
      turn ^= 1;
      barriers.weights_full[0].wait(0);
      wgmma_fence();
      multiply_pair<false>(acc, halo, weights, pairs[0]);
      int32_t k = 1;
#pragma unroll 1
      for (int part = 0; part < kWeightParts; ++part) {
        barriers.weights_full[part].wait(0);
        const int32_t end = part_pairs(conv, part);
#pragma unroll 4
        for (; k < end; ++k) multiply_pair<true>(acc, halo, weights, pairs[k]);
      }
      wgmma_commit();
      if (self.is_leader_lane) barriers.turn[(self.index + 1) % kConsumers].arrive();
      barriers.pixels_full[stage.slot].wait(stage.parity);
      wgmma_wait<0>();
      if (self.is_leader) barriers.halo_empty[stage.slot].arrive();
      finish<kChannels>(args, self, acc, pixels_at(conv, stage.slot, run));
      if (self.is_leader_lane) barriers.pixels_empty[stage.slot].arrive();
    }
    next -= plan.runs;
    stage.advance();
  }
}

// A stage of streamed weights. Straight-line code: only then does waiting for the stage before not
// also wait for this one.
template <int kPairs, int kSize>
__device__ void multiply_stage(int32_t (&acc)[kStreamedRunsPerConsumer][kSize], uint32_t halo,
                               uint32_t weights, const HaloPair* pairs) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
#pragma unroll
    for (int r = 0; r < kStreamedRunsPerConsumer; ++r) {
      multiply_pair<true>(acc[r], halo + r * kRunPixels, weights, pairs[k]);
    }
  }
  wgmma_commit();
}

// Streamed weights: a tile has up to kStreamedRuns runs, kStreamedRunsPerConsumer for each
// warpgroup.
template <int kChannels>
__device__ void multiply_streamed(const TileConv& args, Barriers& barriers, const Consumer& self) {
  const HaloConv& conv = args.conv;
  const HaloPlan& plan = conv.plan;
  const int32_t steps = stage_steps(conv);
  const int32_t first_run = self.index * kStreamedRunsPerConsumer;
  Ring halo{kHaloStages}, weights{kStreamStages}, pixels{kHaloStages};
  for (int32_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    int32_t acc[kStreamedRunsPerConsumer][kChannels / 2] = {};
    int last_halo = -1, last_weights = -1;  // What the multiplications in flight read.
    for (int32_t step = 0; step < steps; ++step) {
      barriers.halo_full[halo.slot].wait(halo.parity);
      const uint32_t a =
          shared_unit(conv.at.halo + halo.slot * plan.stage_bytes()) + first_run * kRunPixels;
      for (int32_t first = 0; first < conv.taps; first += kStreamPairs) {
        const uint32_t b =
            shared_unit(conv.at.weights) + weights.slot * kStreamPairs * 2 * kChannels;
        const HaloPair* pairs = conv.tables.pairs + first;
        barriers.weights_full[weights.slot].wait(weights.parity);
        static_assert(kStreamPairs == 4);
        switch (min(conv.taps - first, kStreamPairs)) {
          case 1:
            multiply_stage<1>(acc, a, b, pairs);
            break;
          case 2:
            multiply_stage<2>(acc, a, b, pairs);
            break;
          case 3:
            multiply_stage<3>(acc, a, b, pairs);
            break;
          default:
            multiply_stage<4>(acc, a, b, pairs);
        }
        // All but the multiplications just begun are over: what they read can be loaded anew.
        wgmma_wait<1>();
        if (self.is_leader && last_weights >= 0) barriers.weights_empty[last_weights].arrive();
        if (self.is_leader && first == 0 && last_halo >= 0) barriers.halo_empty[last_halo].arrive();
        last_weights = weights.slot;
        weights.advance();
      }
      last_halo = halo.slot;
      halo.advance();
    }
    barriers.pixels_full[pixels.slot].wait(pixels.parity);
    wgmma_wait<0>();
    if (self.is_leader) {
      barriers.weights_empty[last_weights].arrive();
      barriers.halo_empty[last_halo].arrive();
    }
#pragma unroll
    for (int r = 0; r < kStreamedRunsPerConsumer; ++r) {
      const int32_t run = first_run + r;
      if (run < plan.runs) {
        finish<kChannels>(args, self, acc[r], pixels_at(conv, pixels.slot, run));
      }
      if (self.is_leader_lane) barriers.pixels_empty[pixels.slot].arrive();
    }
    pixels.advance();
  }
}

template <int kChannels, bool kStreamed>
__global__ void __launch_bounds__(kThreads, 1)
    conv2d_kernel(const __grid_constant__ Maps maps, const __grid_constant__ TileConv args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const HaloConv& conv = args.conv;
  Barriers& barriers = *shared<Barriers>(conv.at.barriers);
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&maps.input));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&maps.weights));
    init_barriers(barriers, conv.plan);
  }
  write_zeros(conv, threadIdx.x, kThreads);
  cutlass::arch::fence_view_async_shared();
  __syncthreads();
  // All before this overlaps with the end of the kernel before.
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();

  // The shuffle tells the compiler that the warp agrees.
  const int warpgroup = __shfl_sync(kWholeWarp, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kFeederRegisters>();
    if (threadIdx.x == 0) {
      Loader<kStreamed>(maps, conv, barriers).run();
    } else if (threadIdx.x >= kWarpSize) {
      count_bits(conv, barriers);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    // While the first halo and weights are on their way.
    prepare_channels(
        args, threadIdx.x - kWarpgroup, kMultipliers, [&] { barriers.counts_full.wait(0); },
        [] { cutlass::arch::NamedBarrier::sync(kMultipliers, kConsumerBarrier); });
    const int thread = threadIdx.x % kWarpgroup;
    const Consumer self = {warpgroup - 1, thread / kWarpSize, thread % kWarpSize == 0, thread == 0};
    if constexpr (kStreamed) {
      multiply_streamed<kChannels>(args, barriers, self);
    } else {
      multiply_resident<kChannels>(args, barriers, self);
    }
  }
#endif
}

bool runs_on(const Target& target) {
  return target.is_cuda && target.compute_capability == 90 && has_machine_code("90a");
}

// cuTensorMapEncodeTiled, without linking the driver's library.
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                              cudaEnableDefault, &found),
             "binary_conv2d");
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
  constexpr cuuint32_t kRow = kMapChannels * kChunkBytes;
  const PreparedLayout prepared = prepared_layout(args.shape.weight);
  const cuuint64_t taps = prepared.taps, chunks = prepared.chunks;
  const cuuint64_t channels = prepared.channels, atom = channels * kChunkBytes;
  const cuuint32_t box_channels = plan.block_channels, box_taps = taps;
  return tensor_map<4>(args.prepared_weight, {kRow, channels / kMapChannels, taps, chunks},
                       {kRow, atom, taps * atom},
                       {kRow, box_channels / kMapChannels,
                        plan.is_streamed ? cuuint32_t{kStreamPairs} : box_taps, 1},
                       {1, 1, 1, 1});
}

bool accepts(const Conv2dShape& shape) {
  constexpr int64_t kShared = 227 * 1024;  // What a block can have on sm_90.
  return halo_accepts(shape, kShared);
}

void launch_conv2d(const Conv2dArgs& args, const Queue& queue) {
  const DeviceGuard guard(queue.device(), "binary_conv2d");  // For the tensor maps.
  const HaloLimits limits = {.multiprocessors = multiprocessors(queue.device()),
                             .shared_bytes = shared_bytes(queue.device()),
                             .streamed_runs = kStreamedRuns,
                             .least_channels = 32};
  const TileConv conv = tile_conv(args, plan_halo(args.shape, limits));
  const HaloPlan& plan = conv.conv.plan;
  const auto kernel = plan.is_streamed             ? conv2d_kernel<128, true>
                      : plan.block_channels == 128 ? conv2d_kernel<128, false>
                      : plan.block_channels == 64  ? conv2d_kernel<64, false>
                                                   : conv2d_kernel<32, false>;
  launch("binary_conv2d", queue,
         {tile_blocks(args.shape, plan, limits), kThreads, static_cast<size_t>(conv.conv.at.total),
          true},
         kernel, Maps{input_map(args, plan), weight_map(args, plan)}, conv);
}

}  // namespace

const Kernel kConv2dSm90 = {.name = "cuda_sm90",
                            .runs_on = runs_on,
                            .accepts = accepts,
                            .prepared_bytes = prepared_bytes,
                            .prepare = prepare_weight,
                            .workspace_bytes = no_workspace,
                            .launch = launch_conv2d};

}  // namespace binconv::cuda

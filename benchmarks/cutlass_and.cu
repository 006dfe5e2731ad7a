// CUTLASS's own b1 implicit GEMM (mma.sync m16n8k256, AND and popcount) as a competitor to measure
// against. It writes the plain int32 popcount(a & w), without the correction that makes a +1/-1
// convolution of it, so it does less than binconv does.
//
//   nvcc -O3 -std=c++17 -arch=sm_90 -Xcompiler -fPIC -shared -I <CUTLASS>/include \
//     benchmarks/cutlass_and.cu -o libcutlass_and.so
//
// sm_80 to sm_90 only: elsewhere CUTLASS compiles this instruction to an assert, or to nothing.

#include <cuda_runtime_api.h>

#include "cutlass/conv/conv2d_problem_size.h"
#include "cutlass/conv/device/implicit_gemm_convolution.h"
#include "cutlass/conv/kernel/default_conv2d_fprop.h"
#include "cutlass/epilogue/thread/linear_combination.h"

#if defined(__CUDA_ARCH__) && !defined(CUTLASS_ARCH_MMA_B1_AND_SM80_ENABLED)
#error "CUTLASS has no b1 AND for this architecture; compile for sm_80, sm_86, sm_89 or sm_90"
#endif

namespace {

using cutlass::gemm::GemmShape;
using Bits = cutlass::uint1b_t;
using NHWC = cutlass::layout::TensorNHWC;
using Store =
    cutlass::epilogue::thread::LinearCombination<int32_t, 4, int32_t, int32_t,
                                                 cutlass::epilogue::thread::ScaleType::Nothing>;

// A threadblock and a warp tile (output pixels, output channels, bits of a tap), and the stages.
template <class Block, class Warp, int kStages>
using Conv2d = cutlass::conv::device::ImplicitGemmConvolution<
    typename cutlass::conv::kernel::DefaultConv2dFprop<
        Bits, NHWC, Bits, NHWC, int32_t, NHWC, int32_t, cutlass::arch::OpClassTensorOp,
        cutlass::arch::Sm80, Block, Warp, GemmShape<16, 8, 256>, Store,
        cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, kStages,
        cutlass::arch::OpAndPopc, cutlass::conv::IteratorAlgorithm::kOptimized>::Kernel>;

template <class Operation>
cutlass::Status run(const cutlass::conv::Conv2dProblemSize& problem, void* input, void* weight,
                    void* output, cudaStream_t stream) {
  const auto nhwc = [](int h, int w, int c) { return NHWC(c, w * c, h * w * c); };
  const NHWC out_layout = nhwc(problem.P, problem.Q, problem.K);
  int32_t* const out = static_cast<int32_t*>(output);
  const typename Operation::Arguments arguments{
      problem,
      {static_cast<Bits*>(input), nhwc(problem.H, problem.W, problem.C)},
      {static_cast<Bits*>(weight), nhwc(problem.R, problem.S, problem.C)},
      {out, out_layout},
      {out, out_layout},
      {}};
  const cutlass::Status possible = Operation::can_implement(arguments);
  if (possible != cutlass::Status::kSuccess) return possible;
  Operation operation;
  return operation(arguments, nullptr, stream);
}

using Run = cutlass::Status (*)(const cutlass::conv::Conv2dProblemSize&, void*, void*, void*,
                                cudaStream_t);

// A tap is a whole number of K tiles, and 512 bits is the least K tile that CUTLASS can pipeline.
constexpr Run kTiles[] = {
    run<Conv2d<GemmShape<128, 256, 512>, GemmShape<64, 64, 512>, 3>>,
    run<Conv2d<GemmShape<128, 128, 512>, GemmShape<64, 64, 512>, 4>>,
    run<Conv2d<GemmShape<128, 64, 512>, GemmShape<64, 32, 512>, 4>>,
    run<Conv2d<GemmShape<64, 64, 512>, GemmShape<32, 32, 512>, 4>>,
    run<Conv2d<GemmShape<128, 128, 1024>, GemmShape<64, 64, 1024>, 3>>,
};

}  // namespace

extern "C" int cutlass_and_tiles() { return sizeof(kTiles) / sizeof(kTiles[0]); }

// Launches tile number `tile` on the stream; returns a cutlass::Status, 0 for success.
// input: packed bits [batch][size][size][in_channels / 8], in_channels a multiple of 128, and
// square kernels; weight: [out_channels][kernel][kernel][in_channels / 8]; output: int32 NHWC.
extern "C" int cutlass_and_conv2d(int tile, int batch, int size, int in_channels, int out_channels,
                                  int kernel, int stride, int pad, void* input, void* weight,
                                  void* output, cudaStream_t stream) {
  const int out_size = (size + 2 * pad - kernel) / stride + 1;
  const cutlass::conv::Conv2dProblemSize problem(
      {batch, size, size, in_channels}, {out_channels, kernel, kernel, in_channels},
      {pad, pad, pad, pad}, {stride, stride}, {1, 1}, {batch, out_size, out_size, out_channels},
      cutlass::conv::Mode::kCrossCorrelation, /*split_k_slices=*/1);
  return static_cast<int>(kTiles[tile](problem, input, weight, output, stream));
}

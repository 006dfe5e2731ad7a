#include <algorithm>
#include <set>
#include <string>

#include "conv2d_check.h"
#include "cuda/architectures.h"
#include "kernel_table.h"
#include "test.h"

// White-box: the kernel table and the choice from it, for devices that need not be there.

namespace binconv::test {
namespace {

constexpr Target kPlainCpu{};
constexpr Target kAvx2Cpu{.cpu = {.avx2 = true}};
constexpr Target kAvx512Cpu{.cpu = {.avx2 = true, .avx512_vpopcntdq = true}};
constexpr Target kNeonCpu{.cpu = {.neon = true}};

Target gpu(int compute_capability) {
  return {.is_cuda = true, .compute_capability = compute_capability};
}

std::vector<Conv2dShape> sample_shapes() {
  std::vector<Conv2dShape> shapes;
  for (uint64_t seed = 0; seed < 200; ++seed) {
    Random random(seed);
    shapes.push_back(random_shape(random));
  }
  return shapes;
}

constexpr int kCapabilities[] = {75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121};

std::vector<Target> targets() {
  std::vector<Target> all = {kPlainCpu, kAvx2Cpu, kAvx512Cpu, kNeonCpu};
  if (*cuda_architectures() == '\0') return all;
  for (int capability : kCapabilities) all.push_back(gpu(capability));
  return all;
}

std::string chosen(const Target& target, const char* forced = nullptr) {
  return select_kernel(shape_3x3(1, 64, 8, 8, 64), target, forced).name;
}

// The kernel for that GPU's tensor cores, if the build has it and there is one.
std::string tensor_core_kernel(int capability) {
  if (cuda::sm90_runs_on(capability, cuda_architectures())) return "cuda_sm90";
  return cuda::sm80_runs_on(capability, cuda_architectures()) ? "cuda_sm80" : "";
}

// Each for a reason of its own.
std::vector<Conv2dShape> shapes_for_no_tensor_core() {
  std::vector<Conv2dShape> shapes(5, shape_3x3(2, 64, 40, 40, 64));
  shapes[0].weight.groups = 8;
  shapes[1].stride_height = 9;
  shapes[2].weight.kernel_height = shapes[2].weight.kernel_width = 12;
  shapes[3].weight.in_channels = 1 << 20;
  shapes[4].dilation_height = 1 << 10, shapes[4].pad_top = 1 << 11;
  return shapes;
}

}  // namespace

TEST(Selection, NamesAreUnique) {
  std::set<std::string> names;
  for (const Kernel* kernel : kernel_table()) CHECK(names.insert(kernel->name).second);
}

TEST(Selection, EveryRowIsComplete) {
  for (const Kernel* kernel : kernel_table()) {
    const Context context(kernel->name);
    CHECK(kernel->runs_on && kernel->accepts && kernel->prepared_bytes && kernel->prepare &&
          kernel->workspace_bytes && kernel->launch);
  }
}

TEST(Selection, CpuTakesItsWidestInstructionSet) {
#if defined(__x86_64__)
  CHECK_EQ(chosen(kPlainCpu), std::string("cpu_portable"));
  CHECK_EQ(chosen(kAvx2Cpu), std::string("cpu_avx2"));
  CHECK_EQ(chosen(kAvx512Cpu), std::string("cpu_avx512"));
#elif defined(__aarch64__)
  CHECK_EQ(chosen(kPlainCpu), std::string("cpu_portable"));
  CHECK_EQ(chosen(kNeonCpu), std::string("cpu_neon"));
#endif
}

TEST(Selection, NoRowRunsOnBothKindsOfDevice) {
  // A build for other GPUs has rows that run nowhere.
  const std::string_view built_for = cuda_architectures();
  const bool has_code_for_all = built_for.empty() || cuda::has_code(built_for, "90a");
  for (const Kernel* kernel : kernel_table()) {
    const Context context(kernel->name);
    const bool on_cpu =
        kernel->runs_on(kPlainCpu) || kernel->runs_on(kAvx512Cpu) || kernel->runs_on(kNeonCpu);
    const bool on_gpu = std::any_of(std::begin(kCapabilities), std::end(kCapabilities),
                                    [&](int c) { return kernel->runs_on(gpu(c)); });
    CHECK(!on_cpu || !on_gpu);
    if (has_code_for_all) CHECK(on_cpu || on_gpu);
  }
}

TEST(Selection, EveryTargetHasARowForEveryShape) {
  const std::vector<Conv2dShape> shapes = sample_shapes();
  for (const Target& target : targets()) {
    for (const Conv2dShape& shape : shapes) {
      const Context context(describe(shape));
      const Kernel& kernel = select_kernel(shape, target, nullptr);
      CHECK(kernel.runs_on(target));
      CHECK(kernel.accepts(shape));
      CHECK(kernel.prepare == weight_kernel(target, nullptr).prepare);
      CHECK(kernel.prepared_bytes(shape.weight) ==
            weight_kernel(target, nullptr).prepared_bytes(shape.weight));
    }
  }
}

TEST(Selection, TakesTheFirstRowThatCanRun) {
  for (const Target& target : targets()) {
    for (const Conv2dShape& shape : sample_shapes()) {
      for (const Kernel* kernel : kernel_table()) {
        if (!kernel->runs_on(target) || !kernel->accepts(shape)) continue;
        if (kernel->prepare != weight_kernel(target, nullptr).prepare) continue;
        CHECK_EQ(std::string(select_kernel(shape, target, nullptr).name),
                 std::string(kernel->name));
        break;
      }
    }
  }
}

TEST(Selection, ForcedRowIsTakenOnEveryShapeItAccepts) {
  for (const Target& target : targets()) {
    for (const Kernel* kernel : kernel_table()) {
      const Context context(kernel->name);
      for (const Conv2dShape& shape : sample_shapes()) {
        if (!kernel->runs_on(target)) {
          CHECK_ERROR(select_kernel(shape, target, kernel->name), Status::kNotSupported, "kernel",
                      kernel->name);
          CHECK_ERROR(weight_kernel(target, kernel->name), Status::kNotSupported, "kernel",
                      kernel->name);
        } else if (!kernel->accepts(shape)) {
          CHECK_ERROR(select_kernel(shape, target, kernel->name), Status::kNotSupported, "kernel",
                      kernel->name);
        } else {
          CHECK(&select_kernel(shape, target, kernel->name) == kernel);
          CHECK(&weight_kernel(target, kernel->name) == kernel);
        }
      }
    }
  }
}

TEST(Selection, UnknownNameIsRejectedOnEveryTarget) {
  for (const Target& target : targets()) {
    CHECK_ERROR(chosen(target, "cpu_avx1024"), Status::kInvalidArgument, "kernel", "cpu_avx1024");
    CHECK_ERROR(chosen(target, "cpu"), Status::kInvalidArgument, "kernel", "cpu");
    CHECK_ERROR(weight_kernel(target, ""), Status::kInvalidArgument, "kernel");
  }
}

TEST(Selection, GpuBelowSm75IsNotSupported) {
  if (*cuda_architectures() == '\0') throw Skip{"built without CUDA"};
  for (int capability : {35, 60, 61, 70, 72}) {
    const std::string version =
        std::to_string(capability / 10) + "." + std::to_string(capability % 10);
    CHECK_ERROR(chosen(gpu(capability)), Status::kNotSupported, "queue", version, "7.5");
    CHECK_ERROR(weight_kernel(gpu(capability), nullptr), Status::kNotSupported, "queue", version,
                "7.5");
  }
}

TEST(Selection, GpuTakesTheKernelForItsTensorCores) {
  if (*cuda_architectures() == '\0') throw Skip{"built without CUDA"};
  for (int capability : kCapabilities) {
    const Context context("compute capability " + std::to_string(capability));
    const std::string kernel = tensor_core_kernel(capability);
    CHECK_EQ(chosen(gpu(capability)), kernel.empty() ? "cuda_direct" : kernel);
  }
  if (tensor_core_kernel(90) == "cuda_sm90")
    CHECK_EQ(chosen(gpu(90), "cuda_sm80"), std::string("cuda_sm80"));
}

TEST(Selection, TensorCoreKernelsRunWhereTheirMachineCodeDoes) {
  struct Build {
    const char* architectures;
    std::set<int> sm80, sm90;
  };
  const Build builds[] = {
      {"75-virtual 80-real 86-real 89-real 90a-real", {80, 86, 89, 90}, {90}},
      {"80-real 90a-real", {80, 86, 89, 90}, {90}},
      {"90a-real", {90}, {90}},
      {"90a", {90}, {90}},
      {"80", {80, 86, 89}, {}},
      {"75-virtual 80-real", {80, 86, 89}, {}},
      {"86", {86, 89}, {}},
      {"75 86-real", {86, 89}, {}},
      {"89-real", {89}, {}},
      {"", {}, {}},
      {"75", {}, {}},
      {"80-virtual 86-virtual 90a-virtual", {}, {}},  // PTX, in which the kernels are empty.
      {"87-real 88-real", {}, {}},
      {"100a-real 103f-real 120", {}, {}},
  };
  for (const Build& build : builds) {
    for (int capability : kCapabilities) {
      const Context context(std::string(build.architectures) + " on " + std::to_string(capability));
      CHECK_EQ(cuda::sm80_runs_on(capability, build.architectures),
               build.sm80.contains(capability));
      CHECK_EQ(cuda::sm90_runs_on(capability, build.architectures),
               build.sm90.contains(capability));
    }
  }
}

TEST(Selection, DirectKernelIsTheFallbackOfEveryGpu) {
  if (*cuda_architectures() == '\0') throw Skip{"built without CUDA"};
  for (int capability : kCapabilities) {
    const std::string kernel = tensor_core_kernel(capability);
    CHECK_EQ(chosen(gpu(capability), "cuda_direct"), std::string("cuda_direct"));
    for (const Conv2dShape& shape : shapes_for_no_tensor_core()) {
      const Context context(describe(shape));
      CHECK_EQ(std::string(select_kernel(shape, gpu(capability), nullptr).name),
               std::string("cuda_direct"));
      if (kernel.empty()) continue;
      CHECK_ERROR(select_kernel(shape, gpu(capability), kernel.c_str()), Status::kNotSupported,
                  "kernel", kernel, "shape");
    }
    for (const Conv2dShape& shape : sample_shapes()) {
      CHECK(select_kernel(shape, gpu(capability), "cuda_direct").accepts(shape));
    }
  }
}

TEST(Selection, SizesGrowWithTheWeightAndHoldEveryBit) {
  for (const Target& target : targets()) {
    for (const Kernel* kernel : kernel_table()) {
      if (!kernel->runs_on(target)) continue;
      const Context context(kernel->name);
      for (const Conv2dShape& shape : sample_shapes()) {
        const WeightShape& weight = shape.weight;
        const int64_t bits = weight.out_channels * weight.kernel_height * weight.kernel_width *
                             weight.in_channels / weight.groups;
        CHECK(kernel->prepared_bytes(weight) * 8 >= bits);
        WeightShape larger = weight;
        larger.out_channels += weight.groups;
        CHECK(kernel->prepared_bytes(larger) >= kernel->prepared_bytes(weight));
      }
    }
  }
}

}  // namespace binconv::test

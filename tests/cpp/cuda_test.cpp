#include <cuda_runtime_api.h>

#include <chrono>
#include <future>

#include "conv2d_check.h"
#include "test.h"

// What holds for CUDA streams alone.

namespace binconv::test {
namespace {

using namespace std::chrono_literals;

void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// One call of everything, in memory that was allocated before.
class Network {
 public:
  explicit Network(const Queue& queue)
      : queue_(queue),
        x_(queue, values(), 4),
        packed_(queue, packed_image_bytes(image_), 16),
        packed_weight_(queue, problem_.packed_weight(), 16),
        prepared_(queue, prepared_weight_bytes(shape_.weight, queue), 16),
        workspace_(queue, workspace_bytes(shape_, queue), 16),
        sums_(queue, 7 * 7 * 48 * 4, 4),
        scale_(queue, 48 * 4, 4),
        halves_(queue, 7 * 7 * 48 * 2, 2) {
    synchronize(queue);
  }

  void launch(const Queue& queue) const {
    pack_bits(image_, x_.data(), DataType::kFloat32, Layout::kNHWC, {}, packed_.data(), queue);
    unpack_bits(image_, packed_.data(), x_.data(), DataType::kFloat32, Layout::kNHWC, queue);
    abs_mean(48, 16, x_.data(), DataType::kFloat32, scale_.as<float>(), queue);
    prepare_weight(shape_.weight, packed_weight_.data(), prepared_.data(), queue);
    binary_conv2d(shape_, packed_.data(), prepared_.data(), {.out_type = DataType::kInt32},
                  sums_.data(), workspace_.data(), queue);
    binary_conv2d(shape_, packed_.data(), prepared_.data(),
                  {.out_type = DataType::kFloat16, .scale = scale_.as<float>()}, halves_.data(),
                  workspace_.data(), queue);
    scale_channels({1, 48, 7, 7}, halves_.data(), DataType::kFloat16, Layout::kNHWC,
                   scale_.as<float>(), halves_.data(), queue);
  }

  std::vector<int> sums() const { return sums_.read_as<int>(); }

  std::vector<int> expected_sums() const {
    std::vector<int> expected;
    for (size_t i = 0; i < problem_.pixels().size(); ++i) {
      for (int64_t o = 0; o < 48; ++o) expected.push_back(problem_.acc(i, o));
    }
    return expected;
  }

 private:
  std::vector<float> values() const {
    std::vector<float> all;
    for (int64_t pixel = 0; pixel < 49; ++pixel) {
      for (int64_t c = 0; c < 96; ++c) {
        all.push_back((problem_.packed_input()[pixel * 16 + c / 8] >> (c % 8)) & 1 ? 1.0f : -1.0f);
      }
    }
    return all;
  }

  Queue queue_;
  Conv2dShape shape_ = shape_3x3(1, 96, 7, 7, 48);
  ImageShape image_{1, 96, 7, 7};
  Problem problem_{shape_};
  Buffer x_, packed_, packed_weight_, prepared_, workspace_, sums_, scale_, halves_;
};

}  // namespace

TEST(Cuda, CallsReturnBeforeTheStreamHasRunThem) {
  for (const Queue& queue : kernel_queues()) {
    const Context context(describe(queue));
    const Network network(queue);
    network.launch(queue);  // Modules are loaded on first use, which may wait for the device.
    synchronize(queue);
    std::promise<void> gate;
    std::shared_future<void> opened = gate.get_future().share();
    check_cuda(cudaLaunchHostFunc(
        queue.stream(),
        [](void* gate) { static_cast<std::shared_future<void>*>(gate)->wait_for(20s); }, &opened));
    const auto start = std::chrono::steady_clock::now();
    network.launch(queue);
    CHECK(std::chrono::steady_clock::now() - start < 10s);
    CHECK_EQ(cudaStreamQuery(queue.stream()), cudaErrorNotReady);
    gate.set_value();
    synchronize(queue);
    CHECK_EQ(network.sums(), network.expected_sums());
  }
}

TEST(Cuda, CallsCanBeCapturedIntoAGraph) {
  for (const Queue& queue : kernel_queues()) {
    const Context context(describe(queue));
    const Network network(queue);
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    check_cuda(cudaStreamBeginCapture(queue.stream(), cudaStreamCaptureModeGlobal));
    network.launch(queue);
    check_cuda(cudaStreamEndCapture(queue.stream(), &graph));
    check_cuda(cudaGraphInstantiate(&executable, graph, 0));
    for (int i = 0; i < 3; ++i) check_cuda(cudaGraphLaunch(executable, queue.stream()));
    synchronize(queue);
    CHECK_EQ(network.sums(), network.expected_sums());
    check_cuda(cudaGraphExecDestroy(executable));
    check_cuda(cudaGraphDestroy(graph));
  }
}

TEST(Cuda, DefaultStreamWorks) {
  for (const Queue& queue : kernel_queues()) {
    const Context context(describe(queue));
    const Network network(queue);
    network.launch(Queue::cuda(nullptr, 0).with_kernel(queue.kernel()));
    check_cuda(cudaDeviceSynchronize());
    CHECK_EQ(network.sums(), network.expected_sums());
  }
}

TEST(Cuda, CurrentDeviceIsRestored) {
  queues();
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count));
  if (count < 2) throw Skip{"one CUDA device only"};
  const Queue queue = kernel_queues()[0];
  const Network network(queue);
  check_cuda(cudaSetDevice(1));
  network.launch(queue);
  int device = -1;
  check_cuda(cudaGetDevice(&device));
  CHECK_EQ(device, 1);
  CHECK_ERROR(packed_bytes(0), Status::kInvalidArgument, "channels");
  check_cuda(cudaSetDevice(0));
  synchronize(queue);
  CHECK_EQ(network.sums(), network.expected_sums());
}

TEST(Cuda, UnknownOrdinalIsAnError) {
  queues();
  bool threw = false;
  try {
    available_kernels(Queue::cuda(nullptr, 4096));
  } catch (const Error& error) {
    threw = true;
    CHECK(std::string(error.what()).find("4096") != std::string::npos);
  }
  CHECK(threw);
  check_cuda(cudaGetLastError());  // Nor is the error left behind for the next caller to find.
}

TEST(Cuda, DevicesAreDescribed) {
  queues();
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count));
  const std::vector<CudaDevice> devices = cuda_devices();
  CHECK_EQ(static_cast<int>(devices.size()), count);
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    check_cuda(cudaGetDeviceProperties(&properties, i));
    CHECK_EQ(devices[i].name, std::string(properties.name));
    CHECK_EQ(devices[i].compute_capability, 10 * properties.major + properties.minor);
  }
}

}  // namespace binconv::test

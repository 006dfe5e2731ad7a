#include <binconv/binconv.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

// One binary 3x3 convolution on the CPU: 64 channels in, 2 out, zero padding.
int main() {
  const binconv::Queue queue = binconv::Queue::cpu(/*threads=*/2);

  binconv::Conv2dShape shape;
  shape.batch = 1;
  shape.in_height = shape.in_width = 4;
  shape.weight.in_channels = 64;
  shape.weight.out_channels = 2;
  shape.weight.kernel_height = shape.weight.kernel_width = 3;
  shape.pad_top = shape.pad_left = shape.pad_bottom = shape.pad_right = 1;

  // The library allocates nothing. Packed data is 16-byte aligned, as malloc's is on 64-bit
  // systems.
  const auto allocate = [](int64_t bytes) { return std::malloc(static_cast<size_t>(bytes)); };
  const binconv::ImageShape image{shape.batch, 64, 4, 4}, kernel{2, 64, 3, 3};
  void* const input = allocate(binconv::packed_image_bytes(image));
  void* const weight = allocate(binconv::packed_image_bytes(kernel));
  void* const prepared = allocate(binconv::prepared_weight_bytes(shape.weight, queue));
  void* const workspace = allocate(binconv::workspace_bytes(shape, queue));

  // The image is +1 everywhere; filter 0 is +1 everywhere, filter 1 is -1.
  const std::vector<float> x(64 * 4 * 4, 0.5f);
  std::vector<float> w(2 * 64 * 3 * 3, 0.5f);
  for (size_t i = w.size() / 2; i < w.size(); ++i) w[i] = -0.5f;
  binconv::pack_bits(image, x.data(), binconv::DataType::kFloat32, binconv::Layout::kNCHW, {},
                     input, queue);
  binconv::pack_bits(kernel, w.data(), binconv::DataType::kFloat32, binconv::Layout::kNCHW, {},
                     weight, queue);

  binconv::prepare_weight(shape.weight, weight, prepared, queue);  // Once per layer.

  const std::vector<float> scale = {0.5f, 0.25f};
  binconv::Epilogue epilogue;
  epilogue.out_layout = binconv::Layout::kNCHW;
  epilogue.scale = scale.data();
  std::vector<float> y(2 * 4 * 4);
  binconv::binary_conv2d(shape, input, prepared, epilogue, y.data(), workspace,
                         queue);  // Per batch.

  for (void* memory : {input, weight, prepared, workspace}) std::free(memory);
  std::printf("%s on %s: corner %g, centre %g and %g\n", binconv::version(),
              binconv::kernel_name(shape, queue), y[0], y[5], y[16 + 5]);
  // 4 of 9 taps see the image from the corner, all 9 from the centre.
  return y[0] == 0.5f * 4 * 64 && y[5] == 0.5f * 9 * 64 && y[16 + 5] == -0.25f * 9 * 64 ? 0 : 1;
}

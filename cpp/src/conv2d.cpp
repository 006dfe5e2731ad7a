#include "binconv/conv2d.h"

#include <limits>
#include <utility>

#include "check.h"
#include "kernel_table.h"

namespace binconv {
namespace {

int64_t out_extent(int64_t in, int64_t pad_before, int64_t pad_after, int64_t dilation,
                   int64_t kernel, int64_t stride) {
  for (int64_t extent : {in, pad_before, pad_after, dilation, kernel, stride}) {
    if (extent < 0 || extent > std::numeric_limits<int32_t>::max()) return 0;
  }
  const int64_t room = in + pad_before + pad_after - dilation * (kernel - 1) - 1;
  return room < 0 || stride == 0 ? 0 : room / stride + 1;
}

void check_optional(const char* name, const float* pointer) {
  if (pointer) check_pointer(name, pointer, sizeof(float));
}

void check_activation(const Activation& activation) {
  for (const auto& [name, pointer] : {std::pair{"in_shift", activation.in_shift},
                                      {"slope", activation.slope},
                                      {"out_shift", activation.out_shift}}) {
    require(activation.enabled || !pointer, name,
            ": got a pointer for no activation, expected null or activation.enabled");
    check_optional(name, pointer);
  }
}

// What says which bits are written, and where beside values. Those of an empty batch may lie
// nowhere: then null does not tell that none are asked for.
void check_bits(const Epilogue& epilogue, int64_t batch) {
  if (epilogue.out_type == DataType::kBits) {
    require(epilogue.out_layout == Layout::kNHWC, "out_layout: got kNCHW for bits, expected kNHWC");
    require(!epilogue.bits, "bits: got a pointer beside an output of bits, expected null");
  } else if (!epilogue.bits && batch > 0) {
    const char* type = to_string(epilogue.out_type);
    require(!epilogue.threshold.per_channel, "threshold: got thresholds for an output of ", type,
            ", expected them for bits only");
    require(!epilogue.threshold_below, "threshold_below: got directions for an output of ", type,
            ", expected them for bits only");
  }
  check_optional("threshold", epilogue.threshold.per_channel);
  if (epilogue.bits) check_pointer("bits", epilogue.bits, kPackedAlignment);
}

void check_epilogue(const Epilogue& epilogue, int64_t batch) {
  check_type("out_type", epilogue.out_type,
             {DataType::kInt32, DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16,
              DataType::kBits});
  check_layout("out_layout", epilogue.out_layout);
  if (epilogue.out_type == DataType::kInt32) {
    require(!epilogue.scale, "scale: got a scale for an int32 output, expected none");
    require(!epilogue.bias, "bias: got a bias for an int32 output, expected none");
    require(!epilogue.residual, "residual: got a residual for an int32 output, expected none");
    require(!epilogue.activation.enabled, "activation: got one for an int32 output, expected none");
    require(!epilogue.bits, "bits: got a pointer beside an int32 output, expected null");
  }
  check_optional("scale", epilogue.scale);
  check_optional("bias", epilogue.bias);
  if (epilogue.residual) {
    check_type("residual_type", epilogue.residual_type, kFloatTypes);
    check_pointer("residual", epilogue.residual, element_bytes(epilogue.residual_type));
  }
  check_activation(epilogue.activation);
  check_bits(epilogue, batch);
}

void check_operands(const void* prepared_weight, const Epilogue& epilogue, const void* output) {
  check_pointer("prepared_weight", prepared_weight, kPackedAlignment);
  check_pointer(
      "output", output,
      epilogue.out_type == DataType::kBits ? kPackedAlignment : element_bytes(epilogue.out_type));
}

ImageShape in_image(const Conv2dShape& shape) {
  return {shape.batch, shape.weight.in_channels, shape.in_height, shape.in_width};
}

// A weight as the image of its filters.
ImageShape weight_image(const WeightShape& weight) {
  return {weight.out_channels, weight.in_channels / weight.groups, weight.kernel_height,
          weight.kernel_width};
}

const Kernel& checked_kernel(const Conv2dShape& shape, const Queue& queue) {
  check_conv2d(shape);
  return select_kernel(shape, target_of(queue), queue.kernel());
}

}  // namespace

int64_t Conv2dShape::out_height() const {
  return out_extent(in_height, pad_top, pad_bottom, dilation_height, weight.kernel_height,
                    stride_height);
}

int64_t Conv2dShape::out_width() const {
  return out_extent(in_width, pad_left, pad_right, dilation_width, weight.kernel_width,
                    stride_width);
}

int64_t prepared_weight_bytes(const WeightShape& shape, const Queue& queue) {
  check_weight(shape);
  return weight_kernel(target_of(queue), queue.kernel()).prepared_bytes(shape);
}

void prepare_weight(const WeightShape& shape, const void* packed, void* prepared,
                    const Queue& queue) {
  check_weight(shape);
  check_pointer("packed", packed, kPackedAlignment);
  check_pointer("prepared", prepared, kPackedAlignment);
  weight_kernel(target_of(queue), queue.kernel())
      .prepare(shape, static_cast<const uint8_t*>(packed), static_cast<uint8_t*>(prepared), queue);
}

int64_t weight_workspace_bytes(const WeightShape& shape, const Queue& queue) {
  check_weight(shape);
  const Kernel& kernel = weight_kernel(target_of(queue), queue.kernel());
  return kernel.prepare_values ? 0 : packed_image_bytes(weight_image(shape));
}

void prepare_weight(const WeightShape& shape, const void* weight, DataType type, Layout layout,
                    void* prepared, float* means, void* workspace, const Queue& queue) {
  check_weight(shape);
  check_type("type", type, kValueTypes);
  check_layout("layout", layout);
  require(!means || type != DataType::kInt8,
          "means: got a pointer for a weight of int8, expected null");
  check_pointer("weight", weight, element_bytes(type));
  check_pointer("prepared", prepared, kPackedAlignment);
  check_optional("means", means);
  const Kernel& kernel = weight_kernel(target_of(queue), queue.kernel());
  auto* const to = static_cast<uint8_t*>(prepared);
  if (kernel.prepare_values) {
    return kernel.prepare_values(shape, {weight, type, layout}, to, means, queue);
  }
  check_pointer("workspace", workspace, kPackedAlignment);
  const ImageShape image = weight_image(shape);
  pack_bits(image, weight, type, layout, {}, workspace, queue);
  kernel.prepare(shape, static_cast<const uint8_t*>(workspace), to, queue);
  if (means) {
    const int64_t columns = image.channels * image.height * image.width;
    abs_mean(image.batch, columns, weight, type, means, queue);
  }
}

int64_t workspace_bytes(const Conv2dShape& shape, const Queue& queue) {
  return checked_kernel(shape, queue).workspace_bytes(shape, queue);
}

void binary_conv2d(const Conv2dShape& shape, const void* input, const void* prepared_weight,
                   const Epilogue& epilogue, void* output, void* workspace, const Queue& queue) {
  const Kernel& kernel = checked_kernel(shape, queue);
  check_epilogue(epilogue, shape.batch);
  if (shape.batch == 0) return;
  check_pointer("input", input, kPackedAlignment);
  check_operands(prepared_weight, epilogue, output);
  if (kernel.workspace_bytes(shape, queue) > 0)
    check_pointer("workspace", workspace, kPackedAlignment);
  kernel.launch({shape, static_cast<const uint8_t*>(input),
                 static_cast<const uint8_t*>(prepared_weight), epilogue, output, workspace},
                queue);
}

int64_t values_workspace_bytes(const Conv2dShape& shape, const Queue& queue) {
  return workspace_bytes(shape, queue) + packed_image_bytes(in_image(shape));
}

void binary_conv2d(const Conv2dShape& shape, const Values& x, const void* prepared_weight,
                   const Epilogue& epilogue, void* output, void* workspace, const Queue& queue) {
  const Kernel& kernel = checked_kernel(shape, queue);
  check_epilogue(epilogue, shape.batch);
  check_type("type", x.type, kValueTypes);
  check_layout("layout", x.layout);
  if (shape.batch == 0) return;
  check_pointer("x", x.data, element_bytes(x.type));
  check_optional("threshold", x.threshold.per_channel);
  check_operands(prepared_weight, epilogue, output);
  check_pointer("workspace", workspace, kPackedAlignment);
  uint8_t* const packed = static_cast<uint8_t*>(workspace);
  const ImageShape image = in_image(shape);
  const Conv2dArgs args = {shape,    packed, static_cast<const uint8_t*>(prepared_weight),
                           epilogue, output, packed + packed_image_bytes(image)};
  if (kernel.takes_values && kernel.takes_values(shape, x)) {
    return kernel.launch_values(args, x, queue);
  }
  pack_bits(image, x.data, x.type, x.layout, x.threshold, packed, queue);
  kernel.launch(args, queue);
}

const char* kernel_name(const Conv2dShape& shape, const Queue& queue) {
  return checked_kernel(shape, queue).name;
}

}  // namespace binconv

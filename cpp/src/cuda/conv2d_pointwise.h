#pragma once

#include "kernel_table.h"

// For rows of the kernel table whose weights are as in prepared_weight.h, on GPUs from 8.0 up.

namespace binconv::cuda {

bool pointwise_takes(const Conv2dShape& shape, const Values& x);
void launch_pointwise(const Conv2dArgs& args, const Values& x, const Queue& queue);

}  // namespace binconv::cuda

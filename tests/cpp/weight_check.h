#pragma once

#include "conv2d_check.h"

namespace binconv::test {

// prepare_weight of random values, some of them special: the bytes that their bits give, and means
// as of abs_mean.
void check_weight_of_values(const WeightShape& shape, const Queue& queue, DataType type,
                            Layout layout, bool has_means, Placement placement, uint64_t seed);

// The same with all but the shape drawn from the seed.
void check_random_weight(const WeightShape& shape, const Queue& queue, uint64_t seed);

}  // namespace binconv::test

#pragma once

// Every header that conv2d_tile.h needs. A conv2d_<isa>.cpp includes these before it switches its
// target on: inline functions of the standard library are shared with the rest of the program and
// must stay code that every CPU can run.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/cpu.h"

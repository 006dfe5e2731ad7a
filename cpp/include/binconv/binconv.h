#pragma once

// The whole library. A first program is in the README; the conventions are in docs/conventions.md.

#include "binconv/bits.h"
#include "binconv/conv2d.h"
#include "binconv/error.h"
#include "binconv/gradient.h"
#include "binconv/kernels.h"
#include "binconv/scale.h"
#include "binconv/types.h"

#pragma once

#include "cute/arch/copy_sm90_desc.hpp"
#include "emulation/copies.h"

namespace cute {

struct SM90_TMA_LOAD_4D {
  static void copy(const void* map, uint64_t* barrier, uint64_t, void* to, const int32_t& x0,
                   const int32_t& x1, const int32_t& x2, const int32_t& x3) {
    binconv::emulation::copy_tensor(map, barrier, to, {x0, x1, x2, x3, 0});
  }
};

struct SM90_TMA_LOAD_5D {
  static void copy(const void* map, uint64_t* barrier, uint64_t, void* to, const int32_t& x0,
                   const int32_t& x1, const int32_t& x2, const int32_t& x3, const int32_t& x4) {
    binconv::emulation::copy_tensor(map, barrier, to, {x0, x1, x2, x3, x4});
  }
};

struct SM90_BULK_COPY_G2S {
  static void copy(const void* from, uint64_t* barrier, void* to, int32_t bytes) {
    binconv::emulation::copy_bulk(from, barrier, to, bytes);
  }
};

}  // namespace cute

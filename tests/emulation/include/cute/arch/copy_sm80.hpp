#pragma once

#include "cute/arch/copy_sm75.hpp"
#include "emulation/copies.h"

namespace cute {

template <class From, class To = From>
struct SM80_CP_ASYNC_CACHEGLOBAL_ZFILL {
  static_assert(sizeof(From) == 16);
  static void copy(const From& from, To& to, bool is_inside) {
    binconv::emulation::copy_async(&from, &to, is_inside);
  }
};

inline void cp_async_fence() { binconv::emulation::commit_copies(); }
template <int kLeft>
void cp_async_wait() {
  binconv::emulation::wait_for_copies(kLeft);
}

}  // namespace cute

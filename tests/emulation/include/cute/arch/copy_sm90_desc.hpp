#pragma once

#include <cuda.h>

namespace cute {

using TmaDescriptor = CUtensorMap;
inline void prefetch_tma_descriptor(const TmaDescriptor*) {}

namespace TMA {
enum class CacheHintSm90 : uint64_t { EVICT_NORMAL, EVICT_FIRST, EVICT_LAST };
}

}  // namespace cute

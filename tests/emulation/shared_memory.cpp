#include "emulation/shared_memory.h"

#include <algorithm>
#include <cstring>

#include "emulation/fibers.h"

namespace {

constexpr int kGuardBytes = 32 * 1024;

}  // namespace

namespace binconv::cuda {

// What halo.cuh declares.
alignas(1024) thread_local uint8_t shared_memory[binconv::emulation::kMaxSharedBytes + kGuardBytes];

}  // namespace binconv::cuda

namespace binconv::emulation {
namespace {

using cuda::shared_memory;

constexpr uint32_t kFirstAddress = 1024;
constexpr uint8_t kGuard = 0xe7;
int64_t shared_bytes = 0;

}  // namespace

void reset_shared_memory(int64_t bytes) {
  shared_bytes = bytes;
  if (bytes == 0) return;
  uint64_t word = random().bits();
  for (int64_t i = 0; i + 8 <= bytes; i += 8) {
    word = word * 6364136223846793005u + 1442695040888963407u;
    const uint64_t mixed = word ^ word >> 29;
    std::memcpy(shared_memory + i, &mixed, sizeof mixed);
  }
  std::memset(shared_memory + bytes, kGuard, sizeof shared_memory - bytes);
}

void check_shared_memory() {
  if (shared_bytes == 0) return;
  const uint8_t* const begin = shared_memory + shared_bytes;
  const uint8_t* const end = shared_memory + sizeof shared_memory;
  const auto is_written = [](uint8_t byte) { return byte != kGuard; };
  const uint8_t* const written = std::find_if(begin, end, is_written);
  require(written == end, "written beyond shared memory, at ", written - shared_memory, " of ",
          shared_bytes, " bytes");
}

int64_t shared_offset(const void* pointer, int64_t bytes, int64_t alignment, const char* what) {
  const int64_t offset = static_cast<const uint8_t*>(pointer) - shared_memory;
  require(offset >= 0 && offset + bytes <= shared_bytes, what, " touches ", bytes, " bytes at ",
          offset, ", beyond ", shared_bytes, " bytes of shared memory");
  require(offset % alignment == 0, what, " touches shared memory at ", offset,
          ", which is not aligned to ", alignment);
  return offset;
}

uint32_t shared_address(const void* pointer) {
  return kFirstAddress + static_cast<uint32_t>(shared_offset(pointer, 0, 1, "an address"));
}

const uint8_t* at_shared_address(uint32_t address, int64_t bytes, const char* what) {
  const int64_t offset = int64_t{address} - kFirstAddress;
  require(offset >= 0 && offset + bytes <= shared_bytes, what, " touches ", bytes, " bytes at ",
          offset, ", beyond ", shared_bytes, " bytes of shared memory");
  return shared_memory + offset;
}

}  // namespace binconv::emulation

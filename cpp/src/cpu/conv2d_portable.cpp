#include "cpu/conv2d_prelude.h"
#include "cpu/conv2d_tile.h"

namespace binconv::cpu {
namespace {

struct Portable {
  static constexpr int kWordBytes = 8;
  static constexpr int kLanes = 8;
  static constexpr int kBlock = kLanes;
  static constexpr int kRows = 4;

  static void count(const uint8_t* rows, int64_t row_bytes, const uint8_t* weights, int64_t,
                    int32_t (&counts)[kRows][kBlock]) {
    std::memset(counts, 0, sizeof counts);
    for (int64_t k = 0; k < row_bytes; k += kWordBytes) {
      for (int o = 0; o < kBlock; ++o) {
        const uint64_t weight = load(weights + k * kBlock + o * kWordBytes);
        for (int r = 0; r < kRows; ++r) {
          counts[r][o] += std::popcount(weight ^ load(rows + r * row_bytes + k));
        }
      }
    }
  }

  static uint64_t load(const uint8_t* bytes) {
    uint64_t word;
    std::memcpy(&word, bytes, sizeof word);
    return word;
  }
};

}  // namespace

constexpr Kernel kConv2dPortable =
    make_kernel<Portable>("cpu_portable", [](const Target& target) { return !target.is_cuda; });

}  // namespace binconv::cpu

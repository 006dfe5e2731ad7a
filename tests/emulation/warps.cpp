#include "emulation/warps.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "emulation/fibers.h"
#include "emulation/shared_memory.h"

namespace binconv::emulation {
namespace {

struct Warp {
  int arrived = 0;
  const char* operation = "";
  int64_t generation = 0;
  LaneValues values[2];  // Of this meeting and of the last one.
  Waiters waiters;
};

std::array<Warp, kMaxWarps> warps;

constexpr int kRegisterFile = 65536, kRegisterStep = 8, kMaxRegisters = 255;
std::array<int, kMaxThreads> registers;  // Of each thread.
int free_registers = 0;                  // Of the block.
Waiters register_waiters;

uint32_t word_of(const uint8_t (&value)[kLaneBytes], int index) {
  uint32_t word;
  std::memcpy(&word, value + 4 * index, sizeof word);
  return word;
}

}  // namespace

void reset_warps(int threads) {
  for (Warp& warp : warps) {
    warp.arrived = 0;
    warp.waiters.clear();
  }
  const int share = kRegisterFile / threads / kRegisterStep * kRegisterStep;
  registers.fill(std::min(share, kMaxRegisters));
  free_registers = 0;
  register_waiters.clear();
}

const LaneValues& exchange(const char* operation, const void* value, int bytes) {
  Warp& warp = warps[this_thread() / kWarpSize];
  require(warp.arrived == 0 || std::strcmp(warp.operation, operation) == 0,
          "the lanes of a warp are at ", warp.operation, " and at ", operation);
  warp.operation = operation;
  const int64_t generation = warp.generation;
  LaneValues& values = warp.values[generation % 2];
  if (bytes > 0) std::memcpy(values[this_thread() % kWarpSize], value, bytes);
  if (++warp.arrived == kWarpSize) {
    warp.arrived = 0;
    ++warp.generation;
    wake(warp.waiters);
  }
  while (warp.generation == generation) wait_in(warp.waiters, operation);
  return values;
}

void sync_warp(const char* operation) { exchange(operation, nullptr, 0); }

// Lane l gives row l % 8 of matrix l / 8, and gets word l % 4 of row l / 4 of each.
void load_matrices(const void* row, uint32_t (&matrices)[4]) {
  constexpr int kRowBytes = 16;
  shared_offset(row, kRowBytes, kRowBytes, "ldmatrix");
  const LaneValues& rows = exchange("ldmatrix", row, kRowBytes);
  const int lane = this_thread() % kWarpSize;
  for (int i = 0; i < 4; ++i) matrices[i] = word_of(rows[8 * i + lane / 4], lane % 4);
}

// Of a, a lane holds word lane % 4 of rows lane / 4 and lane / 4 + 8, of the first and then of the
// second 128 bits; of b, the same words of column lane / 4. Of c and d it holds columns
// 2 * (lane % 4) and the next one of both rows.
void multiply_16x8x256(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                       const uint32_t (&c)[4]) {
  const uint32_t mine[] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const LaneValues& all = exchange("mma", mine, sizeof mine);
  const int lane = this_thread() % kWarpSize;
  uint32_t sums[4];
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    sums[i] = c[i];
    for (int k = 0; k < 8; ++k) {
      const uint32_t in_row = word_of(all[row % 8 * 4 + k % 4], row / 8 + k / 4 * 2);
      const uint32_t in_column = word_of(all[column * 4 + k % 4], 4 + k / 4);
      sums[i] += std::popcount(in_row & in_column);
    }
  }
  std::copy(sums, sums + 4, d);
}

void take_registers(int count) {
  sync_warp("setmaxnreg.inc");
  int& mine = registers[this_thread()];
  const int more = count - mine;
  require(more >= 0, "setmaxnreg.inc from ", mine, " to ", count, " registers");
  while (free_registers < more) wait_in(register_waiters, "setmaxnreg.inc", count, free_registers);
  free_registers -= more;
  mine = count;
}

void give_registers(int count) {
  sync_warp("setmaxnreg.dec");
  int& mine = registers[this_thread()];
  require(count <= mine, "setmaxnreg.dec from ", mine, " to ", count, " registers");
  free_registers += mine - count;
  mine = count;
  wake(register_waiters);
}

}  // namespace binconv::emulation

#pragma once

#include <cstdint>

// What a warp does together: shuffles and votes, ldmatrix, mma.sync, and setmaxnreg. The lanes
// meet, in any order. Checks that all are at the same operation, that ldmatrix reads aligned shared
// memory, and that registers fit: a block starts with its share of the multiprocessor's, what
// setmaxnreg.dec gives back is all that setmaxnreg.inc can take, and it waits for it.

namespace binconv::emulation {

void reset_warps(int threads);

constexpr int kLaneBytes = 32;
using LaneValues = uint8_t[32][kLaneBytes];

// The values of all lanes, valid until the warp meets again.
const LaneValues& exchange(const char* operation, const void* value, int bytes);
void sync_warp(const char* operation);

void load_matrices(const void* row, uint32_t (&matrices)[4]);
void multiply_16x8x256(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                       const uint32_t (&c)[4]);

void take_registers(int count);  // setmaxnreg.inc
void give_registers(int count);  // setmaxnreg.dec

}  // namespace binconv::emulation

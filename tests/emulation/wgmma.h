#pragma once

#include <cstdint>

// wgmma.mma_async of bits (PTX ISA, "Asynchronous warpgroup level matrix instructions").
//
// A multiplication reads shared memory at any time between its issue by the last thread of the
// warpgroup and the wait for its group; until that wait the accumulators hold nonsense. Rows whose
// operands change in between come out wrong. Checks that operands lie in shared memory, that a
// warpgroup issues the same multiplications, that accumulators are fenced before they are first
// used, and that no multiplication outlives its block.

namespace binconv::emulation {

void reset_wgmma();
void check_wgmma();  // At a block's end.

void fence_accumulators();
// d: this thread's part of 64 rows and `columns` columns; a, b: descriptors without swizzle.
void multiply_async(int32_t* d, int columns, bool accumulate, uint64_t a, uint64_t b);
void commit_multiplications();
void wait_for_multiplications(int left);

}  // namespace binconv::emulation

#pragma once

#include <cstdint>
#include <string>

// Barriers of a block (PTX ISA, "mbarrier" and "barrier").
//
// An mbarrier's phase ends when all arrivals and all announced bytes are in; a wait for a parity
// passes once the phase of that parity is over, that is, while the current phase has the other one.
// Checks that mbarriers are initialized once, are not overwritten, get no more arrivals than they
// expect and no more bytes than their counter holds, and that threads agree about named barriers.

namespace binconv::emulation {

void reset_barriers();
void check_barriers();            // At a block's end.
std::string describe_barriers();  // For the report of a deadlock.

void init_barrier(const void* barrier, uint32_t count);
void wait_for_parity(const void* barrier, uint32_t parity);
void arrive(const void* barrier);
void expect_bytes(const void* barrier, uint32_t bytes);
void complete_bytes(const void* barrier, int64_t bytes);
void check_barrier(const void* barrier);

// __syncthreads is barrier 0 with all threads.
void sync_named(uint32_t id, uint32_t threads);

}  // namespace binconv::emulation

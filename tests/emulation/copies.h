#pragma once

#include <cuda.h>

#include <cstdint>

// Asynchronous copies to shared memory (PTX ISA, "Asynchronous copy").
//
// Tensor (TMA) and bulk copies end at an mbarrier. Some time after its start a copy makes its
// destination undefined, then it arrives in pieces, and then the mbarrier counts its bytes.
// cp.async makes its destination undefined at once and reads when its thread waits for it. Checks
// alignments, sizes, destinations, the limits of tensor maps, and that no copy outlives its block.
// Sources are read as they are: what lies beyond an array is on a page that cannot be read.

namespace binconv::emulation {

void reset_copies();
void check_copies();  // At a block's end.

CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                           const cuuint64_t* sizes, const cuuint64_t* steps, const cuuint32_t* box,
                           const cuuint32_t* strides, CUtensorMapInterleave, CUtensorMapSwizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
void copy_tensor(const void* map, const void* barrier, void* to, const int32_t (&at)[5]);
void copy_bulk(const void* from, const void* barrier, void* to, int32_t bytes);

void copy_async(const void* from, void* to, bool is_inside);
void commit_copies();
void wait_for_copies(int left);

}  // namespace binconv::emulation

#pragma once

namespace binconv::cuda {

// A chunk: the 16 bytes that packed pixels are made of, in which all kernels take them.
constexpr int kWordBits = 32;
constexpr int kChunkBytes = 16;
constexpr int kChunkWords = 4;
constexpr int kChunkBits = 128;

}  // namespace binconv::cuda

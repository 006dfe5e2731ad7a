#pragma once

#include "cuda/tile_output.cuh"

// Values of one pixel are far apart over the lanes of a warp. In the warp's staging memory they are
// put together to rows of 128 bytes, which leave in pieces of 16; a residual comes the same way.

namespace binconv::cuda {

constexpr int kStagingRow = 128;
constexpr int kWarpStaging = kWarpPixels * kStagingRow;

// Bytes from the start of staging memory; 16-byte pieces change places so that neither the lanes of
// a column nor those of a row meet in a bank.
__device__ inline int staging_offset(int row, int byte) {
  return row * kStagingRow + ((byte / kVectorBytes ^ row % 8) * kVectorBytes) + byte % kVectorBytes;
}

template <class T>
__device__ void stage_group(uint8_t* staging, uint32_t lane, int first_byte, Group& y) {
  const int row = static_cast<int>(lane / 4);
#pragma unroll
  for (int block = 0; block < kGroupBlocks; ++block) {
    const int byte = first_byte + static_cast<int>((8 * block + 2 * (lane % 4)) * sizeof(T));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Vector<T, 2> pair = {{from_float<T>(y[block][i][0]), from_float<T>(y[block][i][1])}};
      store_vector(reinterpret_cast<T*>(staging + staging_offset(row + 8 * i, byte)), pair);
    }
  }
}

// Where the lane stores pieces of its share of the warp's rows: rows lane / 8 + 4 * i, each from
// the run's first channel on, and there piece lane % 8. Null where there is no pixel.
constexpr int kPieces = kStagingRow / kVectorBytes;
constexpr int kFlushRows = kWarpSize / kPieces;  // That a warp stores at a time.
constexpr int kLaneRows = kWarpPixels / kFlushRows;
struct PieceRows {
  uint8_t* at[kLaneRows];
};

template <int kColumns>
__device__ PieceRows locate_pieces(const TileOutput& out, const WarpRun<kColumns>& run) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row_bytes = out.channels * out.value_bytes;
  uint8_t* data = static_cast<uint8_t*>(out.data) + run.first_channel * out.value_bytes +
                  lane % kPieces * kVectorBytes;
  PieceRows rows;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const int64_t pixel = run.warp_pixels[lane / kPieces + i * kFlushRows].index;
    rows.at[i] = pixel < 0 ? nullptr : data + pixel * row_bytes;
  }
  return rows;
}

__device__ inline int64_t residual_distance(const TileOutput& out) {
  return reinterpret_cast<intptr_t>(out.epilogue.residual) - reinterpret_cast<intptr_t>(out.data);
}

// The residual's pieces of a staging row, on their way to where the values are staged: they wait in
// registers while those before them are used.
struct Residual {
  uint4 pieces[kLaneRows];
};

// Loads the first `bytes` bytes of the staging rows that start `offset` bytes behind the run's
// first channel. The residual lies like the output, `distance` bytes further.
__device__ inline void load_residual(const PieceRows& rows, int64_t distance, int offset,
                                     int64_t bytes, Residual& residual) {
  const int byte = threadIdx.x % kWarpSize % kPieces * kVectorBytes;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const uint8_t* at = rows.at[i] + distance + offset;
    residual.pieces[i] = rows.at[i] && byte < bytes ? *reinterpret_cast<const uint4*>(at) : uint4{};
  }
}

__device__ inline void stage_residual(const Residual& residual, uint8_t* staging) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const int row = lane / kPieces + i * kFlushRows;
    const int to = staging_offset(row, lane % kPieces * kVectorBytes);
    *reinterpret_cast<uint4*>(staging + to) = residual.pieces[i];
  }
  __syncwarp();
}

// For the groups of a run in their order. The residual of a value is staged where stage_group will
// put that value.
template <class T>
__device__ void add_staged_residual(const TileOutput& out, const PieceRows& rows,
                                    Residual& residual, uint8_t* staging, int64_t first_channel,
                                    int group, Group& y) {
  constexpr int kRowChannels = kStagingRow / sizeof(T), kSize = sizeof(T);
  const int column = group * kGroup % kRowChannels;
  if (column == 0) {
    stage_residual(residual, staging);
    load_residual(rows, residual_distance(out), (group * kGroup + kRowChannels) * kSize,
                  (out.channels - first_channel - kRowChannels) * kSize, residual);
  }
  uint32_t lane = threadIdx.x % kWarpSize;
  asm volatile("" : "+r"(lane));  // As in store_run.
#pragma unroll
  for (int block = 0; block < kGroupBlocks; ++block) {
    const int byte = (column + 8 * block + 2 * static_cast<int>(lane % 4)) * kSize;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = staging_offset(static_cast<int>(lane / 4) + 8 * i, byte);
      const Vector<T, 2> pair = load_vector<2>(reinterpret_cast<const T*>(staging + at));
      y[block][i][0] = __fadd_rn(y[block][i][0], to_float(pair.values[0]));
      y[block][i][1] = __fadd_rn(y[block][i][1], to_float(pair.values[1]));
    }
  }
}

__device__ inline void add_staged_residual(const TileOutput& out, const PieceRows& rows,
                                           Residual& residual, uint8_t* staging,
                                           int64_t first_channel, int group, Group& y) {
  switch (out.epilogue.residual_type) {
    case DataType::kFloat16:
      return add_staged_residual<__half>(out, rows, residual, staging, first_channel, group, y);
    case DataType::kBFloat16:
      return add_staged_residual<__nv_bfloat16>(out, rows, residual, staging, first_channel, group,
                                                y);
    default:
      return add_staged_residual<float>(out, rows, residual, staging, first_channel, group, y);
  }
}

// Stores the first `bytes` bytes of the staged rows, `offset` bytes behind the run's first channel.
__device__ inline void flush_staging(const PieceRows& rows, const uint8_t* staging, int offset,
                                     int bytes) {
  const int lane = threadIdx.x % kWarpSize;
  const int byte = lane % kPieces * kVectorBytes;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const int row = lane / kPieces + i * kFlushRows;
    const uint4 piece = *reinterpret_cast<const uint4*>(staging + staging_offset(row, byte));
    if (rows.at[i] && byte < bytes) *reinterpret_cast<uint4*>(rows.at[i] + offset) = piece;
  }
  __syncwarp();
}

// Of a group in pieces. channels: how many of its channels there are.
template <class T>
__device__ void store_pieces(const PieceRows& rows, uint8_t* staging, int group, bool is_last,
                             int channels, Group& y) {
  uint32_t lane = threadIdx.x % kWarpSize;
  asm volatile("" : "+r"(lane));  // As in store_run.
  // A run's channels start with a row, so that all of this is known when the groups are unrolled.
  constexpr int kRowChannels = kStagingRow / sizeof(T), kSize = sizeof(T);
  const int column = group * kGroup % kRowChannels;
  stage_group<T>(staging, lane, column * kSize, y);
  if (is_last || column + kGroup == kRowChannels) {
    flush_staging(rows, staging, (group * kGroup - column) * kSize, (column + channels) * kSize);
  }
}

}  // namespace binconv::cuda

#include "check.h"
#include "cuda/bits_tiles.cuh"
#include "cuda/comparison.cuh"
#include "cuda/cuda.h"
#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"
#include "cuda/piece.cuh"

// Packing reads values by the piece and leaves their bits in shared memory, in the order of the
// values; packed chunks are gathered from there. Unpacking goes the other way. So values move in
// aligned vectors, whatever the shape and wherever they lie.

namespace binconv::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPackingBlocks = 8;  // On a multiprocessor, each with 8 KiB of loads in flight.

using Chunk = Vector<uint32_t, kChunkWords>;

// An array of values, which may be const.
template <class T>
struct Array {
  Array(T* values, int64_t count)
      : values(values),
        count(count),
        lead(reinterpret_cast<uintptr_t>(values) / sizeof(T) %
             kPieceValues<std::remove_const_t<T>>) {}

  T* values;
  int64_t count;
  uint32_t lead;  // How many values would be in front of the first one in its piece.
};

// A piece that values of a row are in.
struct Slot {
  uint32_t row;
  int32_t first;   // Value of the row that the piece starts with; below 0 in front of the row.
  int64_t offset;  // Of the piece in the array; below 0 where it starts in front of it.
};

// The pieces of a tile, row by row. Every row has the same number, also where it needs fewer.
template <class T>
class TilePieces {
 public:
  __device__ TilePieces(uint32_t array_lead, const TileRows& rows, const Divisor& row_pieces)
      : rows_(rows), row_pieces_(row_pieces), array_lead_(array_lead) {}

  // Up to the last one that the last row needs.
  __device__ uint32_t count() const {
    const uint32_t row = rows_.count - 1;
    return row * row_pieces_.value + ceil_div<uint32_t>(lead(row) + rows_.values, kPieceValues<T>);
  }

  __device__ Slot operator[](uint32_t index) const {
    const auto [row, piece] = row_pieces_.divide(index);
    const int32_t first = static_cast<int32_t>(piece * kPieceValues<T> - lead(row));
    return {row, first, rows_.first + row * rows_.stride + first};
  }

  __device__ bool are_shared() const { return rows_.count > 1 && rows_.stride < kPieceValues<T>; }

  // Where the bits of a piece go, and where those of a row start. A row has one piece more there,
  // so that rows start at different banks.
  __device__ uint32_t place(uint32_t index, const Slot& slot) const { return index + slot.row; }
  __device__ uint32_t row_start(uint32_t row) const {
    return row * (row_pieces_.value + 1) * kPieceValues<T> + lead(row);
  }

 private:
  // Values in the row's first piece that are in front of the row.
  __device__ uint32_t lead(uint32_t row) const {
    const uint64_t offset = rows_.first + row * rows_.stride;
    return (array_lead_ + static_cast<uint32_t>(offset)) % kPieceValues<T>;
  }

  const TileRows& rows_;
  const Divisor& row_pieces_;
  uint32_t array_lead_;
};

// The bits of values whose distance from the threshold is at most `limit`.
template <class T>
struct Within {
  __device__ Within(float threshold, float limit)
      : low(threshold - limit), above(next_above(threshold + limit)) {}

  __device__ uint32_t operator()(const Piece<T>& piece) const { return low(piece) & ~above(piece); }

  // The least number above; nothing is at or above NaN.
  static __device__ float next_above(float x) {
    return x < INFINITY ? nextafterf(x, INFINITY) : NAN;
  }

  Comparison<T> low, above;
};

template <class T>
__device__ uint32_t within_each(const Piece<T>& piece, float limit,
                                const float (&thresholds)[kPieceValues<T>]) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kPieceValues<T>; ++i) {
    const float x = to_float(piece[i]), threshold = thresholds[i];
    if (x >= threshold - limit && x <= threshold + limit) bits |= 1u << i;
  }
  return bits;
}

template <class T>
__device__ bool is_whole(const Array<const T>& x, int64_t offset) {
  return offset >= 0 && offset + kPieceValues<T> <= x.count;
}

// With zeros where it is outside the array.
template <class T>
__device__ Piece<T> load_partly(const Array<const T>& x, int64_t offset) {
  Piece<T> piece = {};
  for (int i = 0; i < kPieceValues<T>; ++i) {
    if (offset + i >= 0 && offset + i < x.count) piece[i] = x.values[offset + i];
  }
  return piece;
}

// Calls pack(index, piece, slot) for every piece.
template <class T, class Pack>
__device__ void pack_pieces(const Array<const T>& x, const TilePieces<T>& pieces,
                            int32_t row_values, const Pack& pack) {
  constexpr int kBatch = 64 / sizeof(Piece<T>);  // With all their loads in flight.
  const uint32_t count = pieces.count();
  // Of the first and the last tile, these may reach beyond the array: the first and the last piece,
  // and any where rows share pieces.
  const bool is_inside = is_whole(x, pieces[0].offset) && is_whole(x, pieces[count - 1].offset);
  const uint32_t first = is_inside ? 0 : pieces.are_shared() ? count : 1;
  const uint32_t end = is_inside ? count : count - 1;
  for (uint32_t i = threadIdx.x; i < end; i += kBatch * kThreads) {
    Slot slots[kBatch];
    Piece<T> batch[kBatch];
    bool is_used[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const uint32_t index = i + k * kThreads;
      slots[k] = pieces[index];
      is_used[k] = index >= first && index < end && slots[k].first < row_values;
      if (is_used[k]) batch[k] = *reinterpret_cast<const Piece<T>*>(x.values + slots[k].offset);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (is_used[k]) pack(i + k * kThreads, batch[k], slots[k]);
    }
  }
  if (is_inside) return;
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    const Slot slot = pieces[i];
    if ((i >= first && i < end) || slot.first >= row_values) continue;
    pack(i, load_partly(x, slot.offset), slot);
  }
}

// The bits of a piece, among those of all pieces.
template <class T>
__device__ void set_bits(uint32_t* words, uint32_t place, uint32_t bits) {
  reinterpret_cast<PieceBits<T>*>(words)[place] = static_cast<PieceBits<T>>(bits);
}

// 32 bits from bit `first` on. The word behind them is read, too.
__device__ uint32_t bits_at(const uint32_t* words, uint32_t first) {
  const uint32_t* word = words + first / kWordBits;
  return __funnelshift_r(word[0], word[1], first % kWordBits);
}

__device__ uint32_t low_bits(int32_t count) {
  if (count <= 0) return 0;
  return count < kWordBits ? (1u << count) - 1 : ~0u;
}

// Where packed bits go: those of the threshold, and those of the clip if they are asked for.
struct Packed {
  Chunk* bits[2];
  float limit;

  __device__ bool has_clip() const { return bits[1] != nullptr; }
};

template <bool kPerChannel, class T>
__global__ void __launch_bounds__(kThreads, kPackingBlocks)
    pack_nhwc(NhwcTiles tiles, Array<const T> x, Divisor row_pieces, Threshold threshold,
              Packed packed) {
  constexpr int kMargin = kWordBits + kChunkBits;  // For the lead and for chunks of few channels.
  __shared__ uint32_t words[2][(NhwcTiles::kMaxValues + kMargin) / kWordBits];
  const Comparison<T> compare(threshold.value);
  const Within<T> is_within(threshold.value, packed.limit);
  await_previous_kernel();
  for (int64_t i = blockIdx.x; i < tiles.count(); i += gridDim.x) {
    const NhwcTiles::Tile tile = tiles.at(i);
    const TilePieces<T> pieces(x.lead, tile.rows, row_pieces);
    const auto pack = [&](uint32_t index, const Piece<T>& piece, const Slot& slot) {
      float thresholds[kPieceValues<T>];
      if constexpr (kPerChannel) {
        load_thresholds(threshold.per_channel, tiles.channels(), -slot.first,
                        tiles.value_at(tile, max(slot.first, 0)).channel, thresholds);
      }
      set_bits<T>(words[0], index, kPerChannel ? compare_each(piece, thresholds) : compare(piece));
      if (!packed.has_clip()) return;
      set_bits<T>(words[1], index,
                  kPerChannel ? within_each(piece, packed.limit, thresholds) : is_within(piece));
    };
    pack_pieces(x, pieces, tile.rows.values, pack);
    __syncthreads();
    for (int n = 0; n <= packed.has_clip(); ++n) {
      for (int32_t k = threadIdx.x; k < tile.chunks; k += kThreads) {
        const NhwcTiles::Chunk at = tiles.chunk_at(tile, k);
        const uint32_t first = pieces.row_start(0) + at.first_value;
        Chunk chunk;
#pragma unroll
        for (int j = 0; j < kChunkWords; ++j) {
          chunk.values[j] =
              bits_at(words[n], first + j * kWordBits) & low_bits(at.channels - j * kWordBits);
        }
        packed.bits[n][tile.first_chunk + k] = chunk;
      }
    }
    __syncthreads();
  }
}

// Bit j of lane i becomes bit i of lane j, in each word: together, as one waits long for a shuffle.
__device__ void transpose(Chunk& chunk) {
  const int lane = threadIdx.x % kWarpSize;
  uint32_t low = 0x0000ffff;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2, low ^= low << distance) {
    const bool is_upper = lane & distance;
    const uint32_t kept = is_upper ? ~low : low;
#pragma unroll
    for (uint32_t& word : chunk.values) {
      const uint32_t other = __shfl_xor_sync(kWholeWarp, word, distance);
      const uint32_t turned = __funnelshift_r(other, other, is_upper ? distance : -distance);
      word = (word & kept) | (turned & ~kept);
    }
  }
}

template <bool kPerChannel, class T>
__global__ void __launch_bounds__(kThreads, kPackingBlocks)
    pack_nchw(NchwTiles tiles, Array<const T> x, Divisor row_pieces, Threshold threshold,
              Packed packed) {
  constexpr int kRowBits = NchwTiles::kMaxPixels + kWordBits;
  __shared__ uint32_t words[2][kChunkBits * kRowBits / kWordBits];
  const Comparison<T> compare(threshold.value);
  const Within<T> is_within(threshold.value, packed.limit);
  await_previous_kernel();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int64_t i = blockIdx.x; i < tiles.count(); i += gridDim.x) {
    const NchwTiles::Tile tile = tiles.at(i);
    const TilePieces<T> pieces(x.lead, tile.rows, row_pieces);
    const auto pack = [&](uint32_t index, const Piece<T>& piece, const Slot& slot) {
      const uint32_t place = pieces.place(index, slot);
      float of_channel = 0.0f;
      if constexpr (kPerChannel) {
        of_channel = threshold.per_channel[tile.chunk * kChunkBits + slot.row];
      }
      set_bits<T>(words[0], place, (kPerChannel ? Comparison<T>(of_channel) : compare)(piece));
      if (!packed.has_clip()) return;
      set_bits<T>(words[1], place,
                  (kPerChannel ? Within<T>(of_channel, packed.limit) : is_within)(piece));
    };
    pack_pieces(x, pieces, tile.rows.values, pack);
    __syncthreads();
    for (int n = 0; n <= packed.has_clip(); ++n) {
      for (int first = warp * kWarpSize; first < tile.rows.values; first += kThreads) {
        Chunk chunk;
#pragma unroll
        for (int j = 0; j < kChunkWords; ++j) {
          const int row = j * kWordBits + lane;
          const bool is_channel = row < tile.rows.count;
          chunk.values[j] = is_channel ? bits_at(words[n], pieces.row_start(row) + first) : 0;
        }
        transpose(chunk);
        const int pixel = first + lane;
        if (pixel < tile.rows.values) packed.bits[n][tiles.chunk_index(tile, pixel)] = chunk;
      }
    }
    __syncthreads();
  }
}

// Values `low` to `high` of the piece.
template <class T>
__device__ void store_piece(const Array<T>& x, int64_t offset, const Piece<T>& piece, int low,
                            int high) {
  T* const to = x.values + offset;
  if (high - low == kPieceValues<T>) return store_whole(to, piece);
#pragma unroll
  for (int i = 0; i < kPieceValues<T>; ++i) {
    if (i >= low && i < high) to[i] = piece[i];
  }
}

// Makes values `low` to `high` of every piece, with those bits of bits(slot, low, high).
template <class T, class Bits>
__device__ void unpack_pieces(const Array<T>& x, const TilePieces<T>& pieces, int32_t row_values,
                              const Bits& bits) {
  for (uint32_t i = threadIdx.x; i < pieces.count(); i += kThreads) {
    const Slot slot = pieces[i];
    const int low = max(-slot.first, 0), high = min(row_values - slot.first, kPieceValues<T>);
    if (low >= high) continue;
    store_piece(x, slot.offset, unpack_piece<T>(bits(slot, low, high)), low, high);
  }
}

// The bits of `count` values, which may be in several pixels; other bits follow.
__device__ uint32_t gather_bits(const NhwcTiles& tiles, const NhwcTiles::Tile& tile,
                                const uint32_t* words, int32_t value, int32_t count) {
  const NhwcTiles::Value first = tiles.value_at(tile, value);
  uint32_t bits = bits_at(words, first.bit);
  uint32_t next = first.bit;
  for (int32_t n = tiles.channels() - first.channel; n < count; n += tiles.channels()) {
    next += tiles.padding();
    bits = (bits & ((1u << n) - 1)) | bits_at(words, next + n) << n;
  }
  return bits;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    unpack_nhwc(NhwcTiles tiles, const Chunk* packed, Array<T> x, Divisor row_pieces) {
  alignas(Chunk) __shared__ uint32_t words[NhwcTiles::kMaxChunks * kChunkWords + 1];
  await_previous_kernel();
  for (int64_t i = blockIdx.x; i < tiles.count(); i += gridDim.x) {
    const NhwcTiles::Tile tile = tiles.at(i);
    for (int32_t k = threadIdx.x; k < tile.chunks; k += kThreads) {
      store_vector(words + k * kChunkWords, packed[tile.first_chunk + k]);
    }
    __syncthreads();
    unpack_pieces(x, TilePieces<T>(x.lead, tile.rows, row_pieces), tile.rows.values,
                  [&](const Slot& slot, int low, int high) {
                    return gather_bits(tiles, tile, words, slot.first + low, high - low) << low;
                  });
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    unpack_nchw(NchwTiles tiles, const Chunk* packed, Array<T> x, Divisor row_pieces) {
  // A row has one word more, so that rows start at different banks; of the row in front of the
  // first, where pieces begin, there is that word alone.
  constexpr int kRowWords = NchwTiles::kMaxPixels / kWordBits + 1;
  __shared__ uint32_t words[1 + kChunkBits * kRowWords];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  await_previous_kernel();
  for (int64_t i = blockIdx.x; i < tiles.count(); i += gridDim.x) {
    const NchwTiles::Tile tile = tiles.at(i);
    for (int first = warp * kWarpSize; first < tile.rows.values; first += kThreads) {
      const int pixel = first + lane;
      Chunk chunk = {};
      if (pixel < tile.rows.values) chunk = packed[tiles.chunk_index(tile, pixel)];
      transpose(chunk);
#pragma unroll
      for (int j = 0; j < kChunkWords; ++j) {
        const int row = j * kWordBits + lane;
        words[1 + row * kRowWords + first / kWordBits] = chunk.values[j];
      }
    }
    __syncthreads();
    unpack_pieces(x, TilePieces<T>(x.lead, tile.rows, row_pieces), tile.rows.values,
                  [&](const Slot& slot, int, int) {
                    return bits_at(words, (1 + slot.row * kRowWords) * kWordBits + slot.first);
                  });
    __syncthreads();
  }
}

int64_t value_count(const ImageShape& shape) {
  return shape.batch * shape.channels * shape.height * shape.width;
}

// How many pieces a row may need. One more would take the place of a load in every row.
template <class T, class Tiles>
Divisor row_pieces_of(const Tiles& tiles, uint32_t array_lead) {
  const int64_t step = std::gcd(tiles.row_unit(), int64_t{kPieceValues<T>});  // Of the rows' leads.
  const int64_t max_lead = array_lead % step + kPieceValues<T> - step;
  return Divisor(ceil_div<uint32_t>(max_lead + tiles.max_row_values(), kPieceValues<T>));
}

}  // namespace

void pack_bits(const ImageShape& shape, const void* x, DataType type, Layout layout,
               const Threshold& threshold, uint8_t* packed, const ClipBits& clip,
               const Queue& queue) {
  const int processors = multiprocessors(queue.device());
  const Packed results = {{reinterpret_cast<Chunk*>(packed), reinterpret_cast<Chunk*>(clip.inside)},
                          clip.limit};
  dispatch_value_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Array<const T> values(static_cast<const T*>(x), value_count(shape));
    const auto run = [&](const auto& tiles, const auto& kernel) {
      launch("pack_bits", queue, tiles.count(), kThreads, kernel, tiles, values,
             row_pieces_of<T>(tiles, values.lead), threshold, results);
    };
    dispatch_bool(threshold.per_channel != nullptr, [&](auto per_channel) {
      layout == Layout::kNCHW ? run(NchwTiles(shape, processors), pack_nchw<per_channel, T>)
                              : run(NhwcTiles(shape, processors), pack_nhwc<per_channel, T>);
    });
  });
}

void unpack_bits(const ImageShape& shape, const uint8_t* packed, void* x, DataType type,
                 Layout layout, const Queue& queue) {
  const int processors = multiprocessors(queue.device());
  dispatch_value_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Array<T> values(static_cast<T*>(x), value_count(shape));
    const auto run = [&](const auto& tiles, const auto& kernel) {
      launch("unpack_bits", queue, tiles.count(), kThreads, kernel, tiles,
             reinterpret_cast<const Chunk*>(packed), values, row_pieces_of<T>(tiles, values.lead));
    };
    if (layout == Layout::kNCHW) return run(NchwTiles(shape, processors), unpack_nchw<T>);
    run(NhwcTiles(shape, processors), unpack_nhwc<T>);
  });
}

}  // namespace binconv::cuda

#include "emulation/copies.h"

#include <array>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "emulation/barriers.h"
#include "emulation/fibers.h"
#include "emulation/shared_memory.h"

namespace binconv::emulation {
namespace {

constexpr int kRank = 5;         // The largest; what a map lacks has a size of 1.
constexpr int kPieceBytes = 16;  // What every copy is made of.
constexpr int kTensorAlignment = 128;
constexpr uint8_t kUndefined = 0x6d;

// What a CUtensorMap holds here. Boxes take all of dimension 0, `row` bytes.
struct TensorMap {
  const uint8_t* data;
  uint32_t row;
  uint64_t sizes[kRank], steps[kRank];
  uint16_t box[kRank], strides[kRank];
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

int copies_in_flight = 0;

struct AsyncCopy {
  const void* from;  // Null: zeros.
  void* to;
};
using AsyncGroup = std::vector<AsyncCopy>;

struct AsyncThread {
  AsyncGroup open;
  std::vector<AsyncGroup> groups;
};
std::array<AsyncThread, kMaxThreads> async_threads;

bool is_aligned(const void* pointer, int alignment) {
  return reinterpret_cast<uintptr_t>(pointer) % alignment == 0;
}

void deliver(std::vector<uint8_t> bytes, const void* barrier, void* to) {
  const auto data = std::make_shared<const std::vector<uint8_t>>(std::move(bytes));
  uint8_t* const destination = static_cast<uint8_t*>(to);
  const size_t size = data->size();
  uint64_t delay = random().one_in(2) ? 0 : random_delay();
  run_later(delay, [=] { std::memset(destination, kUndefined, size); });
  delay += random_delay();
  const size_t pieces = random().between(1, 3);
  for (size_t i = 0; i < pieces; ++i) {
    const size_t first = size * i / pieces, end = size * (i + 1) / pieces;
    run_later(delay, [=] { std::memcpy(destination + first, data->data() + first, end - first); });
    delay += random_delay() / 2;
  }
  ++copies_in_flight;
  run_later(delay, [=] {
    --copies_in_flight;
    complete_bytes(barrier, size);
  });
}

// The row at these coordinates; outside the tensor it is zeros.
void read_row(const TensorMap& map, const int64_t (&at)[kRank], uint8_t* row) {
  int64_t offset = 0;
  for (int i = 1; i < kRank; ++i) {
    if (at[i] < 0 || at[i] >= static_cast<int64_t>(map.sizes[i])) return;
    offset += at[i] * static_cast<int64_t>(map.steps[i]);
  }
  std::memcpy(row, map.data + offset, map.row);
}

}  // namespace

void reset_copies() {
  copies_in_flight = 0;
  async_threads.fill({});
}

void check_copies() {
  require(copies_in_flight == 0, "the block ended with ", copies_in_flight, " copies in flight");
}

CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                           const cuuint64_t* sizes, const cuuint64_t* steps, const cuuint32_t* box,
                           const cuuint32_t* strides, CUtensorMapInterleave, CUtensorMapSwizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  constexpr uint64_t kSizeLimit = uint64_t{1} << 32, kStepLimit = uint64_t{1} << 40;
  constexpr uint32_t kBoxLimit = 256, kStrideLimit = 8;
  TensorMap encoded = {.data = static_cast<const uint8_t*>(data),
                       .row = box[0],
                       .sizes = {1, 1, 1, 1, 1},
                       .steps = {},
                       .box = {1, 1, 1, 1, 1},
                       .strides = {1, 1, 1, 1, 1}};
  bool is_valid = rank >= 3 && rank <= kRank && is_aligned(data, 16) && is_aligned(map, 64) &&
                  sizes[0] == box[0] && box[0] % kPieceBytes == 0 && strides[0] == 1;
  for (uint32_t i = 0; i < rank && is_valid; ++i) {
    const uint64_t step = i == 0 ? 0 : steps[i - 1];
    is_valid = sizes[i] >= 1 && sizes[i] <= kSizeLimit && step % 16 == 0 && step < kStepLimit &&
               box[i] >= 1 && box[i] <= kBoxLimit && strides[i] >= 1 && strides[i] <= kStrideLimit;
    encoded.sizes[i] = sizes[i];
    encoded.steps[i] = step;
    encoded.box[i] = static_cast<uint16_t>(box[i]);
    encoded.strides[i] = static_cast<uint16_t>(strides[i]);
  }
  if (!is_valid) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(map, &encoded, sizeof encoded);
  return CUDA_SUCCESS;
}

void copy_tensor(const void* encoded, const void* barrier, void* to, const int32_t (&at)[kRank]) {
  require(is_aligned(encoded, 64), "a tensor map that is not aligned to 64");
  check_barrier(barrier);
  TensorMap map;
  std::memcpy(&map, encoded, sizeof map);
  require(at[0] == 0, "a tensor copy from byte ", at[0], " of its rows");
  int64_t counts[kRank], rows = 1;
  for (int i = 1; i < kRank; ++i) {
    counts[i] = (map.box[i] + map.strides[i] - 1) / map.strides[i];
    rows *= counts[i];
  }
  shared_offset(to, rows * map.row, kTensorAlignment, "a tensor copy");
  std::vector<uint8_t> bytes(rows * map.row);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t coordinates[kRank] = {}, rest = row;
    for (int i = 1; i < kRank; ++i) {
      coordinates[i] = at[i] + rest % counts[i] * map.strides[i];
      rest /= counts[i];
    }
    read_row(map, coordinates, bytes.data() + row * map.row);
  }
  deliver(std::move(bytes), barrier, to);
}

void copy_bulk(const void* from, const void* barrier, void* to, int32_t bytes) {
  check_barrier(barrier);
  require(bytes > 0 && bytes % kPieceBytes == 0 && is_aligned(from, kPieceBytes), "a bulk copy of ",
          bytes, " bytes from ", from);
  shared_offset(to, bytes, kPieceBytes, "a bulk copy");
  const uint8_t* first = static_cast<const uint8_t*>(from);
  deliver({first, first + bytes}, barrier, to);
}

void copy_async(const void* from, void* to, bool is_inside) {
  shared_offset(to, kPieceBytes, kPieceBytes, "cp.async");
  require(is_aligned(from, kPieceBytes), "cp.async from ", from);
  std::memset(to, kUndefined, kPieceBytes);
  async_threads[this_thread()].open.push_back({is_inside ? from : nullptr, to});
}

void commit_copies() {
  AsyncThread& thread = async_threads[this_thread()];
  thread.groups.push_back(std::exchange(thread.open, {}));
}

void wait_for_copies(int left) {
  if (random().one_in(8)) yield();
  std::vector<AsyncGroup>& groups = async_threads[this_thread()].groups;
  while (static_cast<int>(groups.size()) > left) {
    for (const AsyncCopy& copy : groups.front()) {
      if (copy.from) {
        std::memcpy(copy.to, copy.from, kPieceBytes);
      } else {
        std::memset(copy.to, 0, kPieceBytes);
      }
    }
    groups.erase(groups.begin());
  }
}

}  // namespace binconv::emulation

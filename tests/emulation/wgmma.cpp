#include "emulation/wgmma.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "emulation/fibers.h"
#include "emulation/shared_memory.h"
#include "emulation/warps.h"

namespace binconv::emulation {
namespace {

constexpr int kRows = 64, kMaxColumns = 144;
constexpr int kRowWords = 4;  // 256 bits.
constexpr int kWarpgroups = kMaxThreads / kWarpgroup;
constexpr int32_t kNonsense = 0x7ead0000;

using Row = std::array<uint64_t, kRowWords>;

struct Operands {
  std::array<Row, kRows> a;
  std::array<Row, kMaxColumns> b;
};

// The accumulators of a warpgroup while multiplications with them are in flight.
struct Registers {
  int32_t values[kWarpgroup][kMaxColumns / 2];
};

struct Multiplication {
  uint64_t a, b;
  int columns;
  bool accumulate;
  bool is_first;  // In flight with its accumulators.
  int issued = 0;
  std::shared_ptr<Registers> registers;
  Operands at_issue;
};

struct Pending {
  int64_t index;  // Of the multiplication, in its warpgroup.
  int64_t group;  // -1: not committed.
  int32_t* d;
  int columns;
  std::shared_ptr<Registers> registers;
};

struct Thread {
  int64_t next = 0, groups = 0;
  bool is_fenced = false;
  std::vector<Pending> pending;
};

struct Warpgroup {
  std::deque<std::unique_ptr<Multiplication>> queue;  // From the first that is not executed on.
  int64_t executed = 0;
  Waiters waiters;
};

std::array<Thread, kMaxThreads> threads;
std::array<Warpgroup, kWarpgroups> warpgroups;

// A matrix of rows of two 16-byte chunks: 8 rows are a core matrix.
template <size_t kCount>
void read_operand(uint64_t descriptor, int rows, std::array<Row, kCount>& operand) {
  constexpr uint64_t kField = 0x3fff;
  require((descriptor & ~(kField | kField << 16 | kField << 32)) == 0, "wgmma descriptor ",
          descriptor, " asks for more than is emulated");
  const auto field = [&](int bit) {
    return static_cast<uint32_t>(descriptor >> bit & kField) << 4;
  };
  const uint32_t start = field(0), chunk_step = field(16), core_step = field(32);
  for (int row = 0; row < rows; ++row) {
    for (int chunk = 0; chunk < 2; ++chunk) {
      const uint32_t address = start + chunk * chunk_step + row / 8 * core_step + row % 8 * 16;
      std::memcpy(&operand[row][2 * chunk], at_shared_address(address, 16, "wgmma"), 16);
    }
  }
}

void read_operands(const Multiplication& op, Operands& operands) {
  read_operand(op.a, kRows, operands.a);
  read_operand(op.b, op.columns, operands.b);
}

using Products = std::array<std::array<int32_t, kMaxColumns>, kRows>;

void multiply(const Operands& operands, int columns, Products& products) {
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < columns; ++n) {
      int32_t sum = 0;
      for (int k = 0; k < kRowWords; ++k) {
        sum += std::popcount(operands.a[m][k] & operands.b[n][k]);
      }
      products[m][n] = sum;
    }
  }
}

// Nobody may use a row that changed after the multiplication was issued.
void spoil_changed_rows(const Multiplication& op, const Operands& now, Products& products) {
  const bool is_same = op.at_issue.a == now.a &&
                       std::equal(now.b.begin(), now.b.begin() + op.columns, op.at_issue.b.begin());
  if (is_same) return;
  static Products before;
  multiply(op.at_issue, op.columns, before);
  for (int m = 0; m < kRows; ++m) {
    const auto end = products[m].begin() + op.columns;
    if (!std::equal(products[m].begin(), end, before[m].begin())) products[m].fill(kNonsense);
  }
}

void execute(Multiplication& op) {
  static Operands operands;
  static Products products;
  read_operands(op, operands);
  multiply(operands, op.columns, products);
  spoil_changed_rows(op, operands, products);
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    const int warp = thread / kWarpSize, lane = thread % kWarpSize;
    for (int i = 0; i < op.columns / 2; ++i) {
      const int row = 16 * warp + lane / 4 + 8 * (i / 2 % 2);
      const int column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      int32_t& value = op.registers->values[thread][i];
      const uint32_t before = op.accumulate ? value : 0;
      value = static_cast<int32_t>(before + static_cast<uint32_t>(products[row][column]));
    }
  }
}

void execute_until(Warpgroup& warpgroup, int64_t last) {
  while (warpgroup.executed <= last) {
    execute(*warpgroup.queue.front());
    warpgroup.queue.pop_front();
    ++warpgroup.executed;
  }
  wake(warpgroup.waiters);
}

std::shared_ptr<Registers> registers_in_flight(const Thread& thread, const int32_t* d) {
  for (const Pending& pending : thread.pending) {
    if (pending.d == d) return pending.registers;
  }
  return nullptr;
}

}  // namespace

void reset_wgmma() {
  threads.fill({});
  for (Warpgroup& warpgroup : warpgroups) warpgroup = {};
}

void check_wgmma() {
  for (const Thread& thread : threads) {
    require(thread.pending.empty(), "the block ended with multiplications in flight");
  }
}

void fence_accumulators() {
  sync_warp("wgmma.fence");
  threads[this_thread()].is_fenced = true;
}

void multiply_async(int32_t* d, int columns, bool accumulate, uint64_t a, uint64_t b) {
  Thread& thread = threads[this_thread()];
  const int group = this_thread() / kWarpgroup;
  Warpgroup& warpgroup = warpgroups[group];
  const int64_t index = thread.next++;
  std::shared_ptr<Registers> registers = registers_in_flight(thread, d);
  const bool is_first = registers == nullptr;
  require(!is_first || thread.is_fenced, "wgmma without wgmma.fence");
  const size_t place = index - warpgroup.executed;
  if (place == warpgroup.queue.size()) {
    auto op = std::make_unique<Multiplication>();
    op->a = a;
    op->b = b;
    op->columns = columns;
    op->accumulate = accumulate;
    op->is_first = is_first;
    op->registers = is_first ? std::make_shared<Registers>() : registers;
    warpgroup.queue.push_back(std::move(op));
  }
  Multiplication& op = *warpgroup.queue.at(place);
  require(op.a == a && op.b == b && op.columns == columns && op.accumulate == accumulate &&
              op.is_first == is_first && (is_first || op.registers == registers),
          "a warpgroup whose threads issue different multiplications");
  if (is_first) {
    int32_t* values = op.registers->values[this_thread() % kWarpgroup];
    if (accumulate) std::copy(d, d + columns / 2, values);
    std::fill(d, d + columns / 2, kNonsense);
  }
  thread.pending.push_back({index, -1, d, columns, op.registers});
  if (++op.issued == kWarpgroup) {
    read_operands(op, op.at_issue);
    run_later(random_delay(), [group, index] { execute_until(warpgroups[group], index); });
  }
  if (random().one_in(64)) yield();
}

void commit_multiplications() {
  sync_warp("wgmma.commit_group");
  Thread& thread = threads[this_thread()];
  for (Pending& pending : thread.pending) {
    if (pending.group < 0) pending.group = thread.groups;
  }
  ++thread.groups;
}

void wait_for_multiplications(int left) {
  sync_warp("wgmma.wait_group");
  Thread& thread = threads[this_thread()];
  Warpgroup& warpgroup = warpgroups[this_thread() / kWarpgroup];
  const int64_t end = thread.groups - left;
  const auto is_waited_for = [end](const Pending& p) { return p.group >= 0 && p.group < end; };
  std::vector<Pending>& pending = thread.pending;
  const auto first_left = std::find_if_not(pending.begin(), pending.end(), is_waited_for);
  for (auto op = pending.begin(); op != first_left; ++op) {
    while (warpgroup.executed <= op->index) {
      wait_in(warpgroup.waiters, "wgmma.wait_group", left, warpgroup.executed);
    }
  }
  for (auto op = pending.begin(); op != first_left; ++op) {
    const auto is_same = [&](const Pending& other) { return other.registers == op->registers; };
    if (std::any_of(op + 1, pending.end(), is_same)) continue;  // Still in flight.
    std::copy_n(op->registers->values[this_thread() % kWarpgroup], op->columns / 2, op->d);
  }
  pending.erase(pending.begin(), first_left);
  thread.is_fenced = false;
}

}  // namespace binconv::emulation

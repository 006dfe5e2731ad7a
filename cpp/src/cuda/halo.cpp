#include "cuda/halo.h"

#include <algorithm>
#include <array>
#include <limits>
#include <optional>

#include "cuda/prepared_weight.h"

namespace binconv::cuda {
namespace {

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}
constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

constexpr int64_t kBoxLimit = 256;  // Extents of a tensor-map box.
constexpr int64_t kStrideLimit = 8;
// Of the output; a grid's step further, tiles can still be counted in 32 bits.
constexpr int64_t kMaxPixels = (int64_t{1} << 31) - (1 << 16);
constexpr int64_t kMaxChannels = 64 * 65535;  // Blocks of channels are the grid's second extent.
// 4 * popcount(a & w) + T, at most 3 times this, stays below 2^22, so that the epilogue can hold it
// in a float's mantissa.
constexpr int64_t kMaxBits = (int64_t{1} << 22) / 3;

AxisShape rows_of(const Conv2dShape& s) {
  return {s.in_height,     s.out_height(), s.weight.kernel_height,
          s.stride_height, s.pad_top,      s.dilation_height};
}
AxisShape columns_of(const Conv2dShape& s) {
  return {s.in_width,     s.out_width(), s.weight.kernel_width,
          s.stride_width, s.pad_left,    s.dilation_width};
}

int64_t phases_of(const AxisShape& a) {
  return std::min(a.stride, (a.kernel - 1) * a.dilation + 1);
}
int64_t largest_shift(const AxisShape& a) { return (a.kernel - 1) * a.dilation / a.stride; }

// Whether every position that a tile can read, also beyond the output, is an int32.
bool has_narrow_positions(const AxisShape& a) {
  return (a.out + kBoxLimit) * a.stride + (a.kernel - 1) * a.dilation <=
         std::numeric_limits<int32_t>::max();
}

// How far the columns of a tap reach beyond the pitch in the last of `columns` output columns.
int64_t overflow(const AxisShape& a, int64_t columns, int64_t tap, int64_t pitch) {
  return columns + tap * a.dilation / a.stride - pitch;
}

// Whether every tap that reaches beyond the pitch would find padding there, and finds padding at
// the start of what follows.
bool can_share_padding(const AxisShape& a, int64_t columns, int64_t pitch) {
  for (int64_t tap = 0; tap < a.kernel; ++tap) {
    const int64_t beyond = overflow(a, columns, tap, pitch);
    if (beyond <= 0) continue;
    const int64_t origin = tap * a.dilation % a.stride - a.pad;
    if (pitch * a.stride + origin < a.in || (beyond - 1) * a.stride + origin >= 0) return false;
  }
  return true;
}

int64_t pitch_of(const AxisShape& a, int64_t columns) {
  const int64_t halo = columns + largest_shift(a);
  if (columns < a.out) return halo;
  // More than any shift, so that a phase's taps lie behind one another in their order.
  int64_t pitch = std::max(columns, largest_shift(a) + 1);
  while (pitch < halo && !can_share_padding(a, columns, pitch)) ++pitch;
  return pitch;
}

int64_t phase_of(const Conv2dShape& shape, int64_t tap) {
  const AxisShape rows = rows_of(shape), columns = columns_of(shape);
  return tap / columns.kernel * rows.dilation % rows.stride * phases_of(columns) +
         tap % columns.kernel * columns.dilation % columns.stride;
}

// Of the taps of one phase.
int64_t taps_of_phase(const AxisShape& a, int64_t phase) {
  int64_t count = 0;
  for (int64_t tap = 0; tap < a.kernel; ++tap) count += tap * a.dilation % a.stride == phase;
  return count;
}

// Pairs are of the same tap in two chunks. Where the number of resident chunks is odd, the taps of
// the last one pair up: within a phase, so that the second lies behind the first.
int64_t count_pairs(const Conv2dShape& shape, bool is_streamed) {
  const PreparedLayout weight = prepared_layout(shape.weight);
  if (is_streamed) return weight.taps;
  int64_t pairs = weight.chunks / 2 * weight.taps;
  if (weight.chunks % 2 == 0) return pairs;
  const AxisShape rows = rows_of(shape), columns = columns_of(shape);
  for (int64_t i = 0; i < phases_of(rows); ++i) {
    for (int64_t j = 0; j < phases_of(columns); ++j) {
      pairs += ceil_div(taps_of_phase(rows, i) * taps_of_phase(columns, j), 2);
    }
  }
  return pairs;
}

bool has_whole_blocks(const WeightShape& weight) {
  return weight.groups == 1 || weight.out_channels / weight.groups % 128 == 0;
}

int32_t narrow(int64_t value) { return static_cast<int32_t>(value); }

// Plans of one shape with one block of channels.
class Planner {
 public:
  Planner(const Conv2dShape& shape, const HaloLimits& limits, int channels, bool is_streamed)
      : shape_(shape),
        limits_(limits),
        rows_(rows_of(shape)),
        columns_(columns_of(shape)),
        weight_(prepared_layout(shape.weight)) {
    const bool has_border = shape.pad_value != -1;  // Zero bits outside are -1 as they are.
    common_.block_channels = channels;
    common_.columns = channels + limits.ones;
    common_.is_streamed = is_streamed;
    common_.lists_pixels = limits.lists_pixels && !is_streamed;
    common_.lists_sources = limits.keeps_step && is_streamed;
    common_.phases_height = narrow(phases_of(rows_));
    common_.phases_width = narrow(phases_of(columns_));
    common_.stage_chunks = narrow(is_streamed ? 2 : weight_.chunks);
    common_.pairs = narrow(count_pairs(shape, is_streamed));
    common_.part_chunks = is_streamed || weight_.chunks > 1 ? 2 : 1;
    common_.part_taps = narrow(is_streamed ? kStreamTaps : weight_.taps + weight_.chunks % 2);
    common_.parts = narrow(ceil_div(weight_.chunks, common_.part_chunks));
    const auto border = [&](const AxisShape& axis) {
      return has_border ? border_of(axis) : Border{1, 0, narrow(axis.out)};
    };
    common_.row_border = border(rows_);
    common_.column_border = border(columns_);
  }

  const AxisShape& rows() const { return rows_; }
  const AxisShape& columns() const { return columns_; }

  // pitch: pitch_of(columns(), tile_columns), which does not depend on the rest.
  HaloPlan plan(int64_t tile_rows, int64_t tile_columns, int64_t tile_images, int64_t pitch) const {
    HaloPlan plan = common_;
    const int64_t halo_rows = tile_rows + largest_shift(rows_);
    const int64_t tail = std::max<int64_t>(0, tile_columns + largest_shift(columns_) - pitch);
    plan.tile_rows = narrow(tile_rows);
    plan.tile_columns = narrow(tile_columns);
    plan.tile_images = narrow(tile_images);
    plan.row_tiles = narrow(ceil_div(rows_.out, tile_rows));
    plan.column_tiles = narrow(ceil_div(columns_.out, tile_columns));
    plan.tiles =
        narrow(int64_t{plan.row_tiles} * plan.column_tiles * ceil_div(shape_.batch, tile_images));
    plan.runs = narrow(ceil_div(tile_rows * tile_images * pitch, kRunPixels));
    plan.halo_rows = narrow(halo_rows);
    plan.pitch = narrow(pitch);
    plan.region_pixels = narrow(round_up(halo_rows * tile_images * pitch + tail, 8));
    return plan;
  }

  HaloPlan smallest() const {
    const int64_t columns = std::min<int64_t>(columns_.out, 8);
    return plan(1, columns, 1, pitch_of(columns_, columns));
  }

  // Whether a plan fits into shared memory; gives it its stages.
  bool fit(HaloPlan& plan) const {
    if (plan.pairs > kMaxPairs) return false;
    const int64_t box_rows = (plan.halo_rows - 1) * rows_.stride + 1;
    const int64_t box_columns = (plan.pitch - 1) * columns_.stride + 1;
    if (std::max({box_rows, box_columns, int64_t{plan.tile_images}}) > kBoxLimit) return false;
    const int64_t stage = int64_t{plan.stage_chunks} * plan.phases() * plan.region_pixels * 16;
    if (stage > limits_.shared_bytes) return false;
    // Enough for all runs that are multiplied at once, and one more to load; of streamed weights as
    // many as there are, so that runs need not keep step.
    const int64_t at_once = plan.is_streamed ? limits_.most_halo_stages
                                             : 1 + ceil_div(plan.runs_at_once(limits_), plan.runs);
    for (const int64_t stages :
         {std::min<int64_t>(at_once, limits_.most_halo_stages), int64_t{kLeastStages}}) {
      plan.halo_stages = narrow(stages);
      if (plan.is_streamed) plan.parts = kLeastStages;
      const int64_t left = limits_.shared_bytes - halo_layout(plan).total;
      if (left < 0) continue;
      if (plan.is_streamed) {
        const int64_t more = left / plan.part_bytes();
        plan.parts = narrow(std::min<int64_t>(kLeastStages + more, limits_.most_streamed_parts));
      }
      return true;
    }
    return false;
  }

  // Estimated cycles of the whole convolution, with constants fitted to about 1200 measured plans
  // of cuda_sm90 on an H200 (root mean square error 10%). Other kernels only need their
  // proportions.
  double cost(const HaloPlan& plan) const {
    constexpr double kHaloBytes = 10, kWeightBytes = 40, kStoreBytes = 17.5;  // Per cycle.
    constexpr double kStart = 1850, kBlock = 8, kTile = 630, kRun = 340, kLoadLatency = 600;
    constexpr double kPairLatency = 200;
    const double channels = plan.block_channels;
    const int64_t blocks = ceil_div(shape_.weight.out_channels, plan.block_channels);
    const int64_t workers = std::max<int64_t>(1, limits_.multiprocessors / blocks);
    const double waves = std::max(1.0, static_cast<double>(blocks) / limits_.multiprocessors);
    const int64_t tiles = ceil_div(plan.tiles, workers);
    const int64_t at_once = plan.runs_at_once(limits_);

    const double steps = plan.is_streamed ? static_cast<double>(ceil_div(weight_.chunks, 2)) : 1;
    const double multiply = steps * plan.pairs * plan.columns / 2 + kRun;
    const double finish = 8.6 * channels + 410;
    const double alone = multiply + finish;  // A run takes that long.
    const double halo = static_cast<double>(plan.phases()) * plan.region_pixels;
    const double load = weight_.chunks * halo * 16 / kHaloBytes;
    const double outputs =
        static_cast<double>(plan.tile_rows) * plan.tile_columns * plan.tile_images * channels;

    // What each tile takes of what it shares with others.
    double tile = std::max({plan.runs * multiply, load, outputs * 2 / kStoreBytes});
    if (plan.is_streamed) {
      const double weights = static_cast<double>(weight_.chunks) * weight_.taps * channels * 16;
      tile = std::max({tile, at_once * multiply, weights / kWeightBytes});
    } else {
      tile = std::max(tile, (kLoadLatency + load + multiply) / plan.halo_stages);
    }
    if (limits_.keeps_step) {  // Few warps multiply no faster than latencies let them.
      const int64_t rounds = ceil_div(plan.runs, at_once);
      const double least = steps * plan.pairs * kPairLatency;
      tile = std::max(tile, std::max(plan.runs * multiply, rounds * least) + rounds * finish);
    }
    const double rounds = static_cast<double>(ceil_div(tiles * plan.runs, at_once));
    const double work = std::max(rounds * alone, tiles * tile + alone);
    // Where there are fewer blocks, they share less, and those of the next kernel find room beside
    // them.
    const double grid = static_cast<double>(blocks * std::min<int64_t>(plan.tiles, workers));
    return (kStart + load + work + tiles * kTile) * waves + kBlock * grid;
  }

 private:
  const Conv2dShape& shape_;
  HaloLimits limits_;
  AxisShape rows_, columns_;
  PreparedLayout weight_;
  HaloPlan common_ = {};
};

// What is left where nothing else fits; it decides whether a shape can be taken.
std::optional<HaloPlan> smallest_plan(const Conv2dShape& shape, const HaloLimits& limits) {
  for (const bool is_streamed : {false, true}) {
    if (is_streamed && !has_whole_blocks(shape.weight)) continue;
    const Planner planner(shape, limits, is_streamed ? 128 : 64, is_streamed);
    HaloPlan plan = planner.smallest();
    if (planner.fit(plan)) return plan;
  }
  return std::nullopt;
}

struct Best {
  std::optional<HaloPlan> plan;
  double cost = std::numeric_limits<double>::max();
};

// Tries tiles over one and several images, and where rows are long also parts of rows. It is quick
// rather than thorough, since the first call for each size of image waits for it.
void search(const Planner& planner, const HaloLimits& limits, int64_t batch, Best& best) {
  constexpr int64_t kLongRow = 64, kManyPixels = 1024;
  const int64_t out_height = planner.rows().out, out_width = planner.columns().out;
  int64_t tried_columns = out_width + 1;
  for (int64_t columns : {out_width, ceil_div(out_width, 2), ceil_div(out_width, 4), int64_t{32}}) {
    if (columns < out_width && out_width <= kLongRow) break;
    if (columns >= tried_columns) continue;
    tried_columns = columns;
    const int64_t pitch = pitch_of(planner.columns(), columns);
    for (int64_t images : {1, 2, 3, 4, 8, 16, 32, 64}) {
      if (images > 1 && (images > batch || columns < out_width)) break;
      int64_t tried_rows = 0;
      for (int64_t parts = 1; parts <= out_height; parts += parts < 4 ? 1 : parts / 2) {
        const int64_t rows = ceil_div(out_height, parts);
        if (rows == tried_rows || (images > 1 && rows * images * pitch > kManyPixels)) continue;
        tried_rows = rows;
        HaloPlan plan = planner.plan(rows, columns, images, pitch);
        if (plan.is_streamed && plan.runs > plan.runs_at_once(limits)) continue;
        if (!planner.fit(plan)) continue;
        const double cost = planner.cost(plan);
        if (cost < best.cost) best = {plan, cost};
      }
    }
  }
}

struct Taps {
  int64_t first, end;
};

// Those inside the input at a position of the output along one axis.
Taps taps_inside(const AxisShape& a, int64_t position) {
  const int64_t origin = position * a.stride - a.pad;
  const auto within = [&](int64_t extent) {
    return std::min(ceil_div(std::max<int64_t>(extent, 0), a.dilation), a.kernel);
  };
  const int64_t end = within(a.in - origin);
  return {std::min(within(-origin), end), end};
}

void list_inside_taps(const Conv2dShape& shape, const HaloPlan& plan, HaloTables& tables) {
  const auto narrow = [](int64_t tap) { return static_cast<uint8_t>(tap); };
  InsideTaps* to = tables.inside;
  for (int32_t i = 0; i < plan.row_border.entries; ++i) {
    const Taps rows = taps_inside(rows_of(shape), plan.row_border.position(i));
    for (int32_t j = 0; j < plan.column_border.entries; ++j) {
      const Taps columns = taps_inside(columns_of(shape), plan.column_border.position(j));
      *to++ = {narrow(rows.first), narrow(rows.end), narrow(columns.first), narrow(columns.end)};
    }
  }
}

// Lists the pairs of a stage.
class PairList {
 public:
  PairList(const Conv2dShape& shape, const HaloPlan& plan, HaloTables& tables)
      : shape_(shape),
        plan_(plan),
        weight_(prepared_layout(shape.weight)),
        chunk_step_(int64_t{plan.phases()} * plan.region_pixels),
        to_(tables.pairs) {}

  // The same tap in two chunks; of streamed weights, the stage has no more.
  void add_chunks() {
    const int64_t weights_step = int64_t{plan_.part_taps} * kCoreRows;
    for (int64_t chunk = 0; chunk + 1 < (plan_.is_streamed ? 2 : weight_.chunks); chunk += 2) {
      for (int64_t tap = 0; tap < weight_.taps; ++tap) {
        add(chunk, tap, chunk_step_, weights_step);
      }
    }
  }

  // The taps of a last chunk without a partner, those of a phase with one another. A lone tap is
  // paired with the tap of zeros, which is the one behind the last.
  void add_last_chunk() {
    if (plan_.is_streamed || weight_.chunks % 2 == 0) return;
    const int64_t chunk = weight_.chunks - 1;
    for (int64_t phase = 0; phase < plan_.phases(); ++phase) {
      int64_t first = -1;  // A tap that still has no partner.
      for (int64_t tap = 0; tap < weight_.taps; ++tap) {
        if (phase_of(shape_, tap) != phase) continue;
        if (first < 0) {
          first = tap;
          continue;
        }
        add(chunk, first, shift(tap) - shift(first), (tap - first) * kCoreRows);
        first = -1;
      }
      if (first >= 0) add(chunk, first, 1, (weight_.taps - first) * kCoreRows);
    }
  }

 private:
  int64_t shift(int64_t tap) const { return tap_shift(shape_, plan_, tap); }

  // A tap of a chunk, and how much further its partner lies.
  void add(int64_t chunk, int64_t tap, int64_t halo_step, int64_t weights_step) {
    const int64_t halo = chunk * chunk_step_ + shift(tap);
    const int64_t slot = plan_.is_streamed ? tap % kStreamTaps : tap;
    const int64_t weights = chunk / 2 * plan_.part_bytes() / kChunkBytes + slot * kCoreRows;
    *to_++ = {static_cast<uint32_t>(halo | halo_step << 16),
              static_cast<uint32_t>(weights | weights_step << 16)};
  }

  const Conv2dShape& shape_;
  const HaloPlan& plan_;
  PreparedLayout weight_;
  int64_t chunk_step_;
  HaloPair* to_;
};

HaloPlan best_plan(const Conv2dShape& shape, const HaloLimits& limits) {
  const WeightShape& weight = shape.weight;
  const bool whole_blocks = has_whole_blocks(weight);
  Best best;
  if (weight.out_channels > 64 && whole_blocks) {
    search(Planner(shape, limits, 128, false), limits, shape.batch, best);
  }
  // Narrow blocks give more of them to few pixels.
  const int64_t pixels = shape.batch * shape.out_height() * shape.out_width();
  const int64_t runs = ceil_div(pixels, kRunPixels) * ceil_div(weight.out_channels, 128);
  if (!best.plan || runs < 8 * limits.multiprocessors) {
    search(Planner(shape, limits, 64, false), limits, shape.batch, best);
  }
  if (limits.least_channels < 64 && (weight.out_channels <= 32 || runs < limits.multiprocessors)) {
    search(Planner(shape, limits, 32, false), limits, shape.batch, best);
  }
  const PreparedLayout prepared = prepared_layout(weight);
  const int64_t block_bytes = prepared.chunks * prepared.taps * 128 * kChunkBytes;
  if (whole_blocks && (!best.plan || 2 * block_bytes > limits.shared_bytes)) {
    search(Planner(shape, limits, 128, true), limits, shape.batch, best);
  }
  if (best.plan) return *best.plan;
  return *smallest_plan(shape, limits);
}

using Numbers = std::array<int64_t, 17>;

Numbers numbers_of(const Conv2dShape& s) {
  const WeightShape& w = s.weight;
  return {w.out_channels,   w.in_channels, w.kernel_height, w.kernel_width,  w.groups,
          s.batch,          s.in_height,   s.in_width,      s.stride_height, s.stride_width,
          s.pad_top,        s.pad_left,    s.pad_bottom,    s.pad_right,     s.dilation_height,
          s.dilation_width, s.pad_value};
}

uint64_t hash_of(const Numbers& numbers) {
  uint64_t hash = 0;
  for (int64_t number : numbers) {
    hash = (hash ^ static_cast<uint64_t>(number)) * 0x9e3779b97f4a7c15;  // 2^64 / golden ratio.
  }
  return hash >> 32;
}

}  // namespace

Border border_of(const AxisShape& a) {
  const int64_t before = std::min(a.out, ceil_div(a.pad, a.stride));
  // The first position whose last tap is beyond the input.
  const int64_t room = a.in + a.pad - (a.kernel - 1) * a.dilation;
  const int64_t first_after = std::min(a.out, ceil_div(std::max<int64_t>(room, 0), a.stride));
  const int64_t entries = std::min(a.out, before + 1 + a.out - first_after);
  return {narrow(entries), narrow(before), narrow(a.out)};
}

int64_t tap_shift(const Conv2dShape& shape, const HaloPlan& plan, int64_t tap) {
  const AxisShape rows = rows_of(shape), columns = columns_of(shape);
  const int64_t h = tap / columns.kernel * rows.dilation;
  const int64_t w = tap % columns.kernel * columns.dilation;
  return phase_of(shape, tap) * plan.region_pixels +
         h / rows.stride * plan.tile_images * plan.pitch + w / columns.stride;
}

HaloTables halo_tables(const Conv2dShape& shape, const HaloPlan& plan) {
  HaloTables tables = {};
  list_inside_taps(shape, plan, tables);
  PairList pairs(shape, plan, tables);
  pairs.add_chunks();
  pairs.add_last_chunk();
  return tables;
}

HaloLayout halo_layout(const HaloPlan& plan) {
  int64_t offset = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t start = offset;
    offset = round_up(start + bytes, 128);
    return static_cast<int32_t>(start);
  };
  HaloLayout at;
  at.halo = take(int64_t{plan.halo_stages} * plan.stage_bytes());
  at.weights = take(int64_t{plan.parts} * plan.part_bytes());
  at.table =
      take(int64_t{plan.row_border.entries} * plan.column_border.entries * plan.block_channels * 4);
  at.terms = take(int64_t{kChannelTerms} * kMostChannels * 4 + kFlagBytes);
  const int64_t lists = plan.lists_pixels ? plan.halo_stages : 0;
  at.pixels = take(lists * plan.runs * kRunPixels * static_cast<int64_t>(sizeof(Pixel)));
  const int64_t sources = plan.lists_sources ? plan.phases() * plan.region_pixels : 0;
  at.sources = take(sources * static_cast<int64_t>(sizeof(int64_t)));
  at.barriers = take(kBarrierBytes);
  at.total = static_cast<int32_t>(std::min<int64_t>(offset, std::numeric_limits<int32_t>::max()));
  return at;
}

bool halo_accepts(const Conv2dShape& shape, const HaloLimits& limits) {
  const WeightShape& weight = shape.weight;
  const int64_t group_in = weight.in_channels / weight.groups;
  const int64_t group_out = weight.out_channels / weight.groups;
  if (weight.groups > 1 && (group_in % kChunkBits != 0 || group_out % 64 != 0)) return false;
  const int64_t taps = weight.kernel_height * weight.kernel_width;
  if (taps > kMaxPairs || taps * round_up(group_in, kChunkBits) > kMaxBits) return false;
  if (std::max(shape.stride_height, shape.stride_width) > kStrideLimit) return false;
  if (weight.out_channels > kMaxChannels) return false;
  const int64_t pixels = shape.batch * shape.out_height() * shape.out_width();
  if (pixels > kMaxPixels) return false;
  if (!has_narrow_positions(rows_of(shape)) || !has_narrow_positions(columns_of(shape))) {
    return false;
  }
  if (shape.pad_value != -1) {
    const Border rows = border_of(rows_of(shape)), columns = border_of(columns_of(shape));
    if (int64_t{rows.entries} * columns.entries > kMaxBorderEntries) return false;
  }
  if (largest_shift(rows_of(shape)) + 1 > kBoxLimit) return false;
  if (largest_shift(columns_of(shape)) + 8 > kBoxLimit) return false;
  return smallest_plan(shape, limits).has_value();
}

HaloPlan plan_halo(const Conv2dShape& shape, const HaloLimits& limits) {
  struct Planned {
    Numbers shape;
    HaloLimits limits;
    HaloPlan plan;
  };
  // Networks repeat their shapes, and planning takes as long as a launch.
  static thread_local std::array<std::optional<Planned>, 64> planned;
  const Numbers numbers = numbers_of(shape);
  std::optional<Planned>& slot = planned[hash_of(numbers) % planned.size()];
  if (!slot || slot->shape != numbers || slot->limits != limits) {
    slot = {numbers, limits, best_plan(shape, limits)};
  }
  return slot->plan;
}

}  // namespace binconv::cuda

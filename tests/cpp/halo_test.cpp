#include "cuda/halo.h"

#include <algorithm>
#include <array>
#include <thread>
#include <vector>

#include "conv2d_check.h"
#include "cuda/prepared_weight.h"
#include "test.h"

// White-box: the host's plans for the tensor-core kernels, checked against what a convolution
// reads.

namespace binconv::test {
namespace {

using namespace cuda;

constexpr int kFewProcessors = 2;

struct Sample {
  Conv2dShape shape;
  HaloLimits limits;
  HaloPlan plan;
};

std::vector<Sample> samples() {
  std::vector<Sample> all;
  for (uint64_t seed = 0; all.size() < 600; ++seed) {
    Random random(seed);
    const Conv2dShape shape = random_shape(random);
    if (shape.batch == 0 || !halo_accepts(shape, kSm80Limits)) continue;
    for (HaloLimits limits : {kSm90Limits, kSm80Limits}) {
      all.push_back({shape, limits, plan_halo(shape, limits)});
      limits.multiprocessors = kFewProcessors;
      all.push_back({shape, limits, plan_halo(shape, limits)});
    }
  }
  return all;
}

// The pixel of the packed input at a place of shared memory, or none: outside the image, or behind
// the halo.
struct Source {
  bool is_inside;
  int64_t image, row, column;
};

Source source_at(const Conv2dShape& s, const HaloPlan& plan, const std::array<int64_t, 3>& tile,
                 int64_t pixel) {
  const int64_t phase = pixel / plan.region_pixels, flat = pixel % plan.region_pixels;
  if (flat >= plan.halo_pixels()) return {false, 0, 0, 0};
  const int64_t column = flat % plan.pitch, image = flat / plan.pitch % plan.tile_images;
  const int64_t row = flat / plan.pitch / plan.tile_images;
  const int64_t n = tile[0] + image;
  const int64_t h = (tile[1] + row) * s.stride_height - s.pad_top + phase / plan.phases_width;
  const int64_t w = (tile[2] + column) * s.stride_width - s.pad_left + phase % plan.phases_width;
  const bool inside = n < s.batch && h >= 0 && h < s.in_height && w >= 0 && w < s.in_width;
  return {inside, n, h, w};
}

// Whether every tap of every output pixel of a tile finds its input where the tables say.
bool reads_what_it_must(const Sample& sample, const std::array<int64_t, 3>& tile) {
  const Conv2dShape& s = sample.shape;
  const HaloPlan& plan = sample.plan;
  for (int64_t i = 0; i < plan.tile_rows * plan.tile_images; ++i) {
    for (int64_t j = 0; j < plan.tile_columns; ++j) {
      const int64_t n = tile[0] + i % plan.tile_images, p = tile[1] + i / plan.tile_images;
      const int64_t q = tile[2] + j, flat = i * plan.pitch + j;
      if (n >= s.batch || p >= s.out_height() || q >= s.out_width()) continue;
      if (flat >= plan.runs * kRunPixels) return false;
      int64_t tap = 0;
      for (int64_t kh = 0; kh < s.weight.kernel_height; ++kh) {
        for (int64_t kw = 0; kw < s.weight.kernel_width; ++kw, ++tap) {
          const int64_t h = p * s.stride_height - s.pad_top + kh * s.dilation_height;
          const int64_t w = q * s.stride_width - s.pad_left + kw * s.dilation_width;
          const bool inside = h >= 0 && h < s.in_height && w >= 0 && w < s.in_width;
          const int64_t place = flat + tap_shift(s, plan, tap);
          if (place / plan.region_pixels >= plan.phases()) return false;
          const Source source = source_at(s, plan, tile, place);
          if (inside != source.is_inside) return false;
          if (inside && (source.image != n || source.row != h || source.column != w)) return false;
        }
      }
    }
  }
  return true;
}

}  // namespace

TEST(Halo, PlansFitAndCoverTheOutput) {
  for (const auto& [shape, limits, plan] : samples()) {
    const Context context(describe(shape));
    CHECK(plan.row_tiles * plan.tile_rows >= shape.out_height());
    CHECK((plan.row_tiles - 1) * plan.tile_rows < shape.out_height());
    CHECK(plan.column_tiles * plan.tile_columns >= shape.out_width());
    CHECK((plan.column_tiles - 1) * plan.tile_columns < shape.out_width());
    const int64_t image_tiles = plan.tiles / plan.row_tiles / plan.column_tiles;
    CHECK(image_tiles * plan.tile_images >= shape.batch);
    CHECK(halo_layout(plan).total <= limits.shared_bytes);
    CHECK(!plan.is_streamed || plan.runs <= plan.runs_at_once(limits));
    CHECK(plan.halo_stages >= kLeastStages && plan.halo_stages <= limits.most_halo_stages);
    CHECK(!plan.is_streamed || plan.parts >= kLeastStages);
    CHECK(!plan.is_streamed || plan.parts <= limits.most_streamed_parts);
    const int channels = plan.block_channels;
    CHECK(channels == 32 || channels == 64 || channels == 128);
    CHECK(channels >= (plan.is_streamed ? 128 : limits.least_channels));
  }
}

TEST(Halo, AShapeHasOnePlanWhateverWasPlannedBefore) {
  const auto key = [](const HaloPlan& p) {
    return std::array{p.block_channels, p.tile_rows, p.tile_columns, p.tile_images, p.tiles,
                      p.runs,           p.pitch,     p.halo_stages,  p.parts,       p.part_taps};
  };
  const std::vector<Sample> all = samples();
  for (auto sample = all.rbegin(); sample != all.rend(); ++sample) {
    CHECK(key(plan_halo(sample->shape, sample->limits)) == key(sample->plan));
    std::array<int32_t, 10> alone = {};
    std::thread([&] { alone = key(plan_halo(sample->shape, sample->limits)); }).join();
    CHECK(alone == key(sample->plan));
  }
}

TEST(Halo, EveryTapFindsItsInputInSharedMemory) {
  for (const Sample& sample : samples()) {
    const Context context(describe(sample.shape));
    const HaloPlan& plan = sample.plan;
    const int64_t last = plan.tiles - 1;
    for (const int64_t tile : {int64_t{0}, last / 2, last}) {
      const int64_t rows = tile / plan.column_tiles;
      CHECK(reads_what_it_must(
          sample, {rows / plan.row_tiles * plan.tile_images, rows % plan.row_tiles * plan.tile_rows,
                   tile % plan.column_tiles * plan.tile_columns}));
    }
  }
}

TEST(Halo, PairsHoldEveryChunkOfEveryTapOnce) {
  for (const auto& [shape, limits, plan] : samples()) {
    const Context context(describe(shape));
    const PreparedLayout weight = prepared_layout(shape.weight);
    const HaloTables tables = halo_tables(shape, plan);
    const int64_t chunk_step = int64_t{plan.phases()} * plan.region_pixels;
    // Streamed weights: of two chunks, in the order of their taps.
    const int64_t chunks = plan.is_streamed ? 2 : weight.chunks;
    const int64_t part_rows = plan.part_bytes() / kChunkBytes;
    std::vector<int> seen(chunks * weight.taps);
    for (int64_t i = 0; i < plan.pairs; ++i) {
      const HaloPair& pair = tables.pairs[i];
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t halo = (pair.halo & 0xffff) + half * (pair.halo >> 16);
        const int64_t row = (pair.weights & 0xffff) + half * (pair.weights >> 16);
        const int64_t in_part = row % part_rows / kCoreRows;
        const int64_t chunk = row / part_rows * plan.part_chunks + in_part / plan.part_taps;
        const int64_t tap = plan.is_streamed ? i : in_part % plan.part_taps;
        if (tap == weight.taps) {  // The zeros behind the weights.
          CHECK(weight.chunks % 2 == 1);
          CHECK_EQ(chunk, weight.chunks - 1);
          continue;
        }
        CHECK(chunk < chunks && tap < weight.taps);
        const int64_t atom = chunk * weight.taps + tap;
        CHECK_EQ(halo,
                 atom / weight.taps * chunk_step + tap_shift(shape, plan, atom % weight.taps));
        ++seen[atom];
      }
    }
    CHECK(std::all_of(seen.begin(), seen.end(), [](int count) { return count == 1; }));
  }
}

TEST(Halo, PositionsOfOneBorderEntryLoseTheSameTaps) {
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    Random random(seed);
    const Conv2dShape s = random_shape(random);
    const AxisShape axis{s.in_width,     s.out_width(), s.weight.kernel_width,
                         s.stride_width, s.pad_left,    s.dilation_width};
    const Context context(describe(s));
    const auto inside = [&](int64_t position) {
      std::vector<bool> taps;
      for (int64_t tap = 0; tap < axis.kernel; ++tap) {
        const int64_t w = position * axis.stride - axis.pad + tap * axis.dilation;
        taps.push_back(w >= 0 && w < axis.in);
      }
      return taps;
    };
    const Border border = border_of(axis);
    for (int32_t q = 0; q < axis.out; ++q) {
      const int32_t entry = border.entry(q);
      CHECK(entry >= 0 && entry < border.entries);
      CHECK(inside(q) == inside(border.position(entry)));
    }
  }
}

TEST(Halo, ShapesThatTheTensorCoresCannotTakeAreLeftToAnotherKernel) {
  const auto accepts = [](auto change) {
    Conv2dShape shape = shape_3x3(2, 256, 16, 16, 256);
    change(shape);
    return halo_accepts(shape, kSm90Limits);
  };
  CHECK(accepts([](Conv2dShape&) {}));
  CHECK(accepts([](Conv2dShape& s) { s.weight.groups = 2; }));
  CHECK(!accepts([](Conv2dShape& s) { s.weight.groups = 4; }));  // 64 channels of a group.
  CHECK(!accepts([](Conv2dShape& s) { s.stride_width = 9; }));   // Beyond a tensor map's step.
  CHECK(accepts([](Conv2dShape& s) { s.in_width = 1; }));        // Taps lost on both sides.
  CHECK(!accepts([](Conv2dShape& s) { s.weight.in_channels = int64_t{1} << 20; }));
  CHECK(!accepts([](Conv2dShape& s) { s.weight.out_channels = int64_t{1} << 23; }));
  CHECK(!accepts([](Conv2dShape& s) {  // Positions beyond 2^31, though few outputs.
    s.pad_value = -1;
    s.pad_top = s.pad_bottom = (int64_t{1} << 31) - 1;
    s.stride_height = 8;
    s.batch = s.in_width = s.weight.kernel_width = 1;
    s.pad_left = s.pad_right = 0;
  }));
}

}  // namespace binconv::test

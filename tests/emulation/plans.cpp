// The library's planner, beside one that draws any plan of a shape that fits: the kernels must be
// right for all of them, and the best ones alone are a narrow choice.
#define plan_halo plan_halo_of_least_cost
#include "cuda/halo.cpp"
#undef plan_halo

#include "emulation/gpu.h"
#include "random.h"

namespace binconv::cuda {
namespace {

std::optional<HaloPlan> draw_plan(const Conv2dShape& shape, const HaloLimits& limits,
                                  test::Random& random) {
  const bool whole_blocks = has_whole_blocks(shape.weight);
  const bool is_streamed = whole_blocks && random.one_in(3);
  const bool is_wide = is_streamed || (whole_blocks && random.one_in(2));
  const bool is_narrow = limits.least_channels < 64 && random.one_in(3);
  const int channels = is_wide ? 128 : is_narrow ? 32 : 64;
  const int64_t out_height = shape.out_height(), out_width = shape.out_width();
  const int64_t columns = random.one_in(2) ? out_width : random.between(1, out_width);
  const int64_t rows = random.one_in(5) ? out_height : random.between(1, out_height);
  const int64_t images = columns < out_width && !random.one_in(3)
                             ? 1
                             : std::min(shape.batch, random.pick<int64_t>({1, 1, 2, 3, 4, 8}));
  const Planner planner(shape, limits, channels, is_streamed);
  HaloPlan plan = planner.plan(rows, columns, images, pitch_of(planner.columns(), columns));
  if (is_streamed && plan.runs > plan.runs_at_once(limits)) return std::nullopt;
  if (!planner.fit(plan)) return std::nullopt;
  return plan;
}

HaloPlan choose_plan(const Conv2dShape& shape, const HaloLimits& limits) {
  constexpr int kTries = 60;
  if (emulation::device().draws_plans) {
    test::Random random(emulation::device().seed);
    for (int i = 0; i < kTries; ++i) {
      if (const auto plan = draw_plan(shape, limits, random)) return *plan;
    }
  }
  return plan_halo_of_least_cost(shape, limits);
}

}  // namespace

HaloPlan plan_halo(const Conv2dShape& shape, const HaloLimits& limits) {
  const HaloPlan plan = choose_plan(shape, limits);
  emulation::PlanCounts& counts = emulation::plan_counts();
  const int64_t halo_columns = plan.tile_columns + largest_shift(columns_of(shape));
  counts.resident_32 += plan.block_channels == 32;
  counts.resident_64 += plan.block_channels == 64;
  counts.resident_128 += plan.block_channels == 128 && !plan.is_streamed;
  counts.streamed += plan.is_streamed;
  counts.several_images += plan.tile_images > 1;
  counts.cut_rows += plan.column_tiles > 1;
  counts.shared_padding += plan.pitch < halo_columns;
  return plan;
}

}  // namespace binconv::cuda

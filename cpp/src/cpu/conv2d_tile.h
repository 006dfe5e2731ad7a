// The CPU convolution around an instruction set's inner loop. Each conv2d_<isa>.cpp includes this
// file after switching its target on, so that all of it is compiled for that instruction set; the
// unnamed namespace keeps the copies apart.
//
// A tile is a run of output pixels. Its windows are gathered into rows of bits: all geometry
// (stride, padding, dilation, groups) is over once a row is there. The inner loop then compares
// kRows rows with the weights of kBlock output channels. Pixels outside the image are gathered as
// zeros; what that is off by is corrected per outside tap (docs/conventions.md, "The algebra").
//
// An instruction set Isa provides
//   kWordBytes  bytes of one output channel that lie together in prepared weights,
//   kLanes      output channels whose words alternate there,
//   kBlock      output channels that the inner loop takes at once, a multiple of kLanes,
//   kRows       rows that the inner loop takes at once,
//   count(rows, row_bytes, weights, channels, counts): counts[r][o] = popcount(row r ^ weights of
//     channel o) for the first `channels` channels at least; the weights of kLanes channels lie
//     row_bytes * kLanes bytes after those of the kLanes before. Its loops over rows and vectors
//     ask to be unrolled: rolled, as -O2 leaves them, the counts would go through memory.

#include "cpu/conv2d_prelude.h"
#include "cpu/numeric.h"
#include "cpu/parallel.h"

namespace binconv::cpu {
namespace {

template <class Isa>
class TiledConv2d {
  class Tile;
  struct Rows;
  struct Work;

 public:
  static int64_t prepared_bytes(const WeightShape& shape) {
    const Rows rows(shape);
    return rows.popcounts_offset() + rows.taps * shape.out_channels * sizeof(int32_t);
  }

  static void prepare(const WeightShape& shape, const uint8_t* packed, uint8_t* prepared,
                      const Queue&) {
    const Rows rows(shape);
    std::memset(prepared, 0, rows.popcounts_offset());
    int32_t* popcounts = reinterpret_cast<int32_t*>(prepared + rows.popcounts_offset());
    const int64_t pixel_bytes = packed_bytes(rows.group_in);
    for (int64_t o = 0; o < shape.out_channels; ++o) {
      uint8_t* channel =
          prepared + rows.lanes_offset(o) + o % rows.group_out % Isa::kLanes * Isa::kWordBytes;
      for (int64_t tap = 0; tap < rows.taps; ++tap) {
        const uint8_t* bits = packed + (o * rows.taps + tap) * pixel_bytes;
        int32_t popcount = 0;
        for (int64_t i = 0; i < rows.tap_bytes; ++i) {
          const int64_t k = tap * rows.tap_bytes + i;
          channel[k / Isa::kWordBytes * Isa::kLanes * Isa::kWordBytes + k % Isa::kWordBytes] =
              bits[i];
          popcount += std::popcount(bits[i]);
        }
        popcounts[tap * shape.out_channels + o] = popcount;
      }
    }
  }

  static int64_t workspace_bytes(const Conv2dShape& shape, const Queue& queue) {
    const Rows rows(shape.weight);
    const Work work(shape, rows);
    return Tile::bytes(rows) * worker_count(queue.threads(), work.tiles, work.chunk);
  }

  static void launch(const Conv2dArgs& args, const Queue& queue) {
    const Rows rows(args.shape.weight);
    const Work work(args.shape, rows);
    parallel_for(queue.threads(), work.tiles, work.chunk,
                 [&](int worker, int64_t begin, int64_t end) {
                   Tile tile(args, rows, worker);
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t first = i * work.tile_pixels;
                     tile.run(first, std::min(work.tile_pixels, work.pixels - first));
                   }
                 });
  }

 private:
  // Sizes of a row, and of the weights that it is compared with.
  struct Rows {
    explicit Rows(const WeightShape& shape)
        : taps(shape.kernel_height * shape.kernel_width),
          group_in(shape.in_channels / shape.groups),
          group_out(shape.out_channels / shape.groups),
          groups(shape.groups),
          tap_bytes(ceil_div(group_in, 8)),
          row_bytes(round_up(taps * tap_bytes, Isa::kWordBytes)),
          group_lanes(ceil_div(group_out, Isa::kLanes)) {}

    int64_t lanes_offset(int64_t out_channel) const {
      const int64_t lanes =
          out_channel / group_out * group_lanes + out_channel % group_out / Isa::kLanes;
      return lanes * row_bytes * Isa::kLanes;
    }
    int64_t popcounts_offset() const { return groups * group_lanes * row_bytes * Isa::kLanes; }

    int64_t taps, group_in, group_out, groups, tap_bytes, row_bytes, group_lanes;
  };

  // How a convolution is cut up: into tiles of pixels, and chunks of tiles for a thread.
  struct Work {
    Work(const Conv2dShape& shape, const Rows& rows)
        : pixels(shape.batch * shape.out_height() * shape.out_width()),
          tile_pixels(Tile::pixels(rows)),
          tiles(ceil_div(pixels, tile_pixels)),
          // A step, as chunk_for counts them, compares about 64 bits.
          chunk(chunk_for(tile_pixels * shape.weight.out_channels * (rows.row_bytes / 8 + 1))) {}

    int64_t pixels, tile_pixels, tiles, chunk;
  };

  // One worker's tile, in its part of the workspace: the rows, and for each the taps outside the
  // image.
  class Tile {
   public:
    static int64_t pixels(const Rows& rows) {
      constexpr int64_t kCacheBytes = 16384;
      return std::clamp<int64_t>(kCacheBytes / (rows.row_bytes * Isa::kRows), 1, 8) * Isa::kRows;
    }
    static int64_t bytes(const Rows& rows) {
      return round_up(pixels(rows) * (rows.row_bytes + (rows.taps + 1) * sizeof(int32_t)), 64);
    }

    Tile(const Conv2dArgs& args, const Rows& rows, int worker)
        : args_(args),
          rows_(rows),
          out_height_(args.shape.out_height()),
          out_width_(args.shape.out_width()),
          pixel_bytes_(packed_bytes(args.shape.weight.in_channels)),
          packed_output_(static_cast<uint8_t*>(
              args.epilogue.out_type == DataType::kBits ? args.output : args.epilogue.bits)),
          outside_(reinterpret_cast<int32_t*>(static_cast<uint8_t*>(args.workspace) +
                                              worker * bytes(rows))),
          bits_(reinterpret_cast<uint8_t*>(outside_ + pixels(rows) * (rows.taps + 1))) {}

    void run(int64_t first_pixel, int64_t count) {
      if (packed_output_) {
        const int64_t pixel_bytes = packed_bytes(args_.shape.weight.out_channels);
        std::memset(packed_output_ + first_pixel * pixel_bytes, 0, count * pixel_bytes);
      }
      for (int64_t group = 0; group < rows_.groups; ++group) {
        Position at = position(first_pixel);
        for (int64_t i = 0; i < round_up(count, Isa::kRows); ++i) {
          gather(at, group, i);
          // The inner loop takes whole steps of kRows: the last pixel fills them up.
          if (i < count - 1) advance(at);
        }
        for (int64_t o = 0; o < rows_.group_out; o += Isa::kBlock) {
          const int64_t channels = std::min<int64_t>(Isa::kBlock, rows_.group_out - o);
          multiply(first_pixel, count, group * rows_.group_out + o, channels);
        }
      }
    }

   private:
    struct Position {
      int64_t image, p, q;
    };

    Position position(int64_t pixel) const {
      const int64_t row = pixel / out_width_;
      return {row / out_height_, row % out_height_, pixel % out_width_};
    }

    void advance(Position& at) const {
      if (++at.q < out_width_) return;
      at.q = 0;
      if (++at.p < out_height_) return;
      at.p = 0;
      ++at.image;
    }

    // Row `index` = the window of one output pixel in one group.
    void gather(const Position& at, int64_t group, int64_t index) {
      const Conv2dShape& shape = args_.shape;
      const uint8_t* image = args_.input +
                             at.image * shape.in_height * shape.in_width * pixel_bytes_ +
                             group * rows_.group_in / 8;
      uint8_t* row = bits_ + index * rows_.row_bytes;
      int32_t* outside = outside_ + index * (rows_.taps + 1);
      int32_t outside_count = 0;
      int32_t tap = 0;
      const int64_t first_w = at.q * shape.stride_width - shape.pad_left;
      const int64_t last_w = first_w + (shape.weight.kernel_width - 1) * shape.dilation_width;
      for (int64_t i = 0; i < shape.weight.kernel_height; ++i) {
        const int64_t h = at.p * shape.stride_height - shape.pad_top + i * shape.dilation_height;
        const bool h_inside = h >= 0 && h < shape.in_height;
        const uint8_t* line = image + h * shape.in_width * pixel_bytes_;
        if (h_inside && first_w >= 0 && last_w < shape.in_width) {
          row = copy_taps(row, line + first_w * pixel_bytes_, shape.weight.kernel_width);
          tap += static_cast<int32_t>(shape.weight.kernel_width);
          continue;
        }
        for (int64_t w = first_w; w <= last_w; w += shape.dilation_width, ++tap) {
          if (h_inside && w >= 0 && w < shape.in_width) {
            row = copy_taps(row, line + w * pixel_bytes_, 1);
          } else {
            row = std::fill_n(row, rows_.tap_bytes, uint8_t{0});
            outside[++outside_count] = tap;
          }
        }
      }
      outside[0] = outside_count;
      std::fill(row, bits_ + (index + 1) * rows_.row_bytes, uint8_t{0});
    }

    // Taps of one kernel row, all inside the image; a copy of a constant size needs no call.
    uint8_t* copy_taps(uint8_t* to, const uint8_t* from, int64_t count) const {
      const int64_t step = args_.shape.dilation_width * pixel_bytes_;
      switch (rows_.tap_bytes) {
        case 8:
          return copy_taps<8>(to, from, step, count);
        case 16:
          return copy_taps<16>(to, from, step, count);
        case 32:
          return copy_taps<32>(to, from, step, count);
        case 64:
          return copy_taps<64>(to, from, step, count);
      }
      for (; count > 0; --count, from += step) to = std::copy_n(from, rows_.tap_bytes, to);
      return to;
    }

    template <int64_t kBytes>
    static uint8_t* copy_taps(uint8_t* to, const uint8_t* from, int64_t step, int64_t count) {
      for (; count > 0; --count, from += step, to += kBytes) std::memcpy(to, from, kBytes);
      return to;
    }

    // The tile's rows times one block of output channels.
    void multiply(int64_t first_pixel, int64_t count, int64_t first_channel, int64_t channels) {
      const Scaling scaling(args_.epilogue, first_channel, channels);
      const uint8_t* weights = args_.prepared_weight + rows_.lanes_offset(first_channel);
      alignas(64) int32_t counts[Isa::kRows][Isa::kBlock];
      for (int64_t i = 0; i < count; i += Isa::kRows) {
        Isa::count(bits_ + i * rows_.row_bytes, rows_.row_bytes, weights, channels, counts);
        for (int64_t r = 0; r < std::min<int64_t>(Isa::kRows, count - i); ++r) {
          finish(counts[r], outside_ + (i + r) * (rows_.taps + 1), first_channel, channels);
          store(counts[r], scaling, first_pixel + i + r, first_channel, channels);
        }
      }
    }

    // Turns the counts of one row into convolution results.
    void finish(int32_t* counts, const int32_t* outside, int64_t first_channel,
                int64_t channels) const {
      const int32_t bits = static_cast<int32_t>(rows_.taps * rows_.group_in);
      for (int64_t o = 0; o < Isa::kBlock; ++o) counts[o] = bits - 2 * counts[o];
      const int32_t factor = args_.shape.pad_value + 1;
      if (factor == 0) return;
      const int64_t out_channels = args_.shape.weight.out_channels;
      const int32_t* popcounts =
          reinterpret_cast<const int32_t*>(args_.prepared_weight + rows_.popcounts_offset()) +
          first_channel;
      const int32_t group_in = static_cast<int32_t>(rows_.group_in);
      for (int32_t i = 1; i <= outside[0]; ++i) {
        const int32_t* tap = popcounts + outside[i] * out_channels;
        for (int64_t o = 0; o < channels; ++o) counts[o] += factor * (2 * tap[o] - group_in);
      }
    }

    // The epilogue's per-channel numbers for one block, with what a null pointer stands for filled
    // in; those of the activation are read where they lie.
    struct Scaling {
      Scaling(const Epilogue& epilogue, int64_t first_channel, int64_t channels) {
        for (int64_t o = 0; o < Isa::kBlock; ++o) {
          const bool valid = o < channels;
          scale[o] = valid && epilogue.scale ? epilogue.scale[first_channel + o] : 1.0f;
          bias[o] = valid && epilogue.bias ? epilogue.bias[first_channel + o] : 0.0f;
          const float* thresholds = epilogue.threshold.per_channel;
          threshold[o] =
              valid && thresholds ? thresholds[first_channel + o] : epilogue.threshold.value;
          below[o] =
              valid && epilogue.threshold_below && epilogue.threshold_below[first_channel + o] != 0;
        }
      }
      alignas(64) float scale[Isa::kBlock], bias[Isa::kBlock], threshold[Isa::kBlock];
      alignas(64) bool below[Isa::kBlock];
    };

    // One row's results to one output pixel.
    void store(int32_t* acc, const Scaling& scaling, int64_t pixel, int64_t first_channel,
               int64_t channels) const {
      const Epilogue& epilogue = args_.epilogue;
      const int64_t plane = out_height_ * out_width_,
                    out_channels = args_.shape.weight.out_channels;
      const bool nhwc = epilogue.out_layout == Layout::kNHWC;
      const int64_t stride = nhwc ? 1 : plane;
      const int64_t offset =
          nhwc ? pixel * out_channels + first_channel
               : (pixel / plane * out_channels + first_channel) * plane + pixel % plane;
      if (epilogue.clamp) {
        for (int64_t o = 0; o < Isa::kBlock; ++o) acc[o] = std::max(acc[o], 0);
      }
      if (epilogue.out_type == DataType::kInt32) {
        write(static_cast<int32_t*>(args_.output) + offset, stride, channels, acc);
        return;
      }
      alignas(64) float y[Isa::kBlock];
      for (int64_t o = 0; o < Isa::kBlock; ++o) {
        y[o] = std::fma(static_cast<float>(acc[o]), scaling.scale[o], scaling.bias[o]);
      }
      if (epilogue.residual) {
        with_type(epilogue.residual_type, [&](auto tag) {
          const auto* residual = static_cast<const decltype(tag)*>(epilogue.residual) + offset;
          for (int64_t o = 0; o < channels; ++o) y[o] += to_float(residual[o * stride]);
        });
      }
      if (epilogue.activation.enabled) activate(y, first_channel, channels);
      if (packed_output_) write_bits(y, scaling, pixel, first_channel, channels);
      switch (epilogue.out_type) {
        case DataType::kFloat32:
          return write(static_cast<float*>(args_.output) + offset, stride, channels, y);
        case DataType::kFloat16:
          return write(static_cast<Half*>(args_.output) + offset, stride, channels, y);
        case DataType::kBFloat16:
          return write(static_cast<BFloat16*>(args_.output) + offset, stride, channels, y);
        default:
          return;
      }
    }

    void activate(float* y, int64_t first_channel, int64_t channels) const {
      const Activation& activation = args_.epilogue.activation;
      if (const float* shift = activation.in_shift) {
        for (int64_t o = 0; o < channels; ++o) y[o] += shift[first_channel + o];
      }
      if (const float* slope = activation.slope) {
        for (int64_t o = 0; o < channels; ++o) {
          y[o] = y[o] < 0 ? slope[first_channel + o] * y[o] : y[o];
        }
      } else {
        for (int64_t o = 0; o < channels; ++o) y[o] = y[o] < 0 ? 0.0f : y[o];
      }
      if (const float* shift = activation.out_shift) {
        for (int64_t o = 0; o < channels; ++o) y[o] += shift[first_channel + o];
      }
    }

    template <class Out, class Value>
    static void write(Out* out, int64_t stride, int64_t channels, const Value* values) {
      const auto convert = [](Value value) {
        if constexpr (std::is_same_v<Out, Value>) {
          return value;
        } else {
          return from_float<Out>(value);
        }
      };
      if (stride == 1 && channels == Isa::kBlock) {
        for (int64_t o = 0; o < Isa::kBlock; ++o) out[o] = convert(values[o]);
      } else {
        for (int64_t o = 0; o < channels; ++o) out[o * stride] = convert(values[o]);
      }
    }

    void write_bits(const float* y, const Scaling& scaling, int64_t pixel, int64_t first_channel,
                    int64_t channels) const {
      const auto above = [&](int64_t o) { return y[o] >= scaling.threshold[o]; };
      const auto either = [&](int64_t o) {
        return scaling.below[o] ? y[o] <= scaling.threshold[o] : above(o);
      };
      if (args_.epilogue.threshold_below) {
        set_bits(either, pixel, first_channel, channels);
      } else {
        set_bits(above, pixel, first_channel, channels);
      }
    }

    // In an output pixel that is zero so far; with groups, a block can start within a byte.
    template <class Passes>
    void set_bits(const Passes& passes, int64_t pixel, int64_t first_channel,
                  int64_t channels) const {
      uint8_t* pixel_bits = packed_output_ + pixel * packed_bytes(args_.shape.weight.out_channels);
      constexpr int64_t kStep = 32;
      for (int64_t first = 0; first < channels; first += kStep) {
        uint64_t bits = 0;
        for (int64_t o = first; o < std::min(first + kStep, channels); ++o) {
          bits |= uint64_t{passes(o)} << (o - first);
        }
        const int64_t channel = first_channel + first;
        uint8_t* out = pixel_bits + channel / 8;
        for (bits <<= channel % 8; bits; bits >>= 8) *out++ |= static_cast<uint8_t>(bits);
      }
    }

    const Conv2dArgs& args_;
    const Rows& rows_;
    int64_t out_height_, out_width_, pixel_bytes_;
    uint8_t* packed_output_;  // Null: no bits are asked for.
    int32_t* outside_;        // [pixels][1 + taps]: how many, then which.
    uint8_t* bits_;           // [pixels][row_bytes]
  };
};

// The table row of an instruction set.
template <class Isa>
constexpr Kernel make_kernel(const char* name, bool (*runs_on)(const Target&)) {
  using Conv2d = TiledConv2d<Isa>;
  return {.name = name,
          .runs_on = runs_on,
          .accepts = accepts_any_shape,
          .prepared_bytes = Conv2d::prepared_bytes,
          .prepare = Conv2d::prepare,
          .workspace_bytes = Conv2d::workspace_bytes,
          .launch = Conv2d::launch};
}

}  // namespace
}  // namespace binconv::cpu

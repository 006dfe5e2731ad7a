#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "binconv/binconv.h"
#include "device.h"
#include "random.h"
#include "reference.h"

// Runs binary_conv2d on guarded memory and compares every output with the reference.

namespace binconv::test {

// Shapes to start from in tests, of stride 1; the 3x3 kernel has a padding of 1, the other none.
Conv2dShape shape_1x1(int64_t batch, int64_t in_channels, int64_t in_height, int64_t in_width,
                      int64_t out_channels);
Conv2dShape shape_3x3(int64_t batch, int64_t in_channels, int64_t in_height, int64_t in_width,
                      int64_t out_channels);

std::string describe(const Conv2dShape& shape);

// Which epilogue a call asks for; the numbers are drawn when it is checked.
struct EpilogueCase {
  enum class Thresholds { kScalar, kPerChannel };
  struct Activation {
    bool in_shift = false;
    bool slope = false;
    bool out_shift = false;
  };

  DataType out_type = DataType::kInt32;
  Layout out_layout = Layout::kNHWC;
  bool clamp = false;
  bool scale = false;
  bool bias = false;
  std::optional<DataType> residual;
  std::optional<Activation> activation;
  Thresholds thresholds = Thresholds::kScalar;
  bool below = false;  // Whether some bits are y <= threshold.
  bool bits_beside = false;

  bool writes_bits() const { return out_type == DataType::kBits || bits_beside; }
};

std::string describe(const EpilogueCase& epilogue);

Conv2dShape random_shape(Random& random);
Conv2dShape random_pointwise_shape(Random& random);  // 1x1, without padding and groups.
EpilogueCase random_epilogue(Random& random);

// A shape with its values and the exact sums of the outputs that are checked: all of them, unless
// that takes more than `work` multiplications; then the first, the last, and some pixels between.
class Problem {
 public:
  static constexpr int64_t kWork = 40'000'000;

  explicit Problem(const Conv2dShape& shape, uint64_t seed = 1, int64_t work = kWork);
  // With every value of the image and every weight the same: +1 or -1.
  static Problem constant(const Conv2dShape& shape, int x, int weight, int64_t work = kWork);

  const Conv2dShape& shape() const { return shape_; }
  const ImageShape& output() const { return output_; }
  const std::vector<uint8_t>& packed_input() const { return packed_input_; }
  const std::vector<uint8_t>& packed_weight() const { return packed_weight_; }
  uint64_t seed() const { return seed_; }

  // The checked pixels, as (batch * out_height + row) * out_width + column.
  const std::vector<int64_t>& pixels() const { return pixels_; }
  // Of pixels()[i] and output channel o.
  int acc(size_t i, int64_t o) const { return acc_[i * output_.channels + o]; }

 private:
  Problem(const Conv2dShape& shape, const reference::Image& x, const reference::Image& weight,
          uint64_t seed, int64_t work);

  Conv2dShape shape_;
  ImageShape output_;
  std::vector<uint8_t> packed_input_, packed_weight_;
  uint64_t seed_;
  std::vector<int64_t> pixels_;
  std::vector<int> acc_;
};

// A dense image of random values, special ones among them, whose signs are the bits of a packed
// one.
std::vector<uint8_t> draw_values_of(const std::vector<uint8_t>& packed, const ImageShape& image,
                                    DataType type, Layout layout, Random& random);

// prepare_weight on guarded memory of exactly prepared_weight_bytes.
std::shared_ptr<Buffer> prepare(const WeightShape& shape, const std::vector<uint8_t>& packed,
                                const Queue& queue, Placement placement = Placement::kEnd);

// A problem in the memory of one queue's device.
class Run {
 public:
  Run(const Problem& problem, const Queue& queue, Placement placement = Placement::kEnd);
  // With weights that were prepared before.
  Run(const Problem& problem, const Queue& queue, std::shared_ptr<Buffer> prepared,
      Placement placement = Placement::kEnd);

  // One call on fresh output and workspace; every checked output is as the reference has it, and
  // nothing else was written.
  void check(const EpilogueCase& epilogue) const;

  // The same for values of a type, of which many are equal to their threshold or special, and whose
  // bits are the problem's input.
  void check_values(const EpilogueCase& epilogue, DataType type, Layout layout,
                    bool per_channel) const;

  // One call for the sums, without a check.
  std::vector<uint8_t> sums() const;

 private:
  struct Numbers;
  struct Operands;

  Numbers draw(const EpilogueCase& which) const;
  std::vector<float> results(const EpilogueCase& which, const Numbers& numbers) const;
  int acc(const EpilogueCase& which, size_t i, int64_t o) const;
  void check_elements(const EpilogueCase& which, const std::vector<float>& y,
                      const std::vector<uint8_t>& output) const;
  void check_bits(const EpilogueCase& which, const std::vector<float>& y, const Numbers& numbers,
                  const std::vector<uint8_t>& output) const;
  // With values or, where they are null, with packed input.
  void check(const EpilogueCase& epilogue, const Values* x) const;
  void launch(const Epilogue& epilogue, const Buffer& output, const Values* x = nullptr) const;

  const Problem& problem_;
  Queue queue_;
  Placement placement_;
  std::shared_ptr<Buffer> prepared_;
  Buffer input_;
};

// The problem on every kernel of the chosen device that takes it.
void run_on_every_kernel(const Problem& problem, const std::function<void(const Run&)>& body,
                         Placement placement = Placement::kEnd);
void check_on_every_kernel(const Problem& problem,
                           const std::vector<EpilogueCase>& epilogues = {{}});

// check_values of the problem, or one time in three of a 1x1 convolution, with everything that it
// is asked for drawn from the seed.
void check_random_values(const Problem& problem, const Queue& queue, uint64_t seed);

}  // namespace binconv::test

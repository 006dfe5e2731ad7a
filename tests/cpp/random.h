#pragma once

#include <cstdint>
#include <initializer_list>
#include <random>
#include <vector>

namespace binconv::test {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  uint64_t bits() { return engine_(); }

  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  bool one_in(int64_t n) { return between(1, n) == 1; }

  float uniform(float low, float high) {
    return low + (high - low) * (static_cast<float>(engine_() >> 40) * 0x1p-24f);
  }

  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[between(0, static_cast<int64_t>(choices.size()) - 1)];
  }

  // +1 and -1.
  void fill_signs(std::vector<int8_t>& values) {
    uint64_t word = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      if (i % 64 == 0) word = engine_();
      values[i] = (word >> (i % 64)) & 1 ? 1 : -1;
    }
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace binconv::test

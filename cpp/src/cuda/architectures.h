#pragma once

#include <algorithm>
#include <string_view>

// What a list of architectures that a library is built for, "75-virtual 80-real 90a-real", says
// of a device: pure functions, tested without one.

namespace binconv::cuda {

// Whether there is machine code for this architecture, such as "90a".
inline bool has_code(std::string_view architectures, std::string_view architecture) {
  for (size_t start = 0; start < architectures.size();) {
    const size_t end = std::min(architectures.find(' ', start), architectures.size());
    const std::string_view name = architectures.substr(start, end - start);
    if (name.starts_with(architecture)) {
      const std::string_view kind = name.substr(architecture.size());
      if (kind.empty() || kind == "-real") return true;
    }
    start = end + 1;
  }
  return false;
}

// Machine code runs on later minor versions too, but for 8.7, which is Tegra. Later architectures
// only emulate these instructions.
inline bool sm80_runs_on(int compute_capability, std::string_view architectures) {
  const auto has = [&](const char* name) { return has_code(architectures, name); };
  switch (compute_capability) {
    case 80:
      return has("80");
    case 86:
      return has("80") || has("86");
    case 89:
      return has("80") || has("86") || has("89");
    case 90:
      return has("90a");
    default:
      return false;
  }
}

inline bool sm90_runs_on(int compute_capability, std::string_view architectures) {
  return compute_capability == 90 && has_code(architectures, "90a");
}

}  // namespace binconv::cuda

#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>

#include "binconv/binconv.h"

// Argument checks. All of them run before anything is written or launched.

namespace binconv {

template <class... Parts>
[[noreturn]] void fail(Status status, const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(status, message.str());
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) fail(Status::kInvalidArgument, parts...);
}

inline constexpr std::initializer_list<DataType> kFloatTypes = {
    DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16};
inline constexpr std::initializer_list<DataType> kValueTypes = {
    DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16, DataType::kInt8};

const char* to_string(DataType type);
int64_t element_bytes(DataType type);  // Not for kBits.

// The product of sizes, or where it does not fit into 63 bits an error that names the argument and
// what the factors mean.
int64_t checked_product(const std::string& name, const char* meaning,
                        std::initializer_list<int64_t> factors);

void check_type(const char* name, DataType type, std::initializer_list<DataType> allowed);
void check_layout(const char* name, Layout layout);
void check_pointer(const char* name, const void* pointer, int64_t alignment);
void check_image(const ImageShape& shape, const std::string& prefix = "");
bool is_empty(const ImageShape& shape);  // One that check_image lets pass.
void check_weight(const WeightShape& shape);
void check_conv2d(const Conv2dShape& shape);

inline constexpr int64_t kPackedAlignment = 16;

}  // namespace binconv

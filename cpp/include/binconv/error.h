#pragma once

#include <stdexcept>
#include <string>

#include "binconv/export.h"

namespace binconv {

enum class Status {
  kInvalidArgument,  // The call can never work: a wrong size, type, pointer or combination.
  kNotSupported,     // The call is meaningful, but not with this build, CPU or GPU.
  kCudaError,        // The CUDA runtime reported an error; the message carries its text.
};

// The only exception the library throws. Its message names the argument, what it got and what it
// expects. Every check runs before anything is written or launched, so a call that throws
// kInvalidArgument or kNotSupported has changed nothing.
class BINCONV_API Error : public std::runtime_error {
 public:
  Error(Status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  Status status() const noexcept { return status_; }

 private:
  Status status_;
};

}  // namespace binconv

// How a wanda_ext function reports failure: by value, with the text a person reads.
#pragma once

#include <cstdarg>
#include <cstdio>

namespace wanda_ext {

enum class StatusCode : int {
  kOk = 0,
  kInvalidArgument = 1,  // a shape, dtype, stride or option that the op does not take
  kUnsupported = 2,      // valid, but not on this device or in this build
  kCudaError = 3,        // the CUDA runtime said no
};

// Nothing throws across the library's boundary and nothing allocates, so the message lives inside.
struct [[nodiscard]] Status {
  StatusCode code = StatusCode::kOk;
  char message[256] = "";

  bool ok() const { return code == StatusCode::kOk; }
};

// Says what was expected, what came and what to do; printf-style.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
inline Status make_error(StatusCode code, const char* format, ...) {
  Status status;
  status.code = code;
  std::va_list args;
  va_start(args, format);
  std::vsnprintf(status.message, sizeof(status.message), format, args);
  va_end(args);
  return status;
}

}  // namespace wanda_ext

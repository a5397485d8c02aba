// A workspace as an op asks for it, of NaN, that notices writes past its end.
#pragma once

#include <cstdint>
#include <vector>

#include "check.h"

namespace wanda_ext::testing {

// On 64 bytes.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes) : bytes_(bytes), memory_(bytes + 128, 0xff) {}
  ~Workspace() {
    for (std::size_t i = 0; i < 64; ++i) CHECK(data()[bytes_ + i] == 0xff);
  }
  unsigned char* data() {
    return memory_.data() + (64 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 64) % 64;
  }

 private:
  std::size_t bytes_;
  std::vector<unsigned char> memory_;
};

}  // namespace wanda_ext::testing

// A Status carries its message by value, cut to fit and never past its end.
#include "wanda_ext/status.h"

#include <string>

#include "check.h"

namespace wanda_ext {
namespace {

void test_ok() {
  const Status status;
  CHECK(status.ok());
  CHECK(status.code == StatusCode::kOk);
  CHECK(std::string(status.message).empty());
}

void test_error() {
  const Status status = make_error(StatusCode::kUnsupported, "%s: got %d", "pack_24", 7);
  CHECK(!status.ok());
  CHECK(status.code == StatusCode::kUnsupported);
  CHECK(std::string(status.message) == "pack_24: got 7");
  const Status copy = status;
  CHECK(std::string(copy.message) == status.message);
}

void test_long_message() {
  const std::string text(1000, 'x');
  const Status status = make_error(StatusCode::kCudaError, "%s", text.c_str());
  CHECK(std::string(status.message) == text.substr(0, sizeof(status.message) - 1));
}

}  // namespace
}  // namespace wanda_ext

int main() {
  wanda_ext::test_ok();
  wanda_ext::test_error();
  wanda_ext::test_long_message();
  return wanda_ext::testing::finish();
}

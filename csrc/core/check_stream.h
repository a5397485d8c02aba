// The argument checks that the stream ops share.
#pragma once

#include "core/check_args.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {

// Of an n x k weight. `offsets` in the host's memory: that none leads outside can be seen at once.
inline Status check_stream(const char* op, const Stream& stream, std::int64_t n, std::int64_t k) {
  const bool incomplete = stream.offsets == nullptr || (stream.mask == nullptr && n > 0 && k > 0) ||
                          (stream.values == nullptr && stream.count > 0);
  if (stream.count < 0 || incomplete) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: a stream needs values [count], mask [n,k/8] and offsets [n+1] for a "
                      "%lld x %lld weight, count >= 0; got count %lld or a null pointer",
                      op, static_cast<long long>(n), static_cast<long long>(k),
                      static_cast<long long>(stream.count));
  }
  std::int64_t offset = 0;
  for (std::int64_t r = 0; r <= n; ++r) {
    if (stream.offsets[r] < offset || stream.offsets[r] > stream.count) {
      return make_error(StatusCode::kInvalidArgument,
                        "%s: offsets must ascend from 0 to the number of values, %lld; got %lld "
                        "after %lld at row %lld",
                        op, static_cast<long long>(stream.count),
                        static_cast<long long>(stream.offsets[r]), static_cast<long long>(offset),
                        static_cast<long long>(r));
    }
    offset = stream.offsets[r];
  }
  return {};
}

}  // namespace wanda_ext

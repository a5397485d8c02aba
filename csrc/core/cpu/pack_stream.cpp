// A weight as a stream of its non-zeros: first the mask and how many there are, then the values.
// Elements are their bits: -0.0 counts as zero and NaN as non-zero, whatever the floating-point
// mode.
#include "core/check_args.h"
#include "parallel_chunks.h"
#include "simd.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

struct Call {
  const ConstMatrixView& weight;
  void* values;
  std::uint8_t* mask;
  std::int64_t* offsets;
};

template <typename Bits>
WANDA_EXT_INLINE void mark_rows(const Call& call, std::int64_t begin, std::int64_t end) {
  const std::int64_t k = call.weight.cols, bytes = (k + 7) / 8;
  for (std::int64_t r = begin; r < end; ++r) {
    const Bits* row = static_cast<const Bits*>(call.weight.data) + r * call.weight.ld;
    std::int64_t count = 0;
    for (std::int64_t byte = 0; byte < bytes; ++byte) {
      unsigned bits = 0;
      for (std::int64_t c = 8 * byte; c < 8 * byte + 8 && c < k; ++c) {
        const bool nonzero = static_cast<Bits>(row[c] << 1) != 0;
        bits |= static_cast<unsigned>(nonzero) << (c - 8 * byte);
      }
      call.mask[r * bytes + byte] = static_cast<std::uint8_t>(bits);
      count += count_bits(bits);
    }
    call.offsets[r + 1] = count;
  }
}

template <typename Bits>
WANDA_EXT_INLINE void copy_rows(const Call& call, std::int64_t begin, std::int64_t end) {
  const std::int64_t k = call.weight.cols, bytes = (k + 7) / 8;
  for (std::int64_t r = begin; r < end; ++r) {
    const Bits* row = static_cast<const Bits*>(call.weight.data) + r * call.weight.ld;
    Bits* to = static_cast<Bits*>(call.values) + call.offsets[r];
    for (std::int64_t byte = 0; byte < bytes; ++byte) {
      for (unsigned bits = call.mask[r * bytes + byte]; bits != 0; bits &= bits - 1) {
        *to++ = row[8 * byte + __builtin_ctz(bits)];
      }
    }
  }
}

}  // namespace

Status pack_stream(ConstMatrixView weight, std::int64_t count, void* values, std::uint8_t* mask,
                   std::int64_t* offsets, const ParallelFor& parallel) {
  const char* op = "pack_stream";
  if (Status status = check_matrix(op, "weight", weight); !status.ok()) return status;
  if (offsets == nullptr || (mask == nullptr && weight.rows > 0 && weight.cols > 0) ||
      (values == nullptr && count > 0)) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: got a null pointer; pass values [count], mask [n,k/8] and offsets [n+1]",
                      op);
  }
  const Call call = {weight, values, mask, offsets};
  const bool is_wide = weight.dtype == DType::kFloat32;
  for_each_range(parallel, weight.rows, 1, [&](std::int64_t begin, std::int64_t end, std::int64_t) {
    is_wide ? mark_rows<std::uint32_t>(call, begin, end)
            : mark_rows<std::uint16_t>(call, begin, end);
  });
  offsets[0] = 0;
  for (std::int64_t r = 0; r < weight.rows; ++r) offsets[r + 1] += offsets[r];
  if (offsets[weight.rows] != count) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: count must be the number of non-zeros of weight, %lld, got %lld", op,
                      static_cast<long long>(offsets[weight.rows]), static_cast<long long>(count));
  }
  for_each_range(parallel, weight.rows, 1, [&](std::int64_t begin, std::int64_t end, std::int64_t) {
    is_wide ? copy_rows<std::uint32_t>(call, begin, end)
            : copy_rows<std::uint16_t>(call, begin, end);
  });
  return {};
}

}  // namespace wanda_ext

// A 2:4 weight as values and metadata.
//
// Elements are their bits: -0.0 counts as zero and NaN as non-zero, whatever the floating-point
// mode. Each group of four is packed by masks alone, one group a vector lane:
//
//   low  = the first non-zero of columns 0 and 1, else column 2
//   high = column 1 where columns 0 and 1 are non-zero, column 2 where it and one before it are,
//          else column 3 (a group with three non-zeros is not packed)
#include "core/check_args.h"
#include "core/check_packed.h"
#include "parallel_chunks.h"
#include "scores.h"
#include "simd.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

constexpr std::int64_t kGroupsPerBlock = 256;
constexpr std::uint16_t kZerosMeta = 0xeeee;  // columns 2 and 3 of every group

template <typename Bits>
WANDA_EXT_INLINE Bits mask_of_nonzero(Bits bits) {
  return static_cast<Bits>(0 - static_cast<Bits>(static_cast<Bits>(bits << 1) != 0));
}

// Packs `groups` groups, a multiple of four; returns whether one has more than two non-zeros.
template <typename Bits>
WANDA_EXT_INLINE bool pack_block(const Bits* weight, std::int64_t groups, Bits* values,
                                 std::uint16_t* meta) {
  Bits nibbles[kGroupsPerBlock];
  Bits overfull = 0;
  for (std::int64_t g = 0; g < groups; ++g) {
    const Bits a = weight[4 * g], b = weight[4 * g + 1];
    const Bits c = weight[4 * g + 2], d = weight[4 * g + 3];
    const Bits has_a = mask_of_nonzero(a), has_b = mask_of_nonzero(b);
    const Bits has_c = mask_of_nonzero(c), has_d = mask_of_nonzero(d);
    const Bits low_b = ~has_a & has_b;
    const Bits low_c = ~has_a & ~has_b;
    const Bits high_b = has_a & has_b;
    const Bits high_c = has_c & (has_a | has_b);
    const Bits high_d = ~(high_b | high_c);
    values[2 * g] = (has_a & a) | (low_b & b) | (low_c & has_c & c);
    values[2 * g + 1] = (high_b & b) | (high_c & c) | (high_d & has_d & d);
    nibbles[g] = (low_b & 1) | (low_c & 2) | (high_b & 4) | (high_c & 8) | (high_d & 12);
    overfull |= (high_b & (has_c | has_d)) | (high_c & has_d);
  }
  for (std::int64_t i = 0; i < groups / 4; ++i) {
    meta[i] = static_cast<std::uint16_t>(nibbles[4 * i] | nibbles[4 * i + 1] << 4 |
                                         nibbles[4 * i + 2] << 8 | nibbles[4 * i + 3] << 12);
  }
  return overfull != 0;
}

// Returns the first bad row of [begin, end), or end.
template <typename Bits>
WANDA_EXT_INLINE std::int64_t pack_range(const ConstMatrixView& weight, Bits* values,
                                         std::uint16_t* meta, std::int64_t begin,
                                         std::int64_t end) {
  const std::int64_t groups = weight.cols / 4;
  std::int64_t first_bad = end;
  for (std::int64_t r = begin; r < end; ++r) {
    const Bits* row = static_cast<const Bits*>(weight.data) + r * weight.ld;
    Bits* row_values = values + r * groups * 2;
    std::uint16_t* row_meta = meta + r * (groups / 4);
    bool overfull = false;
    for (std::int64_t first = 0; first < groups; first += kGroupsPerBlock) {
      const std::int64_t rest = groups - first;
      overfull |= pack_block(row + 4 * first, rest < kGroupsPerBlock ? rest : kGroupsPerBlock,
                             row_values + 2 * first, row_meta + first / 4);
    }
    if (!overfull) continue;
    for (std::int64_t i = 0; i < groups * 2; ++i) row_values[i] = 0;
    for (std::int64_t i = 0; i < groups / 4; ++i) row_meta[i] = kZerosMeta;
    first_bad = r < first_bad ? r : first_bad;
  }
  return first_bad;
}

WANDA_EXT_CLONES std::int64_t pack_range_any(const ConstMatrixView& weight, void* values,
                                             std::uint16_t* meta, std::int64_t begin,
                                             std::int64_t end) {
  if (weight.dtype == DType::kFloat32) {
    return pack_range(weight, static_cast<std::uint32_t*>(values), meta, begin, end);
  }
  return pack_range(weight, static_cast<std::uint16_t*>(values), meta, begin, end);
}

}  // namespace

Status pack_24(ConstMatrixView weight, void* values, std::int16_t* meta, std::int32_t* bad,
               const ParallelFor& parallel) {
  if (Status status = check_matrix("pack_24", "weight", weight); !status.ok()) return status;
  if (Status status = check_packed("pack_24", values, meta, weight.rows, weight.cols);
      !status.ok()) {
    return status;
  }
  FirstBadRow first_bad;
  const std::int64_t rows = weight.cols == 0 ? 0 : weight.rows;
  for_each_range(parallel, rows, 1, [&](std::int64_t begin, std::int64_t end, std::int64_t) {
    const std::int64_t row =
        pack_range_any(weight, values, reinterpret_cast<std::uint16_t*>(meta), begin, end);
    if (row < end) first_bad.report(row);
  });
  if (bad != nullptr) *bad = first_bad.row();
  return {};
}

}  // namespace wanda_ext

// Records by AMX: bf16 of more than one token; all else is as in records_avx512_bf16.cpp.
//
// y^T = W x^T, 16 rows by 16 tokens a tile: W's side takes records as AVX-512 expands them, row by
// row; x's side, pairs of columns of 16 tokens, is made once. A tile of y adds up its products
// column by column, from 0 on.
#include <type_traits>

#include "dtype.h"
#include "records.h"
#include "simd.h"

#if defined(WANDA_EXT_X86_FILES) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "intrinsics.h"
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2")
#pragma GCC target("avx512bf16,amx-tile,amx-bf16")
#include "records_avx512.h"

namespace wanda_ext {
namespace {

using Lanes = Avx512Lanes<BFloat16>;

constexpr int kTile = 16;  // rows of W, and tokens, of a tile of y
constexpr int kTileBytes = 64;
constexpr std::int64_t kStepsPerPanel = 2;
constexpr std::int64_t kPanelBytes = kStepsPerPanel * kRecordsPerStep * kTile * kTileBytes;
constexpr int kTokenTiles = kTokensPerBlock / kTile;

bool takes(DType dtype, std::int64_t m) { return dtype == DType::kBFloat16 && m > 1; }

std::int64_t token_tiles(std::int64_t m) { return (m + kTile - 1) / kTile; }

std::size_t prepared_bytes(DType dtype, std::int64_t m, std::int64_t k) {
  const std::int64_t tokens = takes(dtype, m) ? token_tiles(m) * kTile : m;
  return avx512_bf16_kernels()->prepared_bytes(dtype, tokens, k);
}

std::size_t panel_bytes(DType dtype, std::int64_t m, std::int64_t k) {
  return takes(dtype, m) ? kPanelBytes : avx512_bf16_kernels()->panel_bytes(dtype, m, k);
}

// [token tile][record][pair of columns][token]: of what is no token or column, zeros.
void prepare_x(const RecordProduct& product, std::int64_t block) {
  if (!takes(product.x.dtype, product.x.rows)) {
    return avx512_bf16_kernels()->prepare_x(product, block);
  }
  const std::int64_t columns = padded_columns(product.x.cols);
  auto* to = static_cast<std::uint32_t*>(product.prepared) + block * columns / 2 * kTile;
  std::memset(to, 0, static_cast<std::size_t>(columns / 2 * kTile) * sizeof(*to));
  const std::int64_t tokens = std::min<std::int64_t>(kTile, product.x.rows - block * kTile);
  const auto* x = static_cast<const BFloat16*>(product.x.data) + block * kTile * product.x.ld;
  for (std::int64_t c = 0; c < product.x.cols; c += 2, to += kTile) {
    const std::size_t bytes = c + 1 < product.x.cols ? 4 : 2;
    for (std::int64_t t = 0; t < tokens; ++t) std::memcpy(to + t, x + t * product.x.ld + c, bytes);
  }
}

// Rows that lie a power of two apart displace each other in the cache: so many go side by side.
constexpr int kRowsAtOnce = 8;

// Rows [row, row + kRowsAtOnce) of a step: [record][row], the 32 columns of a record.
template <RecordFormat kFormat, bool kSure>
WANDA_EXT_INLINE void expand_step(Rows<Lanes, kFormat, kTile>& rows, int row, std::int64_t step,
                                  Step<BFloat16> (&steps)[kRowsAtOnce], std::uint8_t* panel) {
#pragma GCC unroll 8
  for (int r = 0; r < kRowsAtOnce; ++r) {
    const BFloat16* values = rows.template next<kSure>(row + r, step, steps[r]);
#pragma GCC unroll 4
    for (int record = 0; record < kRecordsPerStep; ++record) {
      auto* to = reinterpret_cast<BFloat16*>(panel + (record * kTile + row + r) * kTileBytes);
      Lanes::spread<kFormat>(values, steps[r].masks[record], to);
      values = next_record<kFormat>(values, steps[r].masks[record]);
    }
  }
}

// Steps [first, end) of 16 rows.
template <RecordFormat kFormat>
WANDA_EXT_INLINE void expand_panel(Rows<Lanes, kFormat, kTile>& rows, std::int64_t first,
                                   std::int64_t end, Step<BFloat16> (&steps)[kRowsAtOnce],
                                   std::uint8_t* panel) {
  constexpr std::int64_t kStepBytes = kRecordsPerStep * kTile * kTileBytes;
  for (int row = 0; row < kTile; row += kRowsAtOnce) {
    for (std::int64_t step = first; step < end; ++step) {
      std::uint8_t* to = panel + (step - first) * kStepBytes;
      if (step < rows.sure_steps()) {
        expand_step<kFormat, true>(rows, row, step, steps, to);
      } else {
        expand_step<kFormat, false>(rows, row, step, steps, to);
      }
    }
  }
}

struct TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t bytes[16] = {};
  std::uint8_t rows[16] = {};

  TileConfig() {
    for (int tile = 0; tile < 8; ++tile) bytes[tile] = kTileBytes, rows[tile] = kTile;
  }
};

// Tiles 0 to 3 are of y, 4 is of W, 5 of x.
template <int kTokens>
WANDA_EXT_INLINE void multiply_record(const std::uint8_t* w, const std::uint8_t* x,
                                      std::int64_t x_tile) {
  _tile_loadd(4, w, kTileBytes);
  _tile_loadd(5, x, kTileBytes);
  _tile_dpbf16ps(0, 4, 5);
  if constexpr (kTokens > 1) {
    _tile_loadd(6, x + x_tile, kTileBytes);
    _tile_dpbf16ps(1, 4, 6);
  }
  if constexpr (kTokens > 2) {
    _tile_loadd(5, x + 2 * x_tile, kTileBytes);
    _tile_dpbf16ps(2, 4, 5);
  }
  if constexpr (kTokens > 3) {
    _tile_loadd(6, x + 3 * x_tile, kTileBytes);
    _tile_dpbf16ps(3, 4, 6);
  }
}

template <RecordFormat kFormat, int kTokens>
WANDA_EXT_INLINE void multiply_tiles(const RecordProduct& product, std::int64_t row,
                                     std::uint8_t* panel) {
  Rows<Lanes, kFormat, kTile> rows(product.weight, row);
  Step<BFloat16> expanded[kRowsAtOnce];
  const std::int64_t steps = steps_of(product.x.cols);
  constexpr std::int64_t kRecordBytes = kTile * kTileBytes;
  const std::int64_t x_tile = steps * kRecordsPerStep * kRecordBytes;
  const auto* x = static_cast<const std::uint8_t*>(product.prepared);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t first = 0; first < steps; first += kStepsPerPanel) {
    const std::int64_t some = std::min(kStepsPerPanel, steps - first);
    expand_panel<kFormat>(rows, first, first + some, expanded, panel);
    for (std::int64_t i = 0; i < some * kRecordsPerStep; ++i, x += kRecordBytes) {
      multiply_record<kTokens>(panel + i * kRecordBytes, x, x_tile);
    }
  }
  alignas(64) float sums[kTokenTiles][kTile][kTile];  // [row][token] each
  _tile_stored(0, sums[0], kTileBytes);
  _tile_stored(1, sums[1], kTileBytes);
  _tile_stored(2, sums[2], kTileBytes);
  _tile_stored(3, sums[3], kTileBytes);
  for (std::int64_t t = 0; t < product.x.rows; ++t) {
    for (int r = 0; r < kTile; ++r) {
      write<BFloat16>(product, t, row + r, sums[t / kTile][r][t % kTile]);
    }
  }
}

template <RecordFormat kFormat>
void multiply_rows(const RecordProduct& product, std::int64_t begin, std::int64_t end,
                   std::uint8_t* panel) {
  static_assert(kTokenTiles == 4 && kRowsPerRange == kTile);
  const TileConfig config;
  _tile_loadconfig(&config);
  for (std::int64_t row = begin; row < end; row += kTile) {
    switch (token_tiles(product.x.rows)) {
      case 1:
        multiply_tiles<kFormat, 1>(product, row, panel);
        break;
      case 2:
        multiply_tiles<kFormat, 2>(product, row, panel);
        break;
      case 3:
        multiply_tiles<kFormat, 3>(product, row, panel);
        break;
      default:
        multiply_tiles<kFormat, 4>(product, row, panel);
    }
  }
  _tile_release();
}

void multiply(const RecordProduct& product, std::int64_t begin, std::int64_t end, void* panel) {
  if (!takes(product.x.dtype, product.x.rows)) {
    return avx512_bf16_kernels()->multiply(product, begin, end, panel);
  }
  auto* bytes = static_cast<std::uint8_t*>(panel);
  switch (product.weight.format) {
    case RecordFormat::k24:
      return multiply_rows<RecordFormat::k24>(product, begin, end, bytes);
    case RecordFormat::kBitmap:
      return multiply_rows<RecordFormat::kBitmap>(product, begin, end, bytes);
    default:
      return multiply_rows<RecordFormat::kStream>(product, begin, end, bytes);
  }
}

}  // namespace
}  // namespace wanda_ext
#pragma GCC pop_options

namespace wanda_ext {
namespace {

// The processor has tiles, and Linux lets this process use them.
bool has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTiles)) != (kBf16 | kTiles)) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

const RecordKernels* amx_kernels() {
  static const bool found = avx512_bf16_kernels() != nullptr && has_tiles();
  if (!found) return nullptr;
  static const RecordKernels kernels = {"amx",     prepared_bytes, panel_bytes,
                                        prepare_x, multiply,       avx512_bf16_kernels()->unpack};
  return &kernels;
}

}  // namespace wanda_ext
#else
const wanda_ext::RecordKernels* wanda_ext::amx_kernels() { return nullptr; }
#endif

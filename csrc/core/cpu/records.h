// W as records of 32 columns, a mask and its values each: what linear_24, linear_bitmap,
// linear_stream and their unpack_* share on the CPU.
//
// A format says where the masks and values of a row lie (record_rows.h); an instruction set, how a
// record becomes 32 columns in registers (records_<set>.cpp); record_kernels.h makes kernels of
// both. Which kernel runs depends on the instruction set, the dtype and m.
#pragma once

#include <cstddef>
#include <cstdint>

#include "wanda_ext/ops.h"

namespace wanda_ext {

enum class RecordFormat { k24, kBitmap, kStream };

// A packed weight of n rows and k columns.
struct RecordWeight {
  RecordFormat format;
  DType dtype;
  std::int64_t n;
  std::int64_t k;
  const void* values;
  std::int64_t count;                       // of values
  const void* masks;                        // of k24: its metadata
  MetaOrder order = MetaOrder::kCanonical;  // of k24
  const std::int64_t* offsets = nullptr;    // of kStream
  Surplus surplus = {};                     // of kBitmap
};

inline RecordWeight bitmap_records(DType dtype, std::int64_t n, std::int64_t k, const void* values,
                                   const std::int32_t* mask, const Surplus& surplus) {
  const std::int64_t tiles = bitmap_row_tiles(n) * bitmap_column_tiles(k);
  RecordWeight weight = {RecordFormat::kBitmap,     dtype, n, k, values,
                         tiles * kBitmapTileValues, mask};
  weight.surplus = surplus;
  return weight;
}

inline RecordWeight stream_records(DType dtype, std::int64_t n, std::int64_t k,
                                   const Stream& stream) {
  RecordWeight weight = {RecordFormat::kStream, dtype,        n,          k,
                         stream.values,         stream.count, stream.mask};
  weight.offsets = stream.offsets;
  return weight;
}

// Kernels take four records of a row at a time; x is padded with zeros to whole steps.
constexpr int kRecordsPerStep = 4;
constexpr int kColumnsPerStep = kRecordsPerStep * kRecordColumns;

constexpr std::int64_t steps_of(std::int64_t k) {
  return (k + kColumnsPerStep - 1) / kColumnsPerStep;
}
constexpr std::int64_t padded_columns(std::int64_t k) { return steps_of(k) * kColumnsPerStep; }

constexpr std::int64_t kRowsPerRange = 16;    // threads get multiples of it, as does linear_amx
constexpr std::int64_t kFewTokens = 4;        // up to these, what is expanded stays in registers
constexpr std::int64_t kTokensPerBlock = 64;  // more are computed so many at a time

// y [m,n] = x [m,k] @ W^T (+ bias [n]), m <= kTokensPerBlock.
struct RecordProduct {
  const RecordWeight& weight;
  ConstMatrixView x;
  const void* bias;
  MatrixView y;
  void* prepared;  // x as the kernels read it: written by prepare_x
};

// The kernels of one instruction set.
struct RecordKernels {
  const char* name;
  // Bytes of `prepared`, and of a thread's `panel`.
  std::size_t (*prepared_bytes)(DType dtype, std::int64_t m, std::int64_t k);
  std::size_t (*panel_bytes)(DType dtype, std::int64_t m, std::int64_t k);
  // Tokens [16 * block, 16 * block + 16), as many as there are.
  void (*prepare_x)(const RecordProduct& product, std::int64_t block);
  // Rows [begin, end), for all tokens.
  void (*multiply)(const RecordProduct& product, std::int64_t begin, std::int64_t end, void* panel);
  // Rows [begin, end) of W to those of `dense`.
  void (*unpack)(const RecordWeight& weight, std::int64_t begin, std::int64_t end,
                 const MatrixView& dense);
};

// In the order in which they are tried, the fastest first: null where this build or processor lacks
// the instructions.
const RecordKernels* amx_kernels();
const RecordKernels* avx512_bf16_kernels();
const RecordKernels* avx512_kernels();
const RecordKernels* avx2_kernels();
const RecordKernels* plain_kernels();

// Those in use: use_cpu_kernels in ops.h.
const RecordKernels& record_kernels();

// --- What an op does with a weight whose arguments it has checked ---

std::size_t multiply_records_workspace(std::int64_t m, std::int64_t k, int threads);
Status multiply_records(const char* op, const RecordWeight& weight, ConstMatrixView x,
                        const void* bias, MatrixView y, void* workspace,
                        const ParallelFor& parallel);
void unpack_records(const RecordWeight& weight, const MatrixView& dense,
                    const ParallelFor& parallel);

}  // namespace wanda_ext

// Where the masks and values of a row lie, in each format: a step of four records at a time, the
// values of the lowest column first. Included into a file of one instruction set, after its target
// is set: all that is here belongs to that file alone.
#pragma once

#include <algorithm>
#include <cstring>

#include "dtype.h"
#include "records.h"
#include "simd.h"

namespace wanda_ext {
namespace {

// A step has up to 128 values, and kernels read as many as a record has columns from each of them
// on. Whatever the masks are, they lead no further.
constexpr int kStepRoom = kColumnsPerStep + kRecordColumns;

// Rows go side by side, so the end of one comes long after the start of the next. What comes next
// is the same step of the rows after them; the last steps of a row ask for the first ones of these.
constexpr int kStepsAhead = 8;
constexpr int kStepBytesAhead = 128;  // of values: about as many as a step has
constexpr int kTilesAhead = 4;

// Of one row: the masks of a step, and its values where they do not lie so in the weight.
template <typename T>
struct Step {
  std::uint32_t masks[kRecordsPerStep];
  alignas(64) T own[kStepRoom] = {};
};

// In these formats a record has room for 16 values; in a stream, for as many as its mask has bits.
constexpr bool has_room_for_16(RecordFormat format) { return format != RecordFormat::kStream; }

// Where the next record's values are.
template <RecordFormat kFormat, typename T>
WANDA_EXT_INLINE const T* next_record(const T* values, std::uint32_t mask) {
  return values + (has_room_for_16(kFormat) ? kRecordValues : count_bits(mask));
}

// A copy of `rest` values at the end of a weight, if there are that many, with room behind it.
template <typename T>
WANDA_EXT_INLINE const T* copy_last_values(const T* values, std::int64_t rest, T* own) {
  const std::int64_t some = std::clamp<std::int64_t>(rest, 0, kStepRoom);
  if (some > 0) std::memcpy(own, values, static_cast<std::size_t>(some) * sizeof(T));
  return own;
}

// values: of a step; then: of the first step of the row that comes after this one.
template <typename T>
WANDA_EXT_INLINE void prefetch_values(const T* values, const T* then, std::int64_t steps_left) {
  const char* ahead = reinterpret_cast<const char*>(values) + kStepsAhead * kStepBytesAhead;
  const char* next =
      reinterpret_cast<const char*>(then) + (kStepsAhead - steps_left) * kStepBytesAhead;
  ahead = steps_left > kStepsAhead ? ahead : next;
  __builtin_prefetch(ahead);
  __builtin_prefetch(ahead + 64);
}

// Rows [first, first + kRows) of a weight; past the last row comes the last one again. In steps
// [0, sure_steps) they are nowhere at an end, so that next<true> need not look.
template <class Lanes, RecordFormat kFormat, int kRows>
class Rows;

// --- 2:4: two values for each four columns; a nibble of metadata is their mask in other words ---

constexpr int kWordsPerStep = kColumnsPerStep / kColumnsPerMeta;
constexpr int kValuesPerWord = kColumnsPerMeta / 2;

struct NibbleMasks {
  std::uint8_t of_byte[256];  // of two nibbles; where their columns do not ascend, no bit is set

  constexpr NibbleMasks() : of_byte() {
    for (unsigned byte = 0; byte < 256; ++byte) {
      of_byte[byte] = static_cast<std::uint8_t>(mask(byte & 15) | mask(byte >> 4) << 4);
    }
  }
  static constexpr unsigned mask(unsigned nibble) {
    const unsigned low = nibble & 3, high = nibble >> 2;
    return low < high ? 1u << low | 1u << high : 0;
  }
};
constexpr NibbleMasks kNibbleMasks;

template <class Lanes, int kRows>
class Rows<Lanes, RecordFormat::k24, kRows> {
  using T = typename Lanes::Element;

 public:
  WANDA_EXT_INLINE Rows(const RecordWeight& weight, std::int64_t first)
      : weight_(weight), row_words_(weight.k / kColumnsPerMeta), steps_(steps_of(weight.k)) {
    for (int r = 0; r < kRows; ++r) {
      rows_[r] = std::min(first + r, weight.n - 1);
      words_[r] = static_cast<const std::uint16_t*>(weight.masks) + rows_[r] * row_words_;
      values_[r] = static_cast<const T*>(weight.values) + rows_[r] * row_words_ * kValuesPerWord;
    }
    const std::int64_t words_left = weight.n * row_words_ - rows_[kRows - 1] * row_words_;
    const std::int64_t sure_words = std::min(row_words_, words_left - kStepRoom / kValuesPerWord);
    const bool as_rows = weight.order == MetaOrder::kCanonical;
    sure_steps_ = as_rows && sure_words > 0 ? sure_words / kWordsPerStep : 0;
  }

  std::int64_t sure_steps() const { return sure_steps_; }

  template <bool kSure>
  WANDA_EXT_INLINE const T* next(int r, std::int64_t step, Step<T>& to) {
    const T* values = values_[r] + step * (kWordsPerStep * kValuesPerWord);
    if constexpr (kSure) {
      const std::uint16_t* words = words_[r] + step * kWordsPerStep;
      __builtin_prefetch(words + kRows * row_words_);
      Lanes::masks_24(words, to.masks);
      prefetch_values(values, values_[r] + kRows * row_words_ * kValuesPerWord, steps_ - step);
      return values;
    } else {
      std::uint16_t words[kWordsPerStep];
      gather_words(rows_[r], step * kWordsPerStep, words);
      Lanes::masks_24(words, to.masks);
      return copy_last_values(
          values, static_cast<const T*>(weight_.values) + weight_.count - values, to.own);
    }
  }

 private:
  // In any order; those past the row have no columns.
  void gather_words(std::int64_t row, std::int64_t first, std::uint16_t* words) const {
    const std::int64_t rows = padded_rows_24(weight_.order, weight_.n);
    const std::int64_t columns = padded_cols_24(weight_.order, weight_.k);
    for (std::int64_t i = 0; i < kWordsPerStep; ++i) {
      const bool inside = first + i < weight_.k / kColumnsPerMeta;
      words[i] =
          inside ? static_cast<const std::uint16_t*>(
                       weight_.masks)[meta_index_24(weight_.order, row, first + i, rows, columns)]
                 : 0;
    }
  }

  const RecordWeight& weight_;
  std::int64_t row_words_;
  std::int64_t steps_;
  std::int64_t rows_[kRows];
  const std::uint16_t* words_[kRows];
  const T* values_[kRows];
  std::int64_t sure_steps_;
};

// --- Bitmaps: tiles of 16 rows and one step, the values of the highest column first ---

template <class Lanes, int kRows>
class Rows<Lanes, RecordFormat::kBitmap, kRows> {
  using T = typename Lanes::Element;

 public:
  WANDA_EXT_INLINE Rows(const RecordWeight& weight, std::int64_t first)
      : row_(static_cast<int>(first % kBitmapTileRows)), steps_(steps_of(weight.k)) {
    const std::int64_t tile = first / kBitmapTileRows * steps_;
    values_ = static_cast<const T*>(weight.values) + tile * kBitmapTileValues;
    masks_ = static_cast<const std::uint32_t*>(weight.masks) + tile * kBitmapTileMasks;
  }

  std::int64_t sure_steps() const { return steps_; }  // tiles are whole

  template <bool kSure>
  WANDA_EXT_INLINE const T* next(int r, std::int64_t step, Step<T>& to) {
    const std::uint32_t* masks = masks_ + step * kBitmapTileMasks + bitmap_mask_index(row_ + r, 0);
    for (int i = 0; i < kRecordsPerStep; ++i) to.masks[i] = masks[2 * i];
    const T* high = values_ + step * kBitmapTileValues + bitmap_value_index(row_ + r, 0, 0);
    const T* low = high + bitmap_value_index(0, 0, 8);
    __builtin_prefetch(high + kTilesAhead * kBitmapTileValues);
    __builtin_prefetch(low + kTilesAhead * kBitmapTileValues);
    __builtin_prefetch(masks + kTilesAhead * kBitmapTileMasks);
    Lanes::ascending(high, low, to.own);
    return to.own;
  }

 private:
  int row_;
  std::int64_t steps_;
  const T* values_;
  const std::uint32_t* masks_;
};

// --- Streams: the values of a row one after the other, a bit for each column ---

template <class Lanes, int kRows>
class Rows<Lanes, RecordFormat::kStream, kRows> {
  using T = typename Lanes::Element;
  static constexpr std::int64_t kStepBytes = kColumnsPerStep / 8;

 public:
  WANDA_EXT_INLINE Rows(const RecordWeight& weight, std::int64_t first)
      : end_(static_cast<const T*>(weight.values) + weight.count),
        row_bytes_((weight.k + 7) / 8),
        steps_(steps_of(weight.k)) {
    const T* all = static_cast<const T*>(weight.values);
    bool sure = true;
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t row = std::min(first + r, weight.n - 1);
      values_[r] = all + weight.offsets[row];
      then_[r] = all + weight.offsets[std::min(first + r + kRows, weight.n)];
      masks_[r] = static_cast<const std::uint8_t*>(weight.masks) + row * row_bytes_;
      sure &= weight.offsets[row] + 8 * row_bytes_ + kStepRoom <= weight.count;
    }
    sure_steps_ = sure ? row_bytes_ / kStepBytes : 0;
  }

  std::int64_t sure_steps() const { return sure_steps_; }

  template <bool kSure>
  WANDA_EXT_INLINE const T* next(int r, std::int64_t step, Step<T>& to) {
    const std::uint8_t* masks = masks_[r] + step * kStepBytes;
    const T* values = values_[r];
    if constexpr (kSure) {
      __builtin_prefetch(masks + kRows * row_bytes_);
      std::memcpy(to.masks, masks, kStepBytes);
      prefetch_values(values, then_[r], steps_ - step);
    } else {
      const std::int64_t bytes = std::min(kStepBytes, row_bytes_ - step * kStepBytes);
      std::memset(to.masks, 0, kStepBytes);
      std::memcpy(to.masks, masks, static_cast<std::size_t>(bytes));
    }
    for (int i = 0; i < kRecordsPerStep; ++i) values_[r] += count_bits(to.masks[i]);
    return kSure ? values : copy_last_values(values, end_ - values, to.own);
  }

 private:
  const T* end_;
  std::int64_t row_bytes_;
  std::int64_t steps_;
  const T* values_[kRows];  // of the next step
  const T* then_[kRows];
  const std::uint8_t* masks_[kRows];
  std::int64_t sure_steps_;
};

}  // namespace
}  // namespace wanda_ext

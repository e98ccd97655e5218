// Keys side by side: what turns products of rows and keys into products of numbers and vectors.
//
// A panel holds as many keys as a vector has lanes, dimension by dimension. A tile of rows and
// panels then takes one vector load per panel and one broadcast per row for each dimension, and no
// row is padded, be there one of them or hundreds. A logit is summed over the dimensions in the
// same order in tiles of every size, so its bits depend on its row and its key alone.
#pragma once

#include <type_traits>

#include "tiles.h"
#include "types.h"

namespace lvspec::LVSPEC_ARCH {

constexpr int64_t kKeyBlock = 96;    // keys that are packed at a time: whole tiles
constexpr int64_t kSummedDims = 64;  // sums of sums: rounding grows with the longest chain of them

// A block of keys of one head, or of its values.
template <class A>
struct KeyBlock {
  int64_t head_dim, padded_dim;  // padded to whole vectors
  int64_t widened_stride;
  A* panels;   // [kKeyBlock / kLanes][padded_dim][kLanes]
  A* widened;  // [kKeyBlock][widened_stride], where the cache's rows cannot be used as they are

  explicit KeyBlock(int64_t dim) : head_dim(dim) {
    padded_dim = (dim + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
    // Not a power of two, else the rows' beginnings would share a few sets of the first cache.
    widened_stride = padded_dim + kLanes<A>;
  }
  int64_t size() const { return kKeyBlock * (padded_dim + widened_stride); }
  A* carve(A* memory) {
    panels = memory;
    widened = panels + kKeyBlock * padded_dim;
    return memory + size();
  }
};

// Keys to t.panels, the last of which is filled up with its first key.
// Stored is A, or bf16, of which a word of A's size holds two: they go through the squares together.
template <class A, class Stored>
static void pack_keys(const KeyBlock<A>& t, const Stored* const* key_rows, int64_t count) {
  constexpr int64_t lanes = kLanes<A>, size = kPieceLanes<A>, numbers = sizeof(A) / sizeof(Stored);
  for (int64_t first = 0; first < count; first += lanes) {
    const A* rows[lanes];
    for (int64_t i = 0; i < lanes; ++i)
      rows[i] = reinterpret_cast<const A*>(key_rows[first + i < count ? first + i : first]);
    A* to = t.panels + first * t.padded_dim;
    for (int64_t word = 0; word * numbers < t.head_dim; word += size) {
      Vec<A> square[size];
      for (int64_t i = 0; i < size; ++i) square[i] = load_pieces<A>(rows + i, size, word);
      transpose_pieces<A>(square);
      for (int64_t i = 0; i < size; ++i, to += numbers * lanes) {
        if constexpr (numbers == 1) {
          store(to, square[i]);
        } else {
          Vec<uint32_t> words;
          std::memcpy(&words, &square[i], sizeof words);
          const Vec<uint32_t> even = words << 16, odd = words & 0xffff0000u;
          std::memcpy(to, &even, sizeof even);
          std::memcpy(to + lanes, &odd, sizeof odd);
        }
      }
    }
  }
}

// Rows of a cache as A, times the factor if there is one: where they stand if they can be read as
// they are, else copied to t.widened and filled up with zeros.
template <class A, class Stored>
static void widen_rows(const KeyBlock<A>& t, const Stored* const* from, int64_t stride,
                       int64_t count, const float* factor, const A** rows) {
  for (int64_t k = 0; k < count; ++k) {
    if constexpr (std::is_same_v<Stored, A>) {
      // Vectors are read past a row's end where head_dim is no multiple of them.
      if (stride == 1 && factor == nullptr && t.padded_dim == t.head_dim) {
        rows[k] = from[k];
        continue;
      }
    }
    A* to = t.widened + k * t.widened_stride;
    widen_row(from[k], stride, t.head_dim, to);
    if (factor != nullptr)
      for (int64_t d = 0; d < t.head_dim; ++d) to[d] *= A(*factor);
    for (int64_t d = t.head_dim; d < t.padded_dim; ++d) to[d] = A(0);
    rows[k] = to;
  }
}

// Keys of a cache, times the factor if there is one, to t.panels.
template <class A, class Stored>
static void pack_rows(const KeyBlock<A>& t, const Stored* const* from, int64_t stride,
                      int64_t count, const float* factor) {
  // bf16 or A itself, in whole pieces: packed as they stand.
  if constexpr (std::is_same_v<Stored, A> || (std::is_same_v<Stored, bf16> && sizeof(A) == 4)) {
    if (stride == 1 && factor == nullptr && t.head_dim * sizeof(Stored) % kPieceBytes == 0)
      return pack_keys(t, from, count);
  }
  const A* rows[kKeyBlock];
  widen_rows(t, from, stride, count, factor, rows);
  pack_keys(t, rows, count);
}

// sums = rows times panels, over some dimensions.
template <class A, int ROWS, int PANELS>
static inline void multiply_dims(const A* rows, int64_t row_stride, const A* panels,
                                 int64_t panel_stride, int64_t begin, int64_t end,
                                 Vec<A> (&sums)[ROWS][PANELS]) {
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PANELS; ++p) sums[r][p] = Vec<A>{};
  for (int64_t d = begin; d < end; ++d) {
    Vec<A> keys[PANELS];
    for (int p = 0; p < PANELS; ++p) keys[p] = load(panels + p * panel_stride + d * kLanes<A>);
    for (int r = 0; r < ROWS; ++r)
      for (int p = 0; p < PANELS; ++p) sums[r][p] += keys[p] * rows[r * row_stride + d];
  }
}

// logits = a tile of rows, which are t.head_dim apart, times a tile of panels.
template <class A, int ROWS, int PANELS>
static inline void multiply_panels(const KeyBlock<A>& t, const A* rows, int64_t first_panel,
                                   Vec<A> (&logits)[ROWS][PANELS]) {
  const int64_t size = t.padded_dim * kLanes<A>, dim = t.head_dim;
  const A* panels = t.panels + first_panel * size;
  int64_t end = dim < kSummedDims ? dim : kSummedDims;
  multiply_dims<A>(rows, dim, panels, size, 0, end, logits);
  while (end < dim) {
    const int64_t begin = end;
    end = begin + kSummedDims < dim ? begin + kSummedDims : dim;
    Vec<A> sums[ROWS][PANELS];
    multiply_dims<A>(rows, dim, panels, size, begin, end, sums);
    for (int r = 0; r < ROWS; ++r)
      for (int p = 0; p < PANELS; ++p) logits[r][p] += sums[r][p];
  }
}

}  // namespace lvspec::LVSPEC_ARCH

// Sizes of tiles as constants, so that what a tile adds up stays in registers.
#pragma once

#include "simd.h"

namespace lvspec::LVSPEC_ARCH {

template <int N>
struct Constant {
  static constexpr int value = N;
};

// f(Constant<n>), for n from 1 to N.
template <int N, class F>
static inline void with_constant(int64_t n, const F& f) {
  if constexpr (N > 1)
    if (n < N) return with_constant<N - 1>(n, f);
  f(Constant<N>{});
}

// f(first, Constant<n>) for as few tiles as [0, count) divides into where none is larger than N,
// all of them about as large as the others.
template <int N, class F>
static inline void for_tiles(int64_t count, const F& f) {
  int64_t first = 0;
  for (int64_t tiles = (count + N - 1) / N; tiles > 0; --tiles) {
    const int64_t size = (count - first + tiles - 1) / tiles;
    with_constant<N>(size, [&](auto n) { f(first, n); });
    first += size;
  }
}

}  // namespace lvspec::LVSPEC_ARCH

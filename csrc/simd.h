// Vectors of the compiler's own, as wide as the instruction set this file is compiled for.
//
// Every kernel header is compiled once per instruction set into a namespace of its own
// (LVSPEC_ARCH); which one runs is chosen when the library is loaded. Nothing here may be an inline
// function of the standard library: the linker keeps one copy of those, perhaps the one with
// instructions that this processor does not have.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifndef LVSPEC_ARCH
#error "compile csrc/arch_*.cpp, which say for which instruction set"
#endif

#if defined(__AVX512F__)
#include <immintrin.h>
#define LVSPEC_VECTOR_BYTES 64
#elif defined(__AVX2__)
#include <immintrin.h>
#define LVSPEC_VECTOR_BYTES 32
#else
#define LVSPEC_VECTOR_BYTES 16
#endif

// Before a loop over an array of vectors, so that the array is kept in registers.
#if defined(__clang__)
#define LVSPEC_UNROLL _Pragma("unroll")
#else
#define LVSPEC_UNROLL _Pragma("GCC unroll 16")
#endif

namespace lvspec::LVSPEC_ARCH {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(LVSPEC_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kLanes = LVSPEC_VECTOR_BYTES / sizeof(T);

template <class T>
static inline Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
static inline void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof v);
}

template <class T>
static inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // minus, not plus: -0.0 + 0.0 is 0.0
}

template <class T>
static inline T sum_lanes(Vec<T> v) {
  // Halves onto halves: a fixed order, whatever the compiler makes of it.
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// Lane l of the result is a lane of `a` and its neighbour STEP lanes away, added up, where l has
// the bit STEP not set, else the same of b. STEP is a power of 2.
template <int STEP, int... LANE>
static inline Vec<float> add_neighbours(Vec<float> a, Vec<float> b,
                                        std::integer_sequence<int, LANE...>) {
  constexpr int n = int(kLanes<float>);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (LANE & STEP ? LANE + n : LANE)...) +
         __builtin_shufflevector(a, b, (LANE & STEP ? LANE + n - STEP : LANE + STEP)...);
#else
  using Ints = Vec<int32_t>;
  return __builtin_shuffle(a, b, Ints{(LANE & STEP ? LANE + n : LANE)...}) +
         __builtin_shuffle(a, b, Ints{(LANE & STEP ? LANE + n - STEP : LANE + STEP)...});
#endif
}

template <int STEP>
static inline Vec<float> add_neighbours(Vec<float> a, Vec<float> b) {
  return add_neighbours<STEP>(a, b, std::make_integer_sequence<int, int(kLanes<float>)>{});
}

// Of as many vectors as there are lanes, pairs of which have been through add_neighbours<1>: lane l
// is the sum of all lanes of the l-th, added up in a fixed order.
template <int STEP = 2>
static inline Vec<float> sum_lanes_of_pairs(const Vec<float>* v) {
  if constexpr (STEP == kLanes<float>) {
    return v[0];
  } else {
    constexpr int count = int(kLanes<float>) / STEP / 2;
    Vec<float> sums[count];
    LVSPEC_UNROLL
    for (int i = 0; i < count; ++i) sums[i] = add_neighbours<STEP>(v[2 * i], v[2 * i + 1]);
    return sum_lanes_of_pairs<2 * STEP>(sums);
  }
}

// The first `count` lanes, perhaps all of them; the others are 0.
static inline Vec<float> load_first(const float* from, int64_t count) {
  if (count >= kLanes<float>) return load(from);
  Vec<float> v{};
  std::memcpy(&v, from, size_t(count) * sizeof(float));
  return v;
}

static inline void store_first(float* to, Vec<float> v, int64_t count) {
  if (count >= kLanes<float>)
    store(to, v);
  else
    std::memcpy(to, &v, size_t(count) * sizeof(float));
}

template <class T>
static inline T max_lanes(Vec<T> v) {
  T best = v[0];
  for (int64_t i = 1; i < kLanes<T>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

constexpr int64_t kPieceBytes = 16;  // of which every vector has a whole number
template <class T>
constexpr int64_t kPieceLanes = kPieceBytes / sizeof(T);

// A vector of pieces from different places: those at from[0], from[step], from[2 * step] ...
template <class T>
static inline Vec<T> load_pieces(const T* const* from, int64_t step, int64_t offset) {
  const auto piece = [&](int64_t i) {
    typedef float Piece __attribute__((vector_size(kPieceBytes)));
    Piece loaded;
    std::memcpy(&loaded, from[i * step] + offset, sizeof loaded);
    return loaded;
  };
#if LVSPEC_VECTOR_BYTES == 64
  __m512 joined = _mm512_castps128_ps512(piece(0));
  joined = _mm512_insertf32x4(joined, piece(1), 1);
  joined = _mm512_insertf32x4(joined, piece(2), 2);
  joined = _mm512_insertf32x4(joined, piece(3), 3);
#elif LVSPEC_VECTOR_BYTES == 32
  const __m256 joined = _mm256_insertf128_ps(_mm256_castps128_ps256(piece(0)), piece(1), 1);
#else
  const auto joined = piece(0);
#endif
  Vec<T> v;
  std::memcpy(&v, &joined, sizeof v);
  return v;
}

// In every piece, the numbers of a's and b's first halves in turn (a0 b0 a1 b1), or the second's.
template <class T, int HALF>
static inline Vec<T> interleave(Vec<T> a, Vec<T> b) {
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index;
  constexpr Index lanes = kLanes<T>, piece = kPieceLanes<T>;
  constexpr auto source = [](Index i) {
    return i / piece * piece + HALF * piece / 2 + i % piece / 2 + i % 2 * lanes;
  };
#if defined(__clang__)
  return [&]<Index... I>(std::integer_sequence<Index, I...>) {
    return __builtin_shufflevector(a, b, source(I)...);
  }(std::make_integer_sequence<Index, lanes>{});
#else
  Vec<Index> order;
  for (Index i = 0; i < lanes; ++i) order[i] = source(i);
  return __builtin_shuffle(a, b, order);
#endif
}

// In every piece by itself, rows[i][j] and rows[j][i] change places.
template <class T>
static inline void transpose_pieces(Vec<T> (&rows)[kPieceLanes<T>]) {
  constexpr int64_t size = kPieceLanes<T>;
  for (int64_t step = 1; step < size; step *= 2) {
    Vec<T> next[size];
    for (int64_t i = 0; i < size / 2; ++i) {
      next[2 * i] = interleave<T, 0>(rows[i], rows[i + size / 2]);
      next[2 * i + 1] = interleave<T, 1>(rows[i], rows[i + size / 2]);
    }
    for (int64_t i = 0; i < size; ++i) rows[i] = next[i];
  }
}

// The largest lane, where none is NaN.
template <class T>
static inline T highest_lane(Vec<T> v) {
  typedef T Piece __attribute__((vector_size(kPieceBytes)));
  constexpr int64_t count = LVSPEC_VECTOR_BYTES / kPieceBytes;
  Piece pieces[count];
  std::memcpy(pieces, &v, sizeof v);
  for (int64_t i = 1; i < count; ++i) pieces[0] = pieces[i] > pieces[0] ? pieces[i] : pieces[0];
  T best = pieces[0][0];
  for (int64_t i = 1; i < kPieceLanes<T>; ++i) best = pieces[0][i] > best ? pieces[0][i] : best;
  return best;
}

// a where it is larger or equal, else b: with NaN in a, b.
template <class T>
static inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a >= b ? a : b;
}

// exp for x <= 0 (and NaN): relative error below 2 ulp, 0 below -87.3. Cephes' polynomial on
// [-ln2/2, ln2/2], ln 2 in two parts.
static inline Vec<float> exp_nonpositive(Vec<float> x) {
  using Ints = Vec<int32_t>;
  const Vec<float> lowest = broadcast(-87.33654f);
  const Ints underflow = x < lowest;
  const Vec<float> bounded = underflow ? lowest : x;
  const Vec<float> shifter = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = bounded * 1.44269504f + shifter;
  const Vec<float> n = shifted - shifter;
  Vec<float> r = bounded - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec<float> y = p * r * r + r + 1.0f;
  // n's low bits are the low bits of `shifted`; unsigned, for a NaN may bring any bits.
  Vec<uint32_t> bits, value;
  std::memcpy(&bits, &shifted, sizeof bits);
  std::memcpy(&value, &y, sizeof value);
  value += bits << 23;
  Vec<float> result;
  std::memcpy(&result, &value, sizeof result);
  result = underflow ? Vec<float>{} : result;
  return x == x ? result : x;
}

static inline Vec<double> exp_nonpositive(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

}  // namespace lvspec::LVSPEC_ARCH

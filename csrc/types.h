// Numbers of the five types that tensors come in, as float or double and back.
#pragma once

#include <stdlib.h>

#include "kernels.h"
#include "simd.h"

namespace lvspec::LVSPEC_ARCH {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct f8_e4m3 {
  uint8_t bits;
};

static inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline double widen(double x) { return x; }
static inline float widen(float x) { return x; }
static inline float widen(bf16 x) { return as_float(uint32_t(x.bits) << 16); }

static inline float widen(f16 x) {
  // The exponent is moved up by 112; a multiplication does that for denormal numbers as well.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t finite = as_bits(as_float(magnitude) * as_float(0x77800000));  // 2^112
  return as_float(sign | (magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite));
}

static inline float widen(f8_e4m3 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7f) << 20;
  const uint32_t sign = uint32_t(x.bits & 0x80) << 24;
  const uint32_t finite = as_bits(as_float(magnitude) * as_float(0x7b800000));  // 2^120
  return as_float(sign | (magnitude == 0x07f00000 ? 0x7fc00000 : finite));  // no infinities
}

static inline void narrow(double x, double* to) { *to = x; }
static inline void narrow(float x, float* to) { *to = x; }

static inline void narrow(float x, bf16* to) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  to->bits = uint16_t(x != x ? 0x7fc0 : rounded >> 16);
}

static inline void narrow(float x, f16* to) {
  const uint32_t bits = as_bits(x), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {
    // Denormal: the addition rounds to a multiple of 2^-24, ties to even.
    half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  }
  to->bits = uint16_t(half | (bits >> 16 & 0x8000));
}

// Consecutive numbers as two vectors. Of 16-bit numbers every other one, so that none has to
// change its lane.
static inline void load_two(const float* from, Vec<float>* to) {
  to[0] = load(from);
  to[1] = load(from + kLanes<float>);
}

static inline void load_two(const double* from, Vec<double>* to) {
  to[0] = load(from);
  to[1] = load(from + kLanes<double>);
}

static inline Vec<float> as_floats(Vec<uint32_t> bits) {
  Vec<float> x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static inline void load_two(const bf16* from, Vec<float>* to) {
  Vec<uint32_t> bits;
  std::memcpy(&bits, from, sizeof bits);
  to[0] = as_floats(bits << 16);
  to[1] = as_floats(bits & 0xffff0000u);
}

static inline void load_two(const f16* from, Vec<float>* to) {
  Vec<uint32_t> bits;
  std::memcpy(&bits, from, sizeof bits);
  for (int half = 0; half < 2; ++half, bits = bits >> 16) {  // as widen(f16)
    const Vec<uint32_t> magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
    Vec<float> scaled = as_floats(magnitude) * as_float(0x77800000);
    Vec<uint32_t> finite;
    std::memcpy(&finite, &scaled, sizeof finite);
    to[half] = as_floats(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
  }
}

// The type in which numbers of type T are computed with: double for double, else float.
template <class T>
struct AccumulateOf {
  typedef float type;
};
template <>
struct AccumulateOf<double> {
  typedef double type;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

// `count` numbers, `stride` apart, to consecutive ones.
template <class T, class A>
static inline void widen_row(const T* from, int64_t stride, int64_t count, A* to) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = A(widen(from[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = A(widen(from[i * stride]));
  }
}

// Calls f with a null pointer to the C++ type that `type` names.
template <class F>
static inline void with_type(Type type, const F& f) {
  switch (type) {
    case Type::f32: f(static_cast<float*>(nullptr)); return;
    case Type::bf16: f(static_cast<bf16*>(nullptr)); return;
    case Type::f16: f(static_cast<f16*>(nullptr)); return;
    case Type::f64: f(static_cast<double*>(nullptr)); return;
    case Type::f8_e4m3: f(static_cast<f8_e4m3*>(nullptr)); return;
  }
}

// A buffer of a thread's own; grows and is kept, so that no call allocates after the first.
template <class T>
struct Scratch {
  T* data = nullptr;
  int64_t size = 0;
  T* get(int64_t count) {
    if (count > size) {
      ::free(data);
      void* memory = nullptr;
      if (::posix_memalign(&memory, 64, size_t(count) * sizeof(T)) != 0) ::abort();
      data = static_cast<T*>(memory);
      size = count;
    }
    return data;
  }
  ~Scratch() { ::free(data); }
};

}  // namespace lvspec::LVSPEC_ARCH

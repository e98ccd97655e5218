// Weights of matrix products in panels, as packed_linear reads them, in the fewest bytes in which
// every one of them is exact.
//
// A panel is two vectors of outputs, input by input: [panels][inputs][kPanel]. Lanes go along the
// outputs, so a product takes no sum across lanes. Half of an output's bytes are saved where float16
// or bfloat16 holds every weight exactly, as it does what was published in either and read as
// float32; the product is the same to the last bit.
#pragma once

#include "types.h"

namespace lvspec::LVSPEC_ARCH {

constexpr int64_t kPanel = 2 * kLanes<float>;
constexpr bool kWidensF16 = LVSPEC_VECTOR_BYTES > 16;  // with an instruction

// Two vectors of a panel, and where in a panel an output stands so that they are in order.
template <class W>
static inline void load_panel(const W* from, Vec<float>* to) {
  load_two(from, to);
}

template <class W>
constexpr int64_t place_in_panel(int64_t output) {
  return sizeof(W) == 4 ? output : output % kLanes<float> * 2 + output / kLanes<float>;
}

#if LVSPEC_VECTOR_BYTES > 16
static inline void load_panel(const f16* from, Vec<float>* to) {
  for (int half = 0; half < 2; ++half, from += kLanes<float>) {
#if LVSPEC_VECTOR_BYTES == 64
    // With a mask of all lanes: without one g++ warns of what its own header leaves undefined.
    const auto wide = _mm512_maskz_cvtph_ps(
        0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
    const auto wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
    std::memcpy(&to[half], &wide, sizeof wide);
  }
}

template <>
constexpr int64_t place_in_panel<f16>(int64_t output) {
  return output;
}
#endif

// Whether float16 and bfloat16 have the number that these bits are in float32. By its bits: numbers
// that float32 has only as denormal ones must not be lost where those are flushed to zero.
static inline bool is_f16(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffff, exponent = magnitude >> 23;
  if (exponent > 142) return false;                       // 65536 and more, and what is not finite
  if (exponent > 112) return (magnitude & 0x1fff) == 0;   // 2^-14 and more
  if (exponent < 103) return magnitude == 0;              // less than 2^-24
  return (magnitude & ((1u << (126 - exponent)) - 1)) == 0;
}

static inline bool is_bf16(uint32_t bits) {
  return (bits & 0xffff) == 0 && (bits & 0x7f800000) != 0x7f800000;
}

static void find_exact_range(int64_t begin, int64_t end, void* context) {
  const ExactTypes& a = *static_cast<const ExactTypes*>(context);
  constexpr int64_t block = 4096;  // after which it may be clear that neither is exact
  for (int64_t first = begin; first < end; first += block) {
    const uint8_t wanted = __atomic_load_n(a.types, __ATOMIC_RELAXED);
    if (wanted == 0) return;
    const int64_t last = end - first < block ? end : first + block;
    uint8_t found = wanted;
    for (int64_t i = first; i < last; ++i) {
      const uint32_t bits = as_bits(a.weight[i]);
      found &= uint8_t((is_f16(bits) ? kExactF16 : 0) | (is_bf16(bits) ? kExactBf16 : 0));
    }
    if (found != wanted) __atomic_fetch_and(a.types, found, __ATOMIC_RELAXED);
  }
}

static void find_exact_types(const ExactTypes& a) {
  a.parallel_for(a.count, 1 << 16, find_exact_range, const_cast<ExactTypes*>(&a));
}

template <class W>
static void pack_panels(const PackWeights& a, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    W* to = static_cast<W*>(a.packed) +
            (panel * a.panel_step + a.first_panel) * a.inputs * kPanel;
    const int64_t offset = panel * kPanel - a.first_output;  // in `weight`, of the panel's first
    const int64_t least = offset < 0 ? -offset : 0;
    const int64_t most = a.outputs - offset < kPanel ? a.outputs - offset : kPanel;
    for (int64_t i = 0; i < a.inputs; ++i, to += kPanel)
      for (int64_t o = least; o < most; ++o)
        narrow(a.weight[(offset + o) * a.inputs + i], to + place_in_panel<W>(o));
  }
}

static void pack_range(int64_t begin, int64_t end, void* context) {
  const PackWeights& a = *static_cast<const PackWeights*>(context);
  const int64_t skipped = a.first_output / kPanel;
  switch (a.type) {
    case Type::f16: return pack_panels<f16>(a, skipped + begin, skipped + end);
    case Type::bf16: return pack_panels<bf16>(a, skipped + begin, skipped + end);
    default: return pack_panels<float>(a, skipped + begin, skipped + end);
  }
}

static void pack_weights(const PackWeights& a) {
  const int64_t first = a.first_output / kPanel;
  const int64_t panels = (a.first_output + a.outputs + kPanel - 1) / kPanel - first;
  const int64_t grain = 1 + (1 << 16) / (a.inputs * kPanel + 1);
  a.parallel_for(panels, grain, pack_range, const_cast<PackWeights*>(&a));
}

}  // namespace lvspec::LVSPEC_ARCH

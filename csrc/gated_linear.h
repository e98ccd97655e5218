// gated_linear: silu(x G^T) * (x U^T), the first half of a gated MLP, for a few rows of x.
//
// silu_multiply is its end alone: silu(gate) * up of numbers that are there already.
#pragma once

#include "linear.h"

namespace lvspec::LVSPEC_ARCH {

static inline Vec<float> silu(Vec<float> x) {
  const Vec<float> e = exp_nonpositive(x < 0.0f ? x : -x);
  return x * (x < 0.0f ? e : Vec<float>{} + 1.0f) / (1.0f + e);
}

static void multiply_gated_range(int64_t begin, int64_t end, void* context) {
  const GatedLinear& a = *static_cast<const GatedLinear*>(context);
  constexpr int64_t lanes = kLanes<float>;
  static thread_local Scratch<float> scratch;
  const LinearRows rows(a.x, a.rows, a.inputs, scratch);
  LinearSums gates, ups;
  for (int64_t o = begin; o < end; o += lanes) {
    const int64_t outputs = end - o < lanes ? end - o : lanes;
    rows.for_each_group([&](const float* x, int64_t first, int64_t size) {
      multiply_block(x, size, a.gate + o * a.inputs, a.inputs, outputs, gates);
      multiply_block(x, size, a.up + o * a.inputs, a.inputs, outputs, ups);
      for (int64_t r = 0; r < size; ++r)
        store_first(a.y + (first + r) * a.outputs + o,
                    silu(sum_lanes_of_pairs(gates.of[r])) * sum_lanes_of_pairs(ups.of[r]), outputs);
    });
  }
}

static void gated_linear(const GatedLinear& a) {
  const int64_t grain = 1 + 50000 / (a.inputs + 1);  // as in linear, with two matrices
  a.parallel_for(a.outputs, grain, multiply_gated_range, const_cast<GatedLinear*>(&a));
}

static void silu_multiply(const SiluMultiply& a) {
  constexpr int64_t lanes = kLanes<float>;
  const auto range = [](int64_t begin, int64_t end, void* context) {
    const SiluMultiply& s = *static_cast<const SiluMultiply*>(context);
    for (int64_t i = begin; i < end; i += lanes)
      store_first(s.y + i, silu(load_first(s.gate + i, end - i)) * load_first(s.up + i, end - i),
                  end - i);
  };
  a.parallel_for(a.count, 1 << 15, range, const_cast<SiluMultiply*>(&a));
}

}  // namespace lvspec::LVSPEC_ARCH

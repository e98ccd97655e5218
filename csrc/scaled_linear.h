// scaled_linear: (x W^T) * scale + bias for a few rows of x, with weights of a byte each.
//
// The products of linear.h: W is read as it is and widened in registers, so that its bytes are what
// a pass waits for. Sums are float32, and a row's bits do not depend on the other rows.
#pragma once

#include "linear.h"

namespace lvspec::LVSPEC_ARCH {

// What all threads share of a call, as float32.
struct ScaledLinearRows {
  const ScaledLinear* call;
  const float *x, *scale, *bias;
};

template <class W, class T>
static void multiply_scaled_range(int64_t begin, int64_t end, void* context) {
  const ScaledLinearRows& shared = *static_cast<const ScaledLinearRows*>(context);
  const ScaledLinear& a = *shared.call;
  const W* weight = static_cast<const W*>(a.weight);
  T* y = static_cast<T*>(a.y);
  constexpr int64_t lanes = kLanes<float>;
  static thread_local Scratch<float> scratch;
  const LinearRows rows(shared.x, a.rows, a.inputs, scratch);
  LinearSums sums;
  for (int64_t o = begin; o < end; o += lanes) {
    const int64_t outputs = end - o < lanes ? end - o : lanes;
    const Vec<float> scale = load_first(shared.scale + o, outputs);
    const Vec<float> bias =
        shared.bias == nullptr ? Vec<float>{} : load_first(shared.bias + o, outputs);
    rows.for_each_group([&](const float* x, int64_t first, int64_t size) {
      multiply_block(x, size, weight + o * a.inputs, a.inputs, outputs, sums);
      for (int64_t r = 0; r < size; ++r) {
        const Vec<float> result = sum_lanes_of_pairs(sums.of[r]) * scale + bias;
        for (int64_t i = 0; i < outputs; ++i)
          narrow(float(result[i]), y + (first + r) * a.outputs + o + i);
      }
    });
  }
}

static const float* widened(const void* from, Type type, int64_t count, Scratch<float>& scratch) {
  if (type == Type::f32) return static_cast<const float*>(from);
  float* to = scratch.get(count);
  with_type(type, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    widen_row(static_cast<const T*>(from), 1, count, to);
  });
  return to;
}

static void scaled_linear(const ScaledLinear& a) {
  static thread_local Scratch<float> x, scale, bias;
  ScaledLinearRows shared{&a, widened(a.x, a.type, a.rows * a.inputs, x),
                          widened(a.scale, a.scale_type, a.outputs, scale), nullptr};
  if (a.bias != nullptr) shared.bias = widened(a.bias, a.bias_type, a.outputs, bias);
  void (*body)(int64_t, int64_t, void*) = nullptr;
  with_type(a.type, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    if constexpr (sizeof(T) == 2 || sizeof(T) == 4)
      body = a.is_float8 ? multiply_scaled_range<f8_e4m3, T> : multiply_scaled_range<int8_t, T>;
  });
  // About 20 microseconds of widening W at least before another thread is worth waking up.
  const int64_t grain = 1 + 100000 / (a.inputs + 1);
  a.parallel_for(a.outputs, grain, body, &shared);
}

}  // namespace lvspec::LVSPEC_ARCH

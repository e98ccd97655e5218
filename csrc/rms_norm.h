// rms_norm: rows over their root mean square, times a weight, in float32.
//
// A part of text models, see lvspec/models/plan.py and text_pass.h.
#pragma once

#include "types.h"

namespace lvspec::LVSPEC_ARCH {

static void normalize_rows(int64_t begin, int64_t end, void* context) {
  using V = Vec<float>;
  constexpr int64_t lanes = kLanes<float>;
  const RmsNorm& a = *static_cast<const RmsNorm*>(context);
  for (int64_t r = begin; r < end; ++r) {
    const float* x = a.x + r * a.size;
    float* y = a.y + r * a.size;
    V squares[2] = {};
    int64_t i = 0;
    for (; i + 2 * lanes <= a.size; i += 2 * lanes)
      for (int64_t part = 0; part < 2; ++part) {
        const V v = load(x + i + part * lanes);
        squares[part] += v * v;
      }
    for (; i < a.size; i += lanes) {
      const V v = load_first(x + i, a.size - i);
      squares[0] += v * v;
    }
    const float mean = sum_lanes<float>(squares[0] + squares[1]) / float(a.size);
    const float scale = 1.0f / ::sqrtf(mean + float(a.eps));
    for (i = 0; i < a.size; i += lanes) {
      const int64_t left = a.size - i;
      store_first(y + i, load_first(a.weight + i, left) * (load_first(x + i, left) * scale), left);
    }
  }
}

static void rms_norm(const RmsNorm& a) {
  a.parallel_for(a.rows, 1 + (1 << 16) / (a.size + 1), normalize_rows, const_cast<RmsNorm*>(&a));
}

}  // namespace lvspec::LVSPEC_ARCH

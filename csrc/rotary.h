// Rotary embeddings, in float32: rotary_angles makes cosines and sines of positions in one dimension or
// in three, rotate turns queries or keys by them.
#pragma once

#include "types.h"

namespace lvspec::LVSPEC_ARCH {

// Both halves of a row are the same.
static void rotary_angles(const RotaryAngles& a) {
  const auto range = [](int64_t begin, int64_t end, void* context) {
    const RotaryAngles& s = *static_cast<const RotaryAngles*>(context);
    const int64_t half = s.head_dim / 2;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t* positions = s.positions + row / s.num_slots * s.positions_stride[1] +
                                 row % s.num_slots * s.positions_stride[2];
      float *cos = s.cos + row * s.head_dim, *sin = s.sin + row * s.head_dim;
      for (int64_t d = 0; d < half; ++d) {
        const float position = float(positions[s.dimensions[d] * s.positions_stride[0]]);
        const float angle = position * s.frequencies[d];
        cos[d] = cos[half + d] = ::cosf(angle) * float(s.scaling);
        sin[d] = sin[half + d] = ::sinf(angle) * float(s.scaling);
      }
    }
  };
  a.parallel_for(a.batch_size * a.num_slots, 64, range, const_cast<RotaryAngles*>(&a));
}

static void rotate(const Rotate& a) {
  const auto range = [](int64_t begin, int64_t end, void* context) {
    const Rotate& s = *static_cast<const Rotate*>(context);
    const int64_t half = s.head_dim / 2;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t t = row % s.num_slots, h = row / s.num_slots % s.num_heads;
      const int64_t b = row / s.num_slots / s.num_heads;
      const float* x = s.x + b * s.x_stride[0] + h * s.x_stride[1] + t * s.x_stride[2];
      const float* cos = s.cos + (b * s.num_slots + t) * s.head_dim;
      const float* sin = s.sin + (b * s.num_slots + t) * s.head_dim;
      float* __restrict y = s.y + row * s.head_dim;
      for (int64_t d = 0; d < half; ++d) {
        y[d] = x[d] * cos[d] - x[half + d] * sin[d];
        y[half + d] = x[half + d] * cos[half + d] + x[d] * sin[half + d];
      }
    }
  };
  const int64_t rows = a.batch_size * a.num_heads * a.num_slots;
  a.parallel_for(rows, 1 + (1 << 15) / (a.head_dim + 1), range, const_cast<Rotate*>(&a));
}

}  // namespace lvspec::LVSPEC_ARCH

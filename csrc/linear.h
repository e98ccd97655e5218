// linear: x W^T + b for a few rows of x, in float32, at the speed at which W can be read.
//
// Not an operation of lvspec.ops: the models' own matrix products, in passes that are recorded (see
// lvspec/capture.py). Libraries made for large products lose half their speed on thirteen rows. The
// rows of x are the lanes of vectors, and W is read once, a dozen of its rows at a time; no sum goes
// across lanes, so a row of the result has the same bits however many there are.
#pragma once

#include "types.h"

namespace lvspec::LVSPEC_ARCH {

constexpr int64_t kLinearSums = 12;    // vectors of sums under way, as in verify_attention
constexpr int64_t kLinearChunk = 128;  // products added up by themselves before they are added on

template <int OUTPUTS, int VECTORS>
static inline void multiply_outputs(const float* x, int64_t padded, const float* weight,
                                    int64_t inputs, const float* bias, int64_t rows, float* y,
                                    int64_t outputs) {
  using V = Vec<float>;
  V sums[OUTPUTS][VECTORS];
  for (int o = 0; o < OUTPUTS; ++o)
    for (int v = 0; v < VECTORS; ++v) sums[o][v] = V{};
  for (int64_t begin = 0; begin < inputs; begin += kLinearChunk) {
    const int64_t end = begin + kLinearChunk < inputs ? begin + kLinearChunk : inputs;
    V part[OUTPUTS][VECTORS];
    for (int o = 0; o < OUTPUTS; ++o)
      for (int v = 0; v < VECTORS; ++v) part[o][v] = V{};
    for (int64_t i = begin; i < end; ++i) {
      V column[VECTORS];
      for (int v = 0; v < VECTORS; ++v) column[v] = load(x + i * padded + v * kLanes<float>);
      for (int o = 0; o < OUTPUTS; ++o)
        for (int v = 0; v < VECTORS; ++v) part[o][v] += column[v] * weight[o * inputs + i];
    }
    for (int o = 0; o < OUTPUTS; ++o)
      for (int v = 0; v < VECTORS; ++v) sums[o][v] += part[o][v];
  }
  for (int o = 0; o < OUTPUTS; ++o) {
    const float offset = bias == nullptr ? 0.0f : bias[o];
    for (int64_t r = 0; r < rows; ++r)
      y[r * outputs + o] = sums[o][r / kLanes<float>][r % kLanes<float>] + offset;
  }
}

// `rows` of x, at most VECTORS vectors of them, side by side in `x`.
template <int VECTORS>
static void multiply_panel(const Linear& a, const float* x, int64_t first_row, int64_t rows,
                           int64_t begin, int64_t end) {
  constexpr int tile = kLinearSums / VECTORS;
  const int64_t padded = VECTORS * kLanes<float>;
  float* y = a.y + first_row * a.outputs;
  int64_t o = begin;
  for (; o + tile <= end; o += tile)
    multiply_outputs<tile, VECTORS>(x, padded, a.weight + o * a.inputs, a.inputs,
                                    a.bias == nullptr ? nullptr : a.bias + o, rows, y + o,
                                    a.outputs);
  for (; o < end; ++o)
    multiply_outputs<1, VECTORS>(x, padded, a.weight + o * a.inputs, a.inputs,
                                 a.bias == nullptr ? nullptr : a.bias + o, rows, y + o, a.outputs);
}

static void multiply_range(int64_t begin, int64_t end, void* context) {
  const Linear& a = *static_cast<const Linear*>(context);
  constexpr int64_t lanes = kLanes<float>;
  static thread_local Scratch<float> scratch;
  for (int64_t first = 0; first < a.rows; first += 2 * lanes) {
    const int64_t rows = a.rows - first < 2 * lanes ? a.rows - first : 2 * lanes;
    const int64_t padded = rows <= lanes ? lanes : 2 * lanes;
    float* x = scratch.get(a.inputs * padded);
    for (int64_t r = 0; r < padded; ++r) {
      const float* from = a.x + (first + r) * a.inputs;
      for (int64_t i = 0; i < a.inputs; ++i) x[i * padded + r] = r < rows ? from[i] : 0.0f;
    }
    if (padded == lanes)
      multiply_panel<1>(a, x, first, rows, begin, end);
    else
      multiply_panel<2>(a, x, first, rows, begin, end);
  }
}

static void linear(const Linear& a) {
  // About 20 microseconds of reading W at least before another thread is worth waking up.
  const int64_t grain = 1 + 100000 / (a.inputs + 1);
  a.parallel_for(a.outputs, grain, multiply_range, const_cast<Linear*>(&a));
}

}  // namespace lvspec::LVSPEC_ARCH

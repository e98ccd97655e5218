// linear: x W^T + b for a few rows of x, in float32, at the speed at which W can be read.
//
// Not an operation of lvspec.ops: the products of text_pass.h with weights as HF has them. Libraries
// made for large products lose half their speed on thirteen rows.
// Vectors go along the inputs, of x and of W alike, so that no lane idles whatever the number of
// rows is; W is read once, a few of its rows at a time. The lanes of a sum are added up in one
// fixed order, so a row of the result has the same bits however many rows there are.
#pragma once

#include "types.h"

namespace lvspec::LVSPEC_ARCH {

// Rows of x and of W at a time: as many sums as there are registers for.
constexpr int kLinearRows = 6;
constexpr int kLinearOutputs = LVSPEC_VECTOR_BYTES == 64 ? 4 : 2;

constexpr int64_t kLinearAhead = 16;  // rows of W that are fetched before they are needed

// Of a block of as many outputs as there are lanes, the sums of every row, not yet added up across
// lanes: two outputs to a vector, see add_neighbours<1>.
struct LinearSums {
  Vec<float> of[kLinearRows][kLanes<float> / 2];
};

// OUTPUTS rows of W with ROWS rows of x, which `x` holds vector by vector, side by side.
template <int OUTPUTS, int ROWS>
[[gnu::noinline]] static void multiply_outputs(const float* x, const float* weight, int64_t inputs,
                                    LinearSums& result, int64_t first) {
  using V = Vec<float>;
  constexpr int64_t lanes = kLanes<float>;
  V sums[OUTPUTS][ROWS];
  LVSPEC_UNROLL
  for (int o = 0; o < OUTPUTS; ++o)
    LVSPEC_UNROLL
    for (int r = 0; r < ROWS; ++r) sums[o][r] = V{};
  int64_t i = 0;
  for (; i + lanes <= inputs; i += lanes, x += ROWS * lanes) {
    V w[OUTPUTS];
    LVSPEC_UNROLL
    for (int o = 0; o < OUTPUTS; ++o) {
      w[o] = load(weight + o * inputs + i);
      __builtin_prefetch(weight + (o + kLinearAhead) * inputs + i);
    }
    LVSPEC_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const V column = load(x + r * lanes);
      LVSPEC_UNROLL
      for (int o = 0; o < OUTPUTS; ++o) sums[o][r] += column * w[o];
    }
  }
  if (i < inputs) {
    V w[OUTPUTS];
    LVSPEC_UNROLL
    for (int o = 0; o < OUTPUTS; ++o) w[o] = load_first(weight + o * inputs + i, inputs - i);
    LVSPEC_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const V column = load(x + r * lanes);
      LVSPEC_UNROLL
      for (int o = 0; o < OUTPUTS; ++o) sums[o][r] += column * w[o];
    }
  }
  LVSPEC_UNROLL
  for (int r = 0; r < ROWS; ++r)
    LVSPEC_UNROLL
    for (int o = 0; o < OUTPUTS; o += 2)
      result.of[r][(first + o) / 2] =
          add_neighbours<1>(sums[o][r], o + 1 < OUTPUTS ? sums[(o + 1) % OUTPUTS][r] : V{});
}

// `count` rows of W, at most as many as there are lanes, with `rows` rows of x.
template <int ROWS = kLinearRows>
static void multiply_block(const float* x, int64_t rows, const float* weight, int64_t inputs,
                           int64_t count, LinearSums& sums) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return multiply_block<ROWS - 1>(x, rows, weight, inputs, count, sums);
  }
  // Eight sums hide their latency; a block may have as few as four outputs.
  constexpr int outputs = ROWS == 1 && kLanes<float> > 4 ? 8 : ROWS < 4 ? 4 : kLinearOutputs;
  int64_t o = 0;
  for (; o + outputs <= count; o += outputs)
    multiply_outputs<outputs, ROWS>(x, weight + o * inputs, inputs, sums, o);
  for (; o + 2 <= count; o += 2)
    multiply_outputs<2, ROWS>(x, weight + o * inputs, inputs, sums, o);
  if (o < count) multiply_outputs<1, ROWS>(x, weight + o * inputs, inputs, sums, o);
}

// Rows of x in groups, as multiply_block reads them. Groups differ by one row at most.
struct LinearRows {
  int64_t count, vectors;
  const float* packed;

  LinearRows(const float* x, int64_t rows, int64_t inputs, Scratch<float>& scratch)
      : count(rows), vectors((inputs + kLanes<float> - 1) / kLanes<float>) {
    constexpr int64_t lanes = kLanes<float>;
    float* to = scratch.get(rows * vectors * lanes);
    packed = to;
    for_each_group([&](const float*, int64_t first, int64_t size) {
      for (int64_t r = first; r < first + size; ++r)
        for (int64_t v = 0; v < vectors; ++v)
          store(to + (first * vectors + v * size + r - first) * lanes,
                load_first(x + r * inputs + v * lanes, inputs - v * lanes));
    });
  }

  // Calls f(packed rows of the group, its first row, its number of rows).
  template <class F>
  void for_each_group(const F& f) const {
    for (int64_t first = 0; first < count;) {
      const int64_t left = count - first, groups = (left + kLinearRows - 1) / kLinearRows;
      const int64_t size = (left + groups - 1) / groups;
      f(packed + first * vectors * kLanes<float>, first, size);
      first += size;
    }
  }
};

static void multiply_range(int64_t begin, int64_t end, void* context) {
  const Linear& a = *static_cast<const Linear*>(context);
  constexpr int64_t lanes = kLanes<float>;
  static thread_local Scratch<float> scratch;
  const LinearRows rows(a.x, a.rows, a.inputs, scratch);
  LinearSums sums;
  for (int64_t o = begin; o < end; o += lanes) {
    const int64_t outputs = end - o < lanes ? end - o : lanes;
    const Vec<float> bias = a.bias == nullptr ? Vec<float>{} : load_first(a.bias + o, outputs);
    rows.for_each_group([&](const float* x, int64_t first, int64_t size) {
      multiply_block(x, size, a.weight + o * a.inputs, a.inputs, outputs, sums);
      for (int64_t r = 0; r < size; ++r)
        store_first(a.y + (first + r) * a.outputs + o, sum_lanes_of_pairs(sums.of[r]) + bias,
                    outputs);
    });
  }
}

static void linear(const Linear& a) {
  // About 20 microseconds of reading W at least before another thread is worth waking up.
  const int64_t grain = 1 + 100000 / (a.inputs + 1);
  a.parallel_for(a.outputs, grain, multiply_range, const_cast<Linear*>(&a));
}

}  // namespace lvspec::LVSPEC_ARCH

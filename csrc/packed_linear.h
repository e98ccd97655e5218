// packed_linear: x W^T + b for 1 to some 128 rows of x, in float32, with weights that pack_weights
// has packed.
//
// A tile of rows and panels takes one load of a panel and one broadcast of each row per input, and
// no row is padded. A sum goes over the inputs from the first to the last in chains of kChain, the
// chains added up in order, in tiles of every size, be weights read as they are or widened before:
// so an output's bits depend on its row and its weights alone, not on the other rows, the threads or
// the type of the packed weights.
#pragma once

#include "gated_linear.h"
#include "pack_weights.h"
#include "tiles.h"

namespace lvspec::LVSPEC_ARCH {

// As many sums as there are registers for, next to a panel and a broadcast.
constexpr int kPackedRows = LVSPEC_VECTOR_BYTES == 64 ? 14 : 6;

constexpr int64_t kChain = 128;  // sums of sums: rounding grows with the longest chain of them

// Panels at a time: with few rows eight sums hide their latency.
constexpr int panels_at_once(int rows) { return rows == 1 ? 4 : rows < 4 ? 2 : 1; }

// How a tile reads panels: as the first, and what comes next is fetched meanwhile; so, and widened
// ones are written down for the tiles of other rows; or what has been read before.
enum class Reading { first, first_of_several, again };

template <class W>
struct Panels {
  const W* from;
  int64_t step;    // from panel to panel
  int64_t ahead;   // to what will be read next
  float* widened;  // [panels][kChain][kPanel]
};

// sums[PANELS][sums_step] = ROWS rows, which x holds side by side, input by input, times panels;
// or added to what is there.
template <int ROWS, int PANELS, Reading READING, class W>
[[gnu::noinline]] static void multiply_packed(const float* x, const Panels<W>& panels,
                                              int64_t inputs, float* sums, int64_t sums_step,
                                              bool is_first) {
  using V = Vec<float>;
  constexpr int64_t lanes = kLanes<float>, line = 64 / sizeof(W);
  V sum[ROWS][2 * PANELS];
  LVSPEC_UNROLL
  for (int r = 0; r < ROWS; ++r)
    LVSPEC_UNROLL
    for (int v = 0; v < 2 * PANELS; ++v) sum[r][v] = V{};
  const W* weight = panels.from;
  const int64_t step = panels.step, ahead = panels.ahead;
  float* widened = panels.widened;
  for (int64_t i = 0; i < inputs; ++i, x += ROWS, weight += kPanel, widened += kPanel) {
    V w[2 * PANELS];
    LVSPEC_UNROLL
    for (int p = 0; p < PANELS; ++p) {
      load_panel(weight + p * step, w + 2 * p);
      if (READING != Reading::again)
        for (int64_t next = 0; next < kPanel; next += line)
          __builtin_prefetch(weight + p * step + ahead + next);
      if (READING == Reading::first_of_several) {
        store(widened + p * kChain * kPanel, w[2 * p]);
        store(widened + p * kChain * kPanel + lanes, w[2 * p + 1]);
      }
    }
    LVSPEC_UNROLL
    for (int r = 0; r < ROWS; ++r)
      LVSPEC_UNROLL
      for (int v = 0; v < 2 * PANELS; ++v) sum[r][v] += w[v] * x[r];
  }
  LVSPEC_UNROLL
  for (int r = 0; r < ROWS; ++r)
    LVSPEC_UNROLL
    for (int v = 0; v < 2 * PANELS; ++v) {
      float* to = sums + v / 2 * sums_step + r * kPanel + v % 2 * lanes;
      store(to, is_first ? sum[r][v] : load(to) + sum[r][v]);
    }
}

// Rows of x in groups that a tile takes, each of them input by input: x of row r of a group of n
// rows that begins with row f, at input i, is at f * inputs + i * n + r - f.
static void pack_inputs(const float* x, int64_t rows, int64_t inputs, float* to) {
  constexpr int64_t lanes = kLanes<float>, piece = kPieceLanes<float>;
  for_tiles<kPackedRows>(rows, [&](int64_t first, auto group) {
    constexpr int64_t size = group.value;
    const float* from = x + first * inputs;
    float* packed = to + first * inputs;
    int64_t done = 0;
    if constexpr (size >= piece) {
      for (; done + lanes <= inputs; done += lanes)
        for (int64_t next = 0; next < size; next += piece) {
          const int64_t r = next + piece <= size ? next : size - piece;  // some perhaps again
          Vec<float> square[piece];
          for (int64_t j = 0; j < piece; ++j) square[j] = load(from + (r + j) * inputs + done);
          transpose_pieces<float>(square);
          for (int64_t j = 0; j < piece; ++j) {
            float numbers[lanes];
            store(numbers, square[j]);
            for (int64_t k = 0; k < lanes; k += piece)
              std::memcpy(packed + (done + k + j) * size + r, numbers + k, kPieceBytes);
          }
        }
    }
    for (int64_t r = 0; r < size; ++r)
      for (int64_t i = done; i < inputs; ++i) packed[i * size + r] = from[r * inputs + i];
  });
}

// sums[count][rows][kPanel] of `count` panels with a group of rows, `wide` of them at a time.
template <int ROWS, Reading READING, class W>
static void multiply_group(const float* x, Panels<W> panels, int64_t count, int64_t inputs,
                           float* sums, int64_t sums_step, bool is_first) {
  constexpr int wide = panels_at_once(ROWS);
  int64_t p = 0;
  const auto move = [&](int64_t by) {
    p += by, panels.from += by * panels.step, panels.widened += by * kChain * kPanel;
  };
  for (; p + wide <= count; move(wide))
    multiply_packed<ROWS, wide, READING>(x, panels, inputs, sums + p * sums_step, sums_step,
                                         is_first);
  if constexpr (wide > 1)
    for (; p < count; move(1))
      multiply_packed<ROWS, 1, READING>(x, panels, inputs, sums + p * sums_step, sums_step,
                                        is_first);
}

// sums[count][rows][kPanel] of some panels, over all inputs. `widened` has room for the panels'
// inputs of one chain.
template <class W>
static void sum_panels(const PackedLinear& a, const float* x, int64_t panel, int64_t count,
                       float* widened, float* sums) {
  constexpr bool is_wide = sizeof(W) == sizeof(float);
  const int64_t step = a.inputs * kPanel, sums_step = a.rows * kPanel;
  const W* weight = static_cast<const W*>(a.packed) + panel * step;
  for (int64_t i = 0; i < a.inputs; i += kChain) {
    const bool is_last = i + kChain >= a.inputs;
    const int64_t inputs = is_last ? a.inputs - i : kChain;
    const Panels<W> panels = {weight + i * kPanel, step,
                              is_last ? count * step - i * kPanel : kChain * kPanel, widened};
    for_tiles<kPackedRows>(a.rows, [&](int64_t row, auto group) {
      constexpr int rows = group.value;
      const float* group_x = x + row * a.inputs + i * rows;
      float* to = sums + row * kPanel;
      const auto multiply = [&](auto reading, const auto& from) {
        multiply_group<rows, Reading(reading.value)>(group_x, from, count, inputs, to, sums_step,
                                                     i == 0);
      };
      if (row > 0 && is_wide)
        multiply(Constant<int(Reading::again)>{}, panels);
      else if (row > 0)
        multiply(Constant<int(Reading::again)>{},
                 Panels<float>{widened, kChain * kPanel, 0, widened});
      else if (is_wide || a.rows <= kPackedRows)
        multiply(Constant<int(Reading::first)>{}, panels);
      else
        multiply(Constant<int(Reading::first_of_several)>{}, panels);
    });
  }
}

// Sums of a panel, of gates and ups perhaps, to y.
static void finish_panel(const PackedLinear& a, int64_t panel, const float* sums) {
  constexpr int64_t lanes = kLanes<float>;
  const int64_t first = panel * kPanel;
  for (int64_t o = first; o < a.outputs && o < first + kPanel; o += lanes) {
    const int64_t left = a.outputs - o;
    const Vec<float> bias = a.bias == nullptr ? Vec<float>{} : load_first(a.bias + o, left);
    for (int64_t r = 0; r < a.rows; ++r) {
      const float* from = sums + r * kPanel + o - first;
      Vec<float> y = load(from);
      if (a.bias != nullptr) y += bias;
      if (a.is_gated) y = silu(y) * load(from + a.rows * kPanel);
      if (a.residual != nullptr) y += load_first(a.residual + r * a.outputs + o, left);
      store_first(a.y + r * a.outputs + o, y, left);
    }
  }
}

template <class W>
static void multiply_packed_range(const PackedLinear& a, int64_t begin, int64_t end) {
  static thread_local Scratch<float> scratch;
  const int64_t parts = a.is_gated ? 2 : 1;  // panels of an output
  int64_t at_once = parts;
  if (a.rows <= kPackedRows && panels_at_once(int(a.rows)) > parts)
    at_once = panels_at_once(int(a.rows));
  const int64_t sums_size = at_once * a.rows * kPanel;
  float* sums = scratch.get(sums_size + at_once * kChain * kPanel + a.rows * a.inputs);
  float* widened = sums + sums_size;
  float* x = widened + at_once * kChain * kPanel;
  pack_inputs(a.x, a.rows, a.inputs, x);
  for (int64_t panel = begin * parts; panel < end * parts; panel += at_once) {
    const int64_t left = end * parts - panel, count = left < at_once ? left : at_once;
    sum_panels<W>(a, x, panel, count, widened, sums);
    for (int64_t p = 0; p < count; p += parts)
      finish_panel(a, (panel + p) / parts, sums + p * a.rows * kPanel);
  }
}

static void multiply_any_packed_range(int64_t begin, int64_t end, void* context) {
  const PackedLinear& a = *static_cast<const PackedLinear*>(context);
  switch (a.type) {
    case Type::f16: return multiply_packed_range<f16>(a, begin, end);
    case Type::bf16: return multiply_packed_range<bf16>(a, begin, end);
    default: return multiply_packed_range<float>(a, begin, end);
  }
}

static void packed_linear(const PackedLinear& a) {
  // About 20 microseconds at least before another thread is worth waking up, as in linear.
  const int64_t grain = 1 + 100000 / ((a.inputs + 1) * kPanel * (a.is_gated ? 2 : 1));
  a.parallel_for((a.outputs + kPanel - 1) / kPanel, grain, multiply_any_packed_range,
                 const_cast<PackedLinear*>(&a));
}

}  // namespace lvspec::LVSPEC_ARCH

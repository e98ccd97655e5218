// verify_attention: see lvspec.reference.verify_attention.
//
// A task is a KV head of a sequence. Its query heads and all slots are the rows of one matrix. Keys
// come in blocks from position 0 on, the draft slots in one of their own, so a row's sums are taken
// in the same order however many slots there are. Sums and maxima over a row's keys stay one per
// lane until the end, but for the maximum that a block's weights need.
#pragma once

#include <type_traits>

#include "key_panels.h"

namespace lvspec::LVSPEC_ARCH {

// The largest tiles, for Q K^T of rows by panels, for P V of rows by vectors of dimensions: sums
// enough to hide the latency of a multiply-add, and registers for them.
constexpr int kTileRows = LVSPEC_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kTilePanels = LVSPEC_VECTOR_BYTES == 16 ? 2 : 3;
constexpr int kValueRows = LVSPEC_VECTOR_BYTES == 16 ? 4 : 6;
constexpr int kValueVectors = LVSPEC_VECTOR_BYTES == 64 ? 4 : 2;

template <class A>
struct AttentionRows : KeyBlock<A> {
  int64_t rows;
  A* q;                                    // [rows][head_dim]
  A* out;                                  // [rows][padded_dim]
  A *running_max, *highest, *rescale;      // [rows], padded to whole vectors
  A *running_sum, *video_max, *video_sum;  // [rows][kLanes]
  A* weights;                              // [rows][kKeyBlock]
  using KeyBlock<A>::KeyBlock;
};

template <class A>
constexpr A kLowest = sizeof(A) == 4 ? A(-3.0e38) : A(-1.0e300);

// weights[row] = q . key, for a tile.
template <class A, int ROWS, int PANELS>
static inline void multiply_keys(const AttentionRows<A>& t, int64_t row, int64_t panel) {
  Vec<A> logits[ROWS][PANELS];
  multiply_panels<A>(t, t.q + row * t.head_dim, panel, logits);
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PANELS; ++p)
      store(t.weights + (row + r) * kKeyBlock + (panel + p) * kLanes<A>, logits[r][p]);
}

// out[rows][vectors of dimensions] = out * rescale + weights values, for a tile.
template <class A, int ROWS, int VECTORS>
static inline void multiply_values(const AttentionRows<A>& t, const A* const* value_rows,
                                   int64_t count, int64_t row, int64_t dim) {
  Vec<A> sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = Vec<A>{};
  const A* weights = t.weights + row * kKeyBlock;
  for (int64_t k = 0; k < count; ++k) {
    Vec<A> value[VECTORS];
    for (int v = 0; v < VECTORS; ++v) value[v] = load(value_rows[k] + dim + v * kLanes<A>);
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += value[v] * weights[r * kKeyBlock + k];
  }
  // The block's sum by itself, then onto that of the blocks before: a thousand additions in a row
  // would lose three digits.
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) {
      A* out = t.out + (row + r) * t.padded_dim + dim + v * kLanes<A>;
      store(out, load(out) * t.rescale[row + r] + sums[r][v]);
    }
}

// The running maxima with the block's logits, and by what the sums so far shrink.
template <class A>
static void raise_maxima(const AttentionRows<A>& t, int64_t width) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t r = 0; r < t.rows; ++r) {
    const A* logits = t.weights + r * kKeyBlock;
    Vec<A> highest = broadcast(t.running_max[r]);
    for (int64_t k = 0; k < width; k += lanes) highest = maximum<A>(load(logits + k), highest);
    t.highest[r] = highest_lane<A>(highest);
  }
  for (int64_t r = 0; r < t.rows; r += lanes) {
    const Vec<A> highest = load(t.highest + r);
    store(t.rescale + r, exp_nonpositive(load(t.running_max + r) - highest));
    store(t.running_max + r, highest);
  }
}

// Logits to weights, and their sums.
template <class A, bool VIDEO>
static void weigh(const AttentionRows<A>& t, int64_t width, const A* video) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t r = 0; r < t.rows; ++r) {
    const A highest = t.running_max[r], rescale = t.rescale[r];
    A* weights = t.weights + r * kKeyBlock;
    Vec<A> sum{}, video_sum{}, video_max = load(t.video_max + r * lanes);
    for (int64_t k = 0; k < width; k += lanes) {
      const Vec<A> logit = load(weights + k), weight = exp_nonpositive(logit - highest);
      store(weights + k, weight);
      sum += weight;
      if constexpr (VIDEO) {
        const auto is_video = load(video + k) > A(0);
        video_sum += is_video ? weight : Vec<A>{};
        video_max = maximum<A>(is_video ? logit : broadcast(A(-INFINITY)), video_max);
      }
    }
    store(t.running_sum + r * lanes, load(t.running_sum + r * lanes) * rescale + sum);
    store(t.video_sum + r * lanes, load(t.video_sum + r * lanes) * rescale + video_sum);
    store(t.video_max + r * lanes, video_max);
  }
}

// Folds one block of keys, in t.panels, into the running softmax of all rows. `video` is 1 or 0 for
// whole vectors of keys, or null: no scores. `seen_by_row` null: all see all.
template <class A>
static void fold_block(const AttentionRows<A>& t, const A* const* value_rows, int64_t count,
                       const A* video, const int64_t* seen_by_row, int64_t first_slot) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t num_panels = (count + lanes - 1) / lanes, width = num_panels * lanes;
  for_tiles<kTilePanels>(num_panels, [&](int64_t panel, auto panels) {
    for_tiles<kTileRows>(t.rows, [&](int64_t row, auto rows) {
      multiply_keys<A, rows.value, panels.value>(t, row, panel);
    });
  });

  if (seen_by_row != nullptr || count < width) {
    for (int64_t r = 0; r < t.rows; ++r)
      for (int64_t k = 0; k < width; ++k)
        if (k >= count || (seen_by_row != nullptr && !(seen_by_row[r] >> (first_slot + k) & 1)))
          t.weights[r * kKeyBlock + k] = A(-INFINITY);
  }
  raise_maxima(t, width);
  if (video != nullptr)
    weigh<A, true>(t, width, video);
  else
    weigh<A, false>(t, width, video);

  for_tiles<kValueVectors>(t.padded_dim / lanes, [&](int64_t vector, auto vectors) {
    for_tiles<kValueRows>(t.rows, [&](int64_t row, auto rows) {
      multiply_values<A, rows.value, vectors.value>(t, value_rows, count, row, vector * lanes);
    });
  });
}

// Where the rows of a block of a cache stand.
template <class Stored>
static void find_rows(const VerifyAttention& a, const Stored* cache, const int64_t* stride,
                      int64_t sequence, int64_t first, int64_t count, const Stored** rows) {
  for (int64_t k = 0; k < count; ++k) {
    const int64_t position = first + k;
    if (a.block_table != nullptr) {
      int64_t page = a.block_table[sequence * a.max_pages + position / a.page_size];
      page = page < 0 ? 0 : page >= a.num_pages ? a.num_pages - 1 : page;
      rows[k] = cache + page * stride[0] + position % a.page_size * stride[2];
    } else {
      rows[k] = cache + sequence * stride[0] + position * stride[2];
    }
  }
}

template <class T, class Stored>
static void attend_head(const VerifyAttention& a, int64_t sequence, int64_t head) {
  using A = Accumulate<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t group = a.num_q_heads / a.num_kv_heads, slots = a.num_slots;
  AttentionRows<A> t(a.head_dim);
  t.rows = group * slots;
  const int64_t padded = (t.rows + lanes - 1) / lanes * lanes;
  static thread_local Scratch<A> scratch;
  static thread_local Scratch<int64_t> bits_scratch;
  static thread_local Scratch<A> video_scratch;
  A* memory = scratch.get(t.rows * (t.head_dim + t.padded_dim + 3 * lanes + kKeyBlock) +
                          3 * padded + t.size());
  memory = t.carve(memory);
  const auto take = [&](int64_t count) { return (memory += count) - count; };
  t.out = take(t.rows * t.padded_dim);
  t.weights = take(t.rows * kKeyBlock);
  t.running_max = take(padded);
  t.highest = take(padded);
  t.rescale = take(padded);
  t.running_sum = take(t.rows * lanes);
  t.video_max = take(t.rows * lanes);
  t.video_sum = take(t.rows * lanes);
  t.q = take(t.rows * t.head_dim);

  const T* q = static_cast<const T*>(a.q) + sequence * a.q_stride[0];
  int64_t* seen = bits_scratch.get(t.rows);
  for (int64_t r = 0; r < t.rows; ++r) {
    seen[r] = a.ancestors[sequence * slots + r % slots];
    const T* from = q + (head * group + r / slots) * a.q_stride[1] + r % slots * a.q_stride[2];
    A* row = t.q + r * t.head_dim;
    widen_row(from, a.q_stride[3], t.head_dim, row);
    for (int64_t d = 0; d < t.head_dim; ++d) row[d] *= A(a.scale);
  }
  for (int64_t r = 0; r < padded; ++r) t.running_max[r] = t.highest[r] = kLowest<A>;
  for (int64_t i = 0; i < t.rows * lanes; ++i) {
    t.video_max[i] = A(-INFINITY);
    t.running_sum[i] = t.video_sum[i] = A(0);
  }
  for (int64_t i = 0; i < t.rows * t.padded_dim; ++i) t.out[i] = A(0);

  int64_t length = a.kv_len[sequence];
  length = length < 0 ? 0 : length > a.capacity ? a.capacity : length;
  const int64_t end = length + slots > a.capacity ? a.capacity : length + slots;
  const bool scores = a.mass != nullptr;
  A* video = video_scratch.get(end + lanes);
  if (scores)
    for (int64_t i = 0; i < end + lanes; ++i) video[i] = A(0);
  if (scores && a.plan_start != nullptr) {
    for (int64_t p = sequence * a.num_pieces; p < (sequence + 1) * a.num_pieces; ++p) {
      if (a.plan_kind[p] != 1) continue;
      const int64_t stop = a.plan_end[p] < length ? a.plan_end[p] : length;
      for (int64_t i = a.plan_start[p]; i < stop; ++i) video[i] = A(1);
    }
  } else if (scores) {
    const uint8_t* visual = a.visual + sequence * a.capacity;
    for (int64_t i = 0; i < end; ++i) video[i] = visual[i] != 0 ? A(1) : A(0);
  }

  const Stored* k_head = static_cast<const Stored*>(a.k_cache) + head * a.k_stride[1];
  const Stored* v_head = static_cast<const Stored*>(a.v_cache) + head * a.v_stride[1];
  const auto factor = [&](const float* scale, int64_t stride) {
    return scale == nullptr ? nullptr : scale + sequence * stride + head;
  };
  const float* k_factor = factor(a.k_scale, a.k_scale_stride);
  const float* v_factor = factor(a.v_scale, a.v_scale_stride);
  const Stored* stored[kKeyBlock];
  for (int64_t first = 0; first < end;) {
    const bool is_tree = first >= length;
    const int64_t stop = is_tree ? end : length;
    const int64_t count = stop - first < kKeyBlock ? stop - first : kKeyBlock;
    find_rows(a, k_head, a.k_stride, sequence, first, count, stored);
    pack_rows<A>(t, stored, a.k_stride[3], count, k_factor);
    find_rows(a, v_head, a.v_stride, sequence, first, count, stored);
    const A* values[kKeyBlock];
    widen_rows<A>(t, stored, a.v_stride[3], count, v_factor, values);
    fold_block(t, values, count, scores ? video + first : nullptr, is_tree ? seen : nullptr,
               first - length);
    first += count;
  }

  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t row = (sequence * a.num_q_heads + head * group) * slots + r;
    const A total = sum_lanes<A>(load(t.running_sum + r * lanes));
    const A inverse = A(1) / (total == A(0) ? A(1) : total);
    static_cast<A*>(a.lse)[row] = t.running_max[r] + A(::log(double(total)));
    if (scores) {
      const A gap = highest_lane<A>(load(t.video_max + r * lanes)) - t.running_max[r];
      static_cast<A*>(a.mass)[row] = sum_lanes<A>(load(t.video_sum + r * lanes)) * inverse;
      static_cast<A*>(a.peak)[row] = A(::exp(double(gap))) * inverse;
    }
    T* out = static_cast<T*>(a.out) + row * t.head_dim;
    for (int64_t d = 0; d < t.head_dim; ++d) narrow(t.out[r * t.padded_dim + d] * inverse, out + d);
  }
}

template <class T, class Stored>
static void attend_heads(int64_t begin, int64_t end, void* context) {
  const VerifyAttention& a = *static_cast<const VerifyAttention*>(context);
  for (int64_t i = begin; i < end; ++i)
    attend_head<T, Stored>(a, i / a.num_kv_heads, i % a.num_kv_heads);
}

static void verify_attention(const VerifyAttention& a) {
  void (*body)(int64_t, int64_t, void*) = nullptr;
  with_type(a.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) > 1) {
      if (a.stored == Type::f8_e4m3)
        body = attend_heads<T, f8_e4m3>;
      else
        body = attend_heads<T, T>;
    }
  });
  // About 20 microseconds of work at least before another thread is worth waking up.
  const int64_t rows = a.num_q_heads / a.num_kv_heads * a.num_slots;
  const int64_t work = rows * a.head_dim * (a.capacity / 2 + 1);
  const int64_t grain = 1 + 1000000 / (work + 1);
  a.parallel_for(a.batch_size * a.num_kv_heads, grain, body, const_cast<VerifyAttention*>(&a));
}

}  // namespace lvspec::LVSPEC_ARCH

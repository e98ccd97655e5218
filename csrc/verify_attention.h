// verify_attention: see lvspec.reference.verify_attention.
//
// A task is a KV head of a sequence. Its query heads and all slots are the rows of one matrix, kept
// with the rows side by side (dimension by dimension), so that a vector holds the same number of
// many rows: maxima, sums and exponentials need no sums across lanes, and no row's bits depend on
// how many others there are. Keys come in blocks from position 0 on, the draft slots in one of their
// own, so a row's sums are taken in the same order however many slots there are.
#pragma once

#include <type_traits>

#include "types.h"

namespace lvspec::LVSPEC_ARCH {

constexpr int64_t kKeyBlock = 64;
// Sums that are under way at a time: enough to hide the latency of a multiply-add, and registers for
// them. A tile of keys has 12 of them however many vectors of rows it has, one of rows up to 24.
constexpr int64_t kSums = 12;
constexpr int64_t kRowTile = 6;  // rows a time in P V
constexpr int64_t kDimTile = 4;  // vectors of V a time in P V

template <class A>
struct AttentionRows {
  int64_t rows, padded, head_dim, padded_dim;
  A *q;            // [head_dim][padded]
  A *out;          // [padded][padded_dim]
  A *running_max, *running_sum, *video_max, *video_sum, *rescale;  // [padded]
  A *weights;      // [kKeyBlock][padded]
  A *keys, *values;  // [kKeyBlock][padded_dim], where the cache's rows cannot be used as they are
};

template <class A>
constexpr A kLowest = sizeof(A) == 4 ? A(-3.0e38) : A(-1.0e300);

// weights[j][vector of rows] = q . key j, for `count` keys.
template <class A, int KEYS, int VECTORS>
static inline void multiply_keys(const AttentionRows<A>& t, const A* const* key_rows,
                                 int64_t first_row, A* weights) {
  Vec<A> sums[KEYS][VECTORS];
  for (int k = 0; k < KEYS; ++k)
    for (int v = 0; v < VECTORS; ++v) sums[k][v] = Vec<A>{};
  const A* q = t.q + first_row;
  for (int64_t d = 0; d < t.head_dim; ++d, q += t.padded) {
    Vec<A> column[VECTORS];
    for (int v = 0; v < VECTORS; ++v) column[v] = load(q + v * kLanes<A>);
    for (int k = 0; k < KEYS; ++k)
      for (int v = 0; v < VECTORS; ++v) sums[k][v] += column[v] * key_rows[k][d];
  }
  for (int k = 0; k < KEYS; ++k)
    for (int v = 0; v < VECTORS; ++v)
      store(weights + k * t.padded + first_row + v * kLanes<A>, sums[k][v]);
}

template <class A, int VECTORS>
static inline void multiply_all_keys(const AttentionRows<A>& t, const A* const* key_rows,
                                     int64_t count, int64_t first_row) {
  constexpr int64_t tile = kSums / VECTORS;
  int64_t k = 0;
  for (; k + tile <= count; k += tile)
    multiply_keys<A, tile, VECTORS>(t, key_rows + k, first_row, t.weights + k * t.padded);
  for (; k + 4 <= count; k += 4)
    multiply_keys<A, 4, VECTORS>(t, key_rows + k, first_row, t.weights + k * t.padded);
  for (; k < count; ++k)
    multiply_keys<A, 1, VECTORS>(t, key_rows + k, first_row, t.weights + k * t.padded);
}

// out[rows][vectors of dimensions] = out * rescale + weights^T values.
template <class A, int ROWS, int VECTORS>
static inline void multiply_values(const AttentionRows<A>& t, const A* const* value_rows,
                                   int64_t count, int64_t first_row, int64_t first_dim) {
  Vec<A> sums[ROWS][VECTORS];
  A* out = t.out + first_row * t.padded_dim + first_dim;
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = Vec<A>{};
  for (int64_t k = 0; k < count; ++k) {
    Vec<A> value[VECTORS];
    for (int v = 0; v < VECTORS; ++v) value[v] = load(value_rows[k] + first_dim + v * kLanes<A>);
    const A* weight = t.weights + k * t.padded + first_row;
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += value[v] * weight[r];
  }
  // The block's sum by itself, then onto that of the blocks before: a thousand additions in a row
  // would lose three digits.
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) {
      A* place = out + r * t.padded_dim + v * kLanes<A>;
      store(place, load(place) * t.rescale[first_row + r] + sums[r][v]);
    }
}

template <class A, int VECTORS>
static inline void multiply_values_of_all_rows(const AttentionRows<A>& t,
                                               const A* const* value_rows, int64_t count,
                                               int64_t first_dim) {
  int64_t row = 0;
  for (; row + kRowTile <= t.rows; row += kRowTile)
    multiply_values<A, kRowTile, VECTORS>(t, value_rows, count, row, first_dim);
  for (; row + 2 <= t.rows; row += 2)
    multiply_values<A, 2, VECTORS>(t, value_rows, count, row, first_dim);
  for (; row < t.rows; ++row) multiply_values<A, 1, VECTORS>(t, value_rows, count, row, first_dim);
}

// Folds one block of keys into the running softmax of all rows. `hidden` null: all see all.
template <class A>
static void fold_block(const AttentionRows<A>& t, const A* const* key_rows,
                       const A* const* value_rows, int64_t count, const uint8_t* is_video,
                       const int64_t* seen_by_row, int64_t first_slot, bool scores) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t row = 0;
  for (; row + 2 * lanes <= t.padded; row += 2 * lanes)
    multiply_all_keys<A, 2>(t, key_rows, count, row);
  for (; row < t.padded; row += lanes) multiply_all_keys<A, 1>(t, key_rows, count, row);

  if (seen_by_row != nullptr) {
    for (int64_t k = 0; k < count; ++k)
      for (int64_t r = 0; r < t.rows; ++r)
        if (!(seen_by_row[r] >> (first_slot + k) & 1)) t.weights[k * t.padded + r] = A(-INFINITY);
  }
  for (row = 0; row < t.padded; row += lanes) {
    const Vec<A> before = load(t.running_max + row);
    Vec<A> highest = before, video_highest = load(t.video_max + row);
    for (int64_t k = 0; k < count; ++k) {
      const Vec<A> logit = load(t.weights + k * t.padded + row);
      highest = maximum<A>(logit, highest);
      if (scores && is_video[k]) video_highest = maximum<A>(logit, video_highest);
    }
    const Vec<A> rescale = exp_nonpositive(before - highest);
    Vec<A> sum{}, video_sum{};
    for (int64_t k = 0; k < count; ++k) {
      A* place = t.weights + k * t.padded + row;
      const Vec<A> weight = exp_nonpositive(load(place) - highest);
      store(place, weight);
      sum += weight;
      if (scores && is_video[k]) video_sum += weight;
    }
    store(t.running_max + row, highest);
    store(t.video_max + row, video_highest);
    store(t.running_sum + row, load(t.running_sum + row) * rescale + sum);
    store(t.video_sum + row, load(t.video_sum + row) * rescale + video_sum);
    store(t.rescale + row, rescale);
  }
  int64_t dim = 0;
  for (; dim + kDimTile * lanes <= t.padded_dim; dim += kDimTile * lanes)
    multiply_values_of_all_rows<A, kDimTile>(t, value_rows, count, dim);
  for (; dim < t.padded_dim; dim += lanes)
    multiply_values_of_all_rows<A, 1>(t, value_rows, count, dim);
}

// Rows of a cache as A: where they stand if they can be read as they are, else copied to `buffer`.
template <class Stored, class A>
static void gather_rows(const VerifyAttention& a, const Stored* cache, const int64_t* stride,
                        int64_t sequence, int64_t first, int64_t count, A factor, bool scaled,
                        int64_t padded_dim, A* buffer, const A** rows) {
  for (int64_t k = 0; k < count; ++k) {
    const int64_t position = first + k;
    const Stored* from;
    if (a.block_table != nullptr) {
      int64_t page = a.block_table[sequence * a.max_pages + position / a.page_size];
      page = page < 0 ? 0 : page >= a.num_pages ? a.num_pages - 1 : page;
      from = cache + page * stride[0] + position % a.page_size * stride[2];
    } else {
      from = cache + sequence * stride[0] + position * stride[2];
    }
    if constexpr (sizeof(Stored) == sizeof(A)) {
      // Vectors are read past a row's end where head_dim is no multiple of them.
      if (stride[3] == 1 && !scaled && padded_dim == a.head_dim) {
        rows[k] = from;
        continue;
      }
    }
    A* to = buffer + k * padded_dim;
    widen_row(from, stride[3], a.head_dim, to);
    if (scaled)
      for (int64_t d = 0; d < a.head_dim; ++d) to[d] *= factor;
    for (int64_t d = a.head_dim; d < padded_dim; ++d) to[d] = A(0);
    rows[k] = to;
  }
}

template <class T, class Stored>
static void attend_head(const VerifyAttention& a, int64_t sequence, int64_t head) {
  using A = Accumulate<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t group = a.num_q_heads / a.num_kv_heads, slots = a.num_slots;
  AttentionRows<A> t;
  t.rows = group * slots;
  t.padded = (t.rows + lanes - 1) / lanes * lanes;
  t.head_dim = a.head_dim;
  t.padded_dim = (a.head_dim + lanes - 1) / lanes * lanes;
  static thread_local Scratch<A> scratch;
  static thread_local Scratch<int64_t> bits_scratch;
  static thread_local Scratch<uint8_t> video_scratch;
  A* memory = scratch.get(t.padded * (t.head_dim + t.padded_dim + 5 + kKeyBlock) +
                          2 * kKeyBlock * t.padded_dim);
  t.q = memory;
  t.out = t.q + t.padded * t.head_dim;
  t.running_max = t.out + t.padded * t.padded_dim;
  t.running_sum = t.running_max + t.padded;
  t.video_max = t.running_sum + t.padded;
  t.video_sum = t.video_max + t.padded;
  t.rescale = t.video_sum + t.padded;
  t.weights = t.rescale + t.padded;
  t.keys = t.weights + kKeyBlock * t.padded;
  t.values = t.keys + kKeyBlock * t.padded_dim;

  const T* q = static_cast<const T*>(a.q) + sequence * a.q_stride[0];
  int64_t* seen = bits_scratch.get(t.rows);
  for (int64_t r = 0; r < t.padded; ++r) {
    if (r < t.rows) seen[r] = a.ancestors[sequence * slots + r % slots];
    const int64_t place = (head * group + r / slots) * a.q_stride[1] + r % slots * a.q_stride[2];
    for (int64_t d = 0; d < t.head_dim; ++d)
      t.q[d * t.padded + r] =
          r < t.rows ? A(widen(q[place + d * a.q_stride[3]])) * A(a.scale) : A(0);
    t.running_max[r] = kLowest<A>;
    t.video_max[r] = A(-INFINITY);
    t.running_sum[r] = t.video_sum[r] = A(0);
  }
  for (int64_t i = 0; i < t.padded * t.padded_dim; ++i) t.out[i] = A(0);

  int64_t length = a.kv_len[sequence];
  length = length < 0 ? 0 : length > a.capacity ? a.capacity : length;
  const int64_t end = length + slots > a.capacity ? a.capacity : length + slots;
  const bool scores = a.mass != nullptr;
  uint8_t* video = video_scratch.get(end + 1);
  if (scores && a.plan_start != nullptr) {
    for (int64_t i = 0; i < end; ++i) video[i] = 0;
    for (int64_t p = sequence * a.num_pieces; p < (sequence + 1) * a.num_pieces; ++p) {
      if (a.plan_kind[p] != 1) continue;
      const int64_t stop = a.plan_end[p] < length ? a.plan_end[p] : length;
      for (int64_t i = a.plan_start[p]; i < stop; ++i) video[i] = 1;
    }
  } else if (scores) {
    for (int64_t i = 0; i < end; ++i) video[i] = a.visual[sequence * a.capacity + i] != 0;
  }

  const Stored* k_head = static_cast<const Stored*>(a.k_cache) + head * a.k_stride[1];
  const Stored* v_head = static_cast<const Stored*>(a.v_cache) + head * a.v_stride[1];
  const A k_factor = a.k_scale == nullptr ? A(1) : A(a.k_scale[head]);
  const A v_factor = a.v_scale == nullptr ? A(1) : A(a.v_scale[head]);
  const A* key_rows[kKeyBlock];
  const A* value_rows[kKeyBlock];
  for (int64_t first = 0; first < end;) {
    const bool is_tree = first >= length;
    const int64_t stop = is_tree ? end : length;
    const int64_t count = stop - first < kKeyBlock ? stop - first : kKeyBlock;
    gather_rows(a, k_head, a.k_stride, sequence, first, count, k_factor, a.k_scale != nullptr,
                t.padded_dim, t.keys, key_rows);
    gather_rows(a, v_head, a.v_stride, sequence, first, count, v_factor, a.v_scale != nullptr,
                t.padded_dim, t.values, value_rows);
    fold_block(t, key_rows, value_rows, count, video + first, is_tree ? seen : nullptr,
               first - length, scores);
    first += count;
  }

  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t row = (sequence * a.num_q_heads + head * group) * slots + r;
    const A total = t.running_sum[r];
    const A inverse = A(1) / (total == A(0) ? A(1) : total);
    static_cast<A*>(a.lse)[row] = t.running_max[r] + A(::log(double(total)));
    if (scores) {
      const A gap = t.video_max[r] - t.running_max[r];
      static_cast<A*>(a.mass)[row] = t.video_sum[r] * inverse;
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

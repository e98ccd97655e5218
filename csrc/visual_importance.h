// visual_importance: see lvspec.reference.visual_importance.
//
// The rows of a KV head stand side by side in panels two vectors wide, [D][panel], the last of
// them perhaps one vector, and meet a few keys at a time. Only video positions are computed. A
// position's sum is taken over the rows in their order whatever its neighbours are, so the bits do
// not depend on how the cache is divided.
#pragma once

#include <type_traits>

#include "types.h"

namespace lvspec::LVSPEC_ARCH {

constexpr int64_t kScoredKeys = 48;  // with one panel they stay in the first cache
constexpr int64_t kScoredDims = 64;  // sums of sums: rounding grows with the longest chain of them
constexpr int64_t kScoredPositions = 64;  // of the cache, that one thread takes at least

template <class A>
constexpr int64_t kPanel = 2 * kLanes<A>;

template <class A>
struct ScoringRows {
  int64_t head_dim, num_vectors;
  A* q;       // [panel][head_dim][its vectors], times the scale
  A* lse;     // [num_vectors][kLanes]
  A* counts;  // the same: 1, or 0 where there is no row or one that saw nothing
  A* totals;  // [kScoredKeys][kLanes]
  A* keys;    // [kScoredKeys][head_dim], where the cache's rows cannot be used as they are
};

static inline Vec<float> exp_of_any(Vec<float> x) {
  // The algorithm holds up to where exp overflows. x + inf: inf from there on, NaN for NaN.
  const Vec<int32_t> fits = x <= broadcast(88.72283f);
  return fits ? exp_nonpositive(fits ? x : Vec<float>{}) : x + INFINITY;
}

static inline Vec<double> exp_of_any(Vec<double> x) { return exp_nonpositive(x); }

// totals[k] += sum over the panel's rows of exp(q . key k - lse), for a tile of keys.
template <class A, int KEYS, int VECTORS>
static inline void score_tile(const ScoringRows<A>& t, int64_t panel, const A* const* key_rows,
                              A* totals) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> sums[KEYS][VECTORS] = {};
  const A* q = t.q + panel * t.head_dim * kPanel<A>;
  for (int64_t begin = 0; begin < t.head_dim; begin += kScoredDims) {
    const int64_t end = begin + kScoredDims < t.head_dim ? begin + kScoredDims : t.head_dim;
    Vec<A> parts[KEYS][VECTORS] = {};
    for (int64_t d = begin; d < end; ++d, q += VECTORS * lanes) {
      Vec<A> column[VECTORS];
      for (int v = 0; v < VECTORS; ++v) column[v] = load(q + v * lanes);
      for (int k = 0; k < KEYS; ++k)
        for (int v = 0; v < VECTORS; ++v) parts[k][v] += column[v] * key_rows[k][d];
    }
    for (int k = 0; k < KEYS; ++k)
      for (int v = 0; v < VECTORS; ++v) sums[k][v] += parts[k][v];
  }
  for (int v = 0; v < VECTORS; ++v) {
    const Vec<A> lse = load(t.lse + panel * kPanel<A> + v * lanes);
    const Vec<A> counts = load(t.counts + panel * kPanel<A> + v * lanes);
    for (int k = 0; k < KEYS; ++k) {
      const Vec<A> weight = exp_of_any(sums[k][v] - lse);
      store(totals + k * lanes, load(totals + k * lanes) + (counts > A(0) ? weight : Vec<A>{}));
    }
  }
}

template <class A, int KEYS, int VECTORS>
static void score_panel(const ScoringRows<A>& t, int64_t panel, const A* const* key_rows,
                        int64_t count) {
  for (int64_t k = 0; k < count; k += KEYS)
    score_tile<A, KEYS, VECTORS>(t, panel, key_rows + k, t.totals + k * kLanes<A>);
}

// Halves onto halves, as sum_lanes, in vectors that every processor has.
template <class A>
static inline A sum_stored(const A* from) {
  typedef A Small __attribute__((vector_size(16)));
  constexpr int64_t smalls = LVSPEC_VECTOR_BYTES / 16, numbers = 16 / sizeof(A);
  Small parts[smalls];
  std::memcpy(parts, from, sizeof parts);
  for (int64_t half = smalls / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) parts[i] += parts[i + half];
  for (int64_t half = numbers / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) parts[0][i] += parts[0][i + half];
  return parts[0][0];
}

template <class T, class A>
static void prepare_rows(const VisualImportance& a, int64_t sequence, int64_t head,
                         const ScoringRows<A>& t) {
  const int64_t rows = a.num_q_heads / a.num_kv_heads * a.num_rows;
  const T* q = static_cast<const T*>(a.q) + sequence * a.q_stride[0];
  const int64_t first_head = head * (a.num_q_heads / a.num_kv_heads);
  const A* lse = static_cast<const A*>(a.lse) +
                 (sequence * a.num_q_heads + first_head) * a.num_rows;
  for (int64_t r = 0; r < t.num_vectors * kLanes<A>; ++r) {
    const bool counts = r < rows && lse[r] != A(-INFINITY);
    t.lse[r] = counts ? lse[r] : A(0);
    t.counts[r] = counts ? A(1) : A(0);
    const int64_t panel = r / kPanel<A>, left = t.num_vectors * kLanes<A> - panel * kPanel<A>;
    const int64_t width = left < kPanel<A> ? left : kPanel<A>;
    A* column = t.q + panel * t.head_dim * kPanel<A> + r % kPanel<A>;
    if (!counts) {
      for (int64_t d = 0; d < t.head_dim; ++d) column[d * width] = A(0);
      continue;
    }
    const T* from =
        q + (first_head + r / a.num_rows) * a.q_stride[1] + r % a.num_rows * a.q_stride[2];
    for (int64_t d = 0; d < t.head_dim; ++d)
      column[d * width] = A(widen(from[d * a.q_stride[3]])) * A(a.scale);
  }
}

// Adds one head's share to the sums at `positions`.
template <class T, class A>
static void score_head(const VisualImportance& a, int64_t sequence, int64_t head,
                       const ScoringRows<A>& t, const int64_t* positions, int64_t count, A* out) {
  const T* keys = static_cast<const T*>(a.k_cache) + sequence * a.k_stride[0] +
                  head * a.k_stride[1];
  const A* key_rows[kScoredKeys];
  for (int64_t first = 0; first < count; first += kScoredKeys) {
    const int64_t used = count - first < kScoredKeys ? count - first : kScoredKeys;
    for (int64_t k = 0; k < used; ++k) {
      const T* from = keys + positions[first + k] * a.k_stride[2];
      if constexpr (std::is_same_v<T, A>) {
        if (a.k_stride[3] == 1) {
          key_rows[k] = from;
          continue;
        }
      }
      widen_row(from, a.k_stride[3], t.head_dim, t.keys + k * t.head_dim);
      key_rows[k] = t.keys + k * t.head_dim;
    }
    for (int64_t k = used; k < kScoredKeys; ++k) key_rows[k] = key_rows[0];  // for whole tiles
    for (int64_t i = 0; i < kScoredKeys * kLanes<A>; ++i) t.totals[i] = A(0);
    const int64_t pairs = t.num_vectors / 2;
    for (int64_t panel = 0; panel < pairs; ++panel)
      score_panel<A, 6, 2>(t, panel, key_rows, used);
    if (t.num_vectors % 2) score_panel<A, 12, 1>(t, pairs, key_rows, used);
    for (int64_t k = 0; k < used; ++k)
      out[positions[first + k]] += sum_stored(t.totals + k * kLanes<A>);
  }
}

template <class T>
static void score_positions(int64_t begin, int64_t end, void* context) {
  using A = Accumulate<T>;
  const VisualImportance& a = *static_cast<const VisualImportance*>(context);
  static thread_local Scratch<A> scratch;
  static thread_local Scratch<int64_t> positions_scratch;
  const int64_t rows = a.num_q_heads / a.num_kv_heads * a.num_rows;
  ScoringRows<A> t;
  t.head_dim = a.head_dim;
  t.num_vectors = (rows + kLanes<A> - 1) / kLanes<A>;
  const int64_t padded = t.num_vectors * kLanes<A>;
  t.q = scratch.get(padded * (a.head_dim + 2) + kScoredKeys * (kLanes<A> + a.head_dim));
  t.lse = t.q + padded * a.head_dim;
  t.counts = t.lse + padded;
  t.totals = t.counts + padded;
  t.keys = t.totals + kScoredKeys * kLanes<A>;
  int64_t* positions = positions_scratch.get(a.capacity);

  const int64_t parts = (a.capacity + kScoredPositions - 1) / kScoredPositions;
  while (begin < end) {  // the parts of one sequence at a time
    const int64_t sequence = begin / parts, last = (sequence + 1) * parts;
    const int64_t stop = last < end ? last : end;
    const int64_t first = (begin - sequence * parts) * kScoredPositions;
    int64_t past = (stop - sequence * parts) * kScoredPositions;
    past = past < a.capacity ? past : a.capacity;
    A* out = static_cast<A*>(a.out) + sequence * a.capacity;
    int64_t count = 0;
    for (int64_t n = first; n < past; ++n) {
      out[n] = A(0);
      if (n < a.kv_len[sequence] && a.visual[sequence * a.capacity + n] != 0)
        positions[count++] = n;
    }
    for (int64_t head = 0; head < a.num_kv_heads && count > 0; ++head) {
      prepare_rows<T, A>(a, sequence, head, t);
      score_head<T, A>(a, sequence, head, t, positions, count, out);
    }
    begin = stop;
  }
}

static void visual_importance(const VisualImportance& a) {
  void (*body)(int64_t, int64_t, void*) = nullptr;
  with_type(a.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) > 1) body = score_positions<T>;
  });
  const int64_t parts = (a.capacity + kScoredPositions - 1) / kScoredPositions;
  const int64_t work = a.num_q_heads * a.num_rows * a.head_dim * kScoredPositions;
  // About 20 microseconds of work at least before another thread is worth waking up.
  a.parallel_for(a.batch_size * parts, 1 + 1000000 / (work + 1), body,
                 const_cast<VisualImportance*>(&a));
}

}  // namespace lvspec::LVSPEC_ARCH

// visual_importance: see lvspec.reference.visual_importance.
//
// The keys of video positions stand side by side in panels and meet the rows of their KV head a few
// at a time; no other position is computed. A position's sum is taken over the rows in their order
// whatever its neighbours are, so the bits do not depend on how the cache is divided.
#pragma once

#include <type_traits>

#include "key_panels.h"

namespace lvspec::LVSPEC_ARCH {

// The largest tile. Where there are 16 registers only, exp needs some beside the sums of a panel.
constexpr int kScoredRows = LVSPEC_VECTOR_BYTES == 64 ? 8 : LVSPEC_VECTOR_BYTES == 32 ? 6 : 4;
constexpr int kScoredPanels = LVSPEC_VECTOR_BYTES == 64 ? 3 : 2;
constexpr int64_t kScoredPositions = 64;  // of the cache, that one thread takes at least

template <class A>
struct ScoringRows : KeyBlock<A> {
  int64_t rows;  // that saw something
  A* q;          // [rows][head_dim], times the scale
  A* lse;        // [rows]
  A* totals;     // [kKeyBlock]
  using KeyBlock<A>::KeyBlock;
};

static inline Vec<float> exp_of_any(Vec<float> x) {
  // The algorithm holds up to where exp overflows. x + inf: inf from there on, NaN for NaN.
  const Vec<int32_t> fits = x <= broadcast(88.72283f);
  return fits ? exp_nonpositive(fits ? x : Vec<float>{}) : x + INFINITY;
}

static inline Vec<double> exp_of_any(Vec<double> x) { return exp_nonpositive(x); }

// totals of the panels' keys += sum over some rows of exp(q . key - lse).
template <class A, int ROWS, int PANELS>
static inline void score_tile(const ScoringRows<A>& t, int64_t row, int64_t panel) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> logits[ROWS][PANELS];
  multiply_panels<A>(t, t.q + row * t.head_dim, panel, logits);
  for (int p = 0; p < PANELS; ++p) {
    // A tile's sum by itself, then onto that of the tiles before: rounding grows with their number.
    Vec<A> sum = exp_of_any(logits[0][p] - t.lse[row]);
    for (int r = 1; r < ROWS; ++r) sum += exp_of_any(logits[r][p] - t.lse[row + r]);
    A* total = t.totals + (panel + p) * lanes;
    store(total, load(total) + sum);
  }
}

// The rows of a KV head that saw something.
template <class T, class A>
static void prepare_rows(const VisualImportance& a, int64_t sequence, int64_t head,
                         ScoringRows<A>& t) {
  const int64_t group = a.num_q_heads / a.num_kv_heads, first_head = head * group;
  const T* q = static_cast<const T*>(a.q) + sequence * a.q_stride[0];
  const A* lse = static_cast<const A*>(a.lse) +
                 (sequence * a.num_q_heads + first_head) * a.num_rows;
  t.rows = 0;
  for (int64_t r = 0; r < group * a.num_rows; ++r) {
    if (lse[r] == A(-INFINITY)) continue;
    const T* from =
        q + (first_head + r / a.num_rows) * a.q_stride[1] + r % a.num_rows * a.q_stride[2];
    A* to = t.q + t.rows * t.head_dim;
    widen_row(from, a.q_stride[3], t.head_dim, to);
    for (int64_t d = 0; d < t.head_dim; ++d) to[d] *= A(a.scale);
    t.lse[t.rows++] = lse[r];
  }
}

// Adds one head's share to the sums at `positions`.
template <class T, class A>
static void score_head(const VisualImportance& a, int64_t sequence, int64_t head,
                       const ScoringRows<A>& t, const int64_t* positions, int64_t count, A* out) {
  const T* keys = static_cast<const T*>(a.k_cache) + sequence * a.k_stride[0] +
                  head * a.k_stride[1];
  const T* stored[kKeyBlock];
  for (int64_t first = 0; first < count; first += kKeyBlock) {
    const int64_t used = count - first < kKeyBlock ? count - first : kKeyBlock;
    for (int64_t k = 0; k < used; ++k) stored[k] = keys + positions[first + k] * a.k_stride[2];
    pack_rows<A>(t, stored, a.k_stride[3], used, nullptr);
    for (int64_t k = 0; k < kKeyBlock; ++k) t.totals[k] = A(0);
    for_tiles<kScoredPanels>((used + kLanes<A> - 1) / kLanes<A>, [&](int64_t panel, auto panels) {
      for_tiles<kScoredRows>(t.rows, [&](int64_t row, auto rows) {
        score_tile<A, rows.value, panels.value>(t, row, panel);
      });
    });
    for (int64_t k = 0; k < used; ++k) out[positions[first + k]] += t.totals[k];
  }
}

template <class T>
static void score_positions(int64_t begin, int64_t end, void* context) {
  using A = Accumulate<T>;
  const VisualImportance& a = *static_cast<const VisualImportance*>(context);
  static thread_local Scratch<A> scratch;
  static thread_local Scratch<int64_t> positions_scratch;
  const int64_t rows = a.num_q_heads / a.num_kv_heads * a.num_rows;
  ScoringRows<A> t(a.head_dim);
  t.totals = t.carve(scratch.get(t.size() + kKeyBlock + rows * (a.head_dim + 1)));
  t.lse = t.totals + kKeyBlock;
  t.q = t.lse + rows;
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

// logit_stats: see lvspec.reference.logit_stats.
//
// A row is read twice. The first time only the maximum of every block of 256 logits is taken; the
// best tokens are then looked for in the few blocks that can hold one, whatever the order of the
// row. The second time, from the cache, the exponentials are added. NaN is above no number, so the
// maxima pass over it; it shows in the sums.
#pragma once

#include <type_traits>

#include "types.h"

namespace lvspec::LVSPEC_ARCH {

constexpr int64_t kRankBlock = 256;
constexpr int64_t kSumBlock = 1024;  // sums of sums: rounding grows with the longest chain of them
constexpr int64_t kMaxTopK = 16;

template <class A>
constexpr int64_t kStep = 2 * kLanes<A>;

// Calls body(vectors) on a row piece by piece; what is missing of the last piece is -inf.
template <class T, class F>
static inline void for_each_step(const T* row, int64_t count, const F& body) {
  using A = Accumulate<T>;
  Vec<A> x[2];
  int64_t i = 0;
  for (; i + kStep<A> <= count; i += kStep<A>) {
    load_two(row + i, x);
    body(x);
  }
  if (i == count) return;
  T last[kStep<A>];
  for (int64_t j = 0; j < kStep<A>; ++j) {
    if (i + j < count)
      last[j] = row[i + j];
    else
      narrow(A(-INFINITY), &last[j]);
  }
  load_two(last, x);
  body(x);
}

static inline float next_above(float x) {
  const uint32_t bits = as_bits(x);
  return x == 0.0f ? as_float(1) : as_float(x > 0.0f ? bits + 1 : bits - 1);  // inf: NaN
}

static inline double next_above(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = x == 0.0 ? 1 : x > 0.0 ? bits + 1 : bits - 1;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The best numbers so far, best first. Offered in the order of their ids, so that equal ones stay
// in it: a later one must be above the last.
template <class A>
struct Ranking {
  A* values;
  int32_t* ids;
  int64_t size;
  A bound;  // what is below needs not be offered
  int64_t kept = 0;

  void offer(A x, int64_t id) {
    int64_t rank = kept < size ? kept++ : size - 1;
    for (; rank > 0 && values[rank - 1] < x; --rank) {
      values[rank] = values[rank - 1];
      ids[rank] = ids[rank - 1];
    }
    values[rank] = x;
    ids[rank] = int32_t(id);
    if (kept == size) bound = next_above(values[size - 1]);
  }
};

template <class T, class A>
static void rank_row(const T* row, int64_t vocabulary, const A* maxima, int64_t num_blocks,
                     int64_t top_k, int32_t* ids, A* values) {
  A bound = A(-INFINITY);
  if (num_blocks >= top_k && top_k <= kMaxTopK) {
    // The blocks' maxima are numbers of the row: no result is below the last of their best.
    A best[kMaxTopK];
    int32_t unused[kMaxTopK];
    Ranking<A> blocks = {best, unused, top_k, A(-INFINITY)};
    for (int64_t b = 0; b < num_blocks; ++b)
      if (maxima[b] >= blocks.bound) blocks.offer(maxima[b], b);
    if (blocks.kept == top_k) bound = best[top_k - 1];
  }
  Ranking<A> ranking = {values, ids, top_k, bound};
  for (int64_t b = 0; b < num_blocks; ++b) {
    if (!(maxima[b] >= ranking.bound)) continue;
    const int64_t begin = b * kRankBlock;
    const int64_t end = begin + kRankBlock < vocabulary ? begin + kRankBlock : vocabulary;
    for (int64_t i = begin; i < end; ++i) {
      A x = A(widen(row[i]));
      if (x < ranking.bound) continue;
      if (x != x) x = A(-INFINITY);
      if (x >= ranking.bound) ranking.offer(x, i);
    }
  }
}

static inline Vec<float> above_underflow(Vec<float> x) {
  const Vec<float> lowest = broadcast(-87.33654f);
  return x < lowest ? lowest : x;
}

static inline Vec<double> above_underflow(Vec<double> x) {
  const Vec<double> lowest = broadcast(-1e300);
  return x < lowest ? lowest : x;
}

// One row: ids and values of the best, and {lse, entropy}.
template <class T, class A>
static void row_statistics(const T* row, int64_t vocabulary, int64_t top_k, int32_t* ids, A* values,
                           A* lse, A* entropy) {
  static thread_local Scratch<A> scratch;
  const int64_t num_blocks = (vocabulary + kRankBlock - 1) / kRankBlock;
  A* maxima = scratch.get(num_blocks);
  A highest = A(-INFINITY);
  for (int64_t b = 0; b < num_blocks; ++b) {
    const int64_t rest = vocabulary - b * kRankBlock;
    Vec<A> best[2] = {broadcast(A(-INFINITY)), broadcast(A(-INFINITY))};
    for_each_step(row + b * kRankBlock, rest < kRankBlock ? rest : kRankBlock,
                  [&](const Vec<A>* x) {
                    best[0] = maximum<A>(x[0], best[0]);
                    best[1] = maximum<A>(x[1], best[1]);
                  });
    maxima[b] = max_lanes<A>(maximum<A>(best[0], best[1]));
    highest = maxima[b] > highest ? maxima[b] : highest;
  }
  rank_row(row, vocabulary, maxima, num_blocks, top_k, ids, values);

  if (highest - highest != A(0)) {  // infinite: all -inf or NaN, or +inf among them
    *lse = highest;
    *entropy = A(NAN);
    for (int64_t i = 0; i < vocabulary; ++i) {
      const A x = A(widen(row[i]));
      if (x != x) *lse = x;
    }
    return;
  }
  // -inf must not meet the weight 0: the product takes the lowest number whose weight is not.
  Vec<A> total[2] = {}, moment[2] = {};
  for (int64_t first = 0; first < vocabulary; first += kSumBlock) {
    const int64_t rest = vocabulary - first;
    Vec<A> weights[2] = {}, products[2] = {};
    for_each_step(row + first, rest < kSumBlock ? rest : kSumBlock, [&](const Vec<A>* x) {
      for (int half = 0; half < 2; ++half) {
        const Vec<A> below = x[half] - highest;
        const Vec<A> weight = exp_nonpositive(below);
        weights[half] += weight;
        products[half] += weight * above_underflow(below);
      }
    });
    for (int half = 0; half < 2; ++half) {
      total[half] += weights[half];
      moment[half] += products[half];
    }
  }
  const double sum = double(sum_lanes<A>(total[0] + total[1]));
  const double mean = double(sum_lanes<A>(moment[0] + moment[1])) / sum;  // NaN if there was one
  const double log_sum = ::log(sum);
  *lse = mean == mean ? A(double(highest) + log_sum) : A(NAN);
  *entropy = A(log_sum - mean);
}

template <class T>
static void row_statistics_of(int64_t begin, int64_t end, void* context) {
  using A = Accumulate<T>;
  const LogitStats& a = *static_cast<const LogitStats*>(context);
  static thread_local Scratch<T> scratch;
  for (int64_t r = begin; r < end; ++r) {
    const T* row = static_cast<const T*>(a.logits) + r / a.num_slots * a.stride[0] +
                   r % a.num_slots * a.stride[1];
    if (a.stride[2] != 1 && a.vocabulary > 1) {
      T* copy = scratch.get(a.vocabulary);
      for (int64_t i = 0; i < a.vocabulary; ++i) copy[i] = row[i * a.stride[2]];
      row = copy;
    }
    row_statistics(row, a.vocabulary, a.top_k, a.top_ids + r * a.top_k,
                   static_cast<A*>(a.top_logits) + r * a.top_k, static_cast<A*>(a.lse) + r,
                   static_cast<A*>(a.entropy) + r);
  }
}

static void logit_stats(const LogitStats& a) {
  void (*body)(int64_t, int64_t, void*) = nullptr;
  with_type(a.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) > 1) body = row_statistics_of<T>;
  });
  const int64_t grain = 1 + 30000 / (a.vocabulary + 100);  // about 20 microseconds
  a.parallel_for(a.batch_size * a.num_slots, grain, body, const_cast<LogitStats*>(&a));
}

}  // namespace lvspec::LVSPEC_ARCH

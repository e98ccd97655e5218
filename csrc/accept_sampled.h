// accept_sampled: see lvspec.reference.accept_sampled.
//
// Slots are judged one after the other, and rows behind the first rejected one are not read. A row
// is read twice: for its maximum, then for the sum of its weights, in blocks whose sums are kept.
// The bonus token is found in these sums first, then in one block, so that nothing as long as the
// vocabulary is written. Blocks are the same whoever adds them up, hence the bits.
#pragma once

#include <cfloat>

#include "accept.h"

namespace lvspec::LVSPEC_ARCH {

constexpr int64_t kSamplingBlock = 1024;

// A row of logits, and what was found out about it.
template <class A>
struct SampledRow {
  Type type;
  const void* data;
  int64_t offset, stride, size;  // in elements
  A temperature;
  A highest, total;
  bool is_regular;
  double* block_results;

  int64_t num_blocks() const { return (size + kSamplingBlock - 1) / kSamplingBlock; }
  // Of a block, whole vectors.
  int64_t length(int64_t block) const {
    const int64_t left = (size - block * kSamplingBlock + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
    return left < kSamplingBlock ? left : kSamplingBlock;
  }
};

// `length` logits of a block, those behind the row's end -inf: where they stand, or in `buffer`.
template <class A>
static const A* sampled_block(const SampledRow<A>& row, int64_t block, int64_t length, A* buffer) {
  const int64_t first = block * kSamplingBlock;
  int64_t count = row.size - first;
  count = count < 0 ? 0 : count > length ? length : count;
  const A* in_place = nullptr;
  with_type(row.type, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    const T* from = static_cast<const T*>(row.data) + row.offset + first * row.stride;
    if constexpr (std::is_same_v<T, A>) {
      if (row.stride == 1 && count == length) {
        in_place = from;
        return;
      }
    }
    widen_row(from, row.stride, count, buffer);
  });
  if (in_place != nullptr) return in_place;
  for (int64_t i = count; i < length; ++i) buffer[i] = A(-INFINITY);
  return buffer;
}

// exp((x - maximum) / temperature) of a regular row.
template <class A>
static inline Vec<A> sampling_weights(const SampledRow<A>& row, Vec<A> x) {
  return exp_nonpositive((x - row.highest) / row.temperature);
}

template <class A>
static void sampled_maxima(int64_t begin, int64_t end, void* context) {
  const SampledRow<A>& row = *static_cast<const SampledRow<A>*>(context);
  alignas(64) A buffer[kSamplingBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t length = row.length(block);
    const A* x = sampled_block(row, block, length, buffer);
    Vec<A> highest = broadcast(A(-INFINITY));
    auto has_nan = highest != highest;
    for (int64_t i = 0; i < length; i += kLanes<A>) {
      const Vec<A> values = load(x + i);
      has_nan |= values != values;
      highest = maximum<A>(values, highest);
    }
    bool is_nan = false;
    for (int64_t i = 0; i < kLanes<A>; ++i) is_nan = is_nan || has_nan[i] != 0;
    row.block_results[block] = is_nan ? double(NAN) : double(max_lanes<A>(highest));
  }
}

template <class A>
static void sampled_sums(int64_t begin, int64_t end, void* context) {
  const SampledRow<A>& row = *static_cast<const SampledRow<A>*>(context);
  alignas(64) A buffer[kSamplingBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t length = row.length(block);
    const A* x = sampled_block(row, block, length, buffer);
    Vec<A> sum{};
    for (int64_t i = 0; i < length; i += kLanes<A>)
      sum += sampling_weights(row, load(x + i));
    row.block_results[block] = double(sum_lanes<A>(sum));
  }
}

// Some 20 microseconds of work at least before another thread wakes up.
constexpr int64_t kSamplingGrain = 32;

template <class A>
static void measure_row(const AcceptSampled& a, SampledRow<A>& row) {
  a.parallel_for(row.num_blocks(), 4 * kSamplingGrain, sampled_maxima<A>, &row);
  double highest = -INFINITY;
  bool has_nan = false;
  for (int64_t block = 0; block < row.num_blocks(); ++block) {
    const double x = row.block_results[block];
    has_nan = has_nan || x != x;
    highest = x > highest ? x : highest;
  }
  row.highest = A(highest);
  row.is_regular = !has_nan && is_finite(highest);
  row.total = A(1);
  if (!row.is_regular) return;
  a.parallel_for(row.num_blocks(), kSamplingGrain, sampled_sums<A>, &row);
  double total = 0;
  for (int64_t block = 0; block < row.num_blocks(); ++block) total += row.block_results[block];
  row.total = A(total);
}

// Of a regular row; the same bits as in a block.
template <class A>
static A probability_of(const SampledRow<A>& row, int64_t token) {
  if (token < 0 || token >= row.size) return A(0);
  const A x = number_at<A>(row.type, row.data, row.offset + token * row.stride);
  return sampling_weights(row, broadcast(x))[0] / row.total;
}

// What the bonus token is drawn from: `target`, or what of it `draft` (or `proposed`) leaves.
template <class A>
struct BonusWeights {
  const SampledRow<A>* target;
  const SampledRow<A>* draft;  // null: the draft chose `proposed` without sampling
  int64_t proposed;
  bool is_residual;
  double* sums;  // of blocks
};

// The weights of a block; returns how many.
template <class A>
static int64_t bonus_weights(const BonusWeights<A>& bonus, int64_t block, A* weights) {
  alignas(64) A buffer[kSamplingBlock];
  const SampledRow<A>& target = *bonus.target;
  const int64_t length = target.length(block);
  const A* x = sampled_block(target, block, length, buffer);
  for (int64_t i = 0; i < length; i += kLanes<A>)
    store(weights + i, sampling_weights(target, load(x + i)));
  if (!bonus.is_residual) return length;
  for (int64_t i = 0; i < length; i += kLanes<A>)
    store(weights + i, load(weights + i) / target.total);
  if (bonus.draft == nullptr) {
    const int64_t inside = bonus.proposed - block * kSamplingBlock;
    if (inside >= 0 && inside < length) weights[inside] = A(0);
    return length;
  }
  const SampledRow<A>& draft = *bonus.draft;
  x = sampled_block(draft, block, length, buffer);
  for (int64_t i = 0; i < length; i += kLanes<A>) {
    const Vec<A> q = sampling_weights(draft, load(x + i)) / draft.total;
    store(weights + i, maximum<A>(load(weights + i) - q, Vec<A>{}));
  }
  return length;
}

template <class A>
static void bonus_sums(int64_t begin, int64_t end, void* context) {
  const BonusWeights<A>& bonus = *static_cast<const BonusWeights<A>*>(context);
  alignas(64) A weights[kSamplingBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t length = bonus_weights(bonus, block, weights);
    Vec<A> sum{};
    for (int64_t i = 0; i < length; i += kLanes<A>) sum += load(weights + i);
    bonus.sums[block] = double(sum_lanes<A>(sum));
  }
}

template <class A>
static int64_t draw_bonus(const BonusWeights<A>& bonus, double uniform) {
  const int64_t num_blocks = bonus.target->num_blocks();
  double total = 0;
  for (int64_t block = 0; block < num_blocks; ++block) total += bonus.sums[block];
  const double threshold = uniform * total;
  // The block in which the running sum exceeds the threshold, or the last of any weight.
  int64_t chosen = 0;
  double before = 0, running = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    if (!(bonus.sums[block] > 0)) continue;
    chosen = block, before = running;
    running += bonus.sums[block];
    if (running > threshold) break;
  }
  alignas(64) A weights[kSamplingBlock];
  const int64_t length = bonus_weights(bonus, chosen, weights);
  // Of a block whose sum was rounded up, the last as well.
  const bool is_exceeded = running > threshold;
  int64_t last = 0;
  for (int64_t i = 0; i < length; ++i) {
    if (!(weights[i] > A(0))) continue;
    last = i;
    before += double(weights[i]);
    if (is_exceeded && before > threshold) break;
  }
  return chosen * kSamplingBlock + last;
}

// As logit_stats ranks: NaN as -inf, ties to the lower id.
template <class A>
static int64_t first_maximum(const SampledRow<A>& row) {
  int64_t best = 0;
  A highest = A(-INFINITY);
  for (int64_t i = 0; i < row.size; ++i) {
    const A x = number_at<A>(row.type, row.data, row.offset + i * row.stride);
    if (x > highest) highest = x, best = i;
  }
  return best;
}

template <class A>
static int64_t accept_sampled_chain(const AcceptSampled& a, int64_t sequence, int64_t* bonus_id) {
  static thread_local Scratch<double> scratch;
  SampledRow<A> target{}, draft{};
  double temperature = a.temperature;
  // What the type rounds to 0 or inf would make NaN of 0 / 0 and -inf / inf.
  const double least = sizeof(A) == 4 ? FLT_MIN : DBL_MIN;
  const double most = sizeof(A) == 4 ? FLT_MAX : DBL_MAX;
  temperature = temperature < least ? least : temperature > most ? most : temperature;
  target.temperature = draft.temperature = A(temperature);
  target.type = a.type, draft.type = a.draft_type;
  target.data = a.logits, draft.data = a.draft_logits;
  target.size = a.vocabulary, draft.size = a.draft_vocabulary;
  target.stride = a.logits_stride[2], draft.stride = a.draft_stride[2];
  double* results = scratch.get(2 * target.num_blocks() + draft.num_blocks());
  target.block_results = results;
  draft.block_results = results + 2 * target.num_blocks();

  const int64_t in_use = a.num_slots[sequence * a.num_slots_stride];
  const int64_t last_row = (in_use < 1 ? 1 : in_use > a.num_rows ? a.num_rows : in_use) - 1;
  const int64_t* tokens = a.tokens + sequence * a.tokens_stride[0];
  const float* uniforms = a.uniforms + sequence * a.uniforms_stride[0];
  const bool is_sampled = a.draft_logits != nullptr;
  BonusWeights<A> bonus{&target, is_sampled ? &draft : nullptr, 0, false, target.block_results};
  int64_t row = 0;
  for (;; ++row) {
    target.offset = sequence * a.logits_stride[0] + row * a.logits_stride[1];
    measure_row(a, target);
    if (!target.is_regular || row == last_row) break;
    const int64_t token = tokens[(row + 1) * a.tokens_stride[1]];
    A proposed = A(1);
    if (is_sampled) {
      draft.offset = sequence * a.draft_stride[0] + row * a.draft_stride[1];
      measure_row(a, draft);
      if (!draft.is_regular) break;
      proposed = probability_of(draft, token);
    }
    const A uniform = A(uniforms[(row + 1) * a.uniforms_stride[1]]);
    if (uniform * proposed < probability_of(target, token)) continue;
    bonus.is_residual = true;
    bonus.proposed = token;
    break;
  }
  if (!target.is_regular) {
    *bonus_id = first_maximum(target);
    return row;
  }
  if (bonus.is_residual) {
    bonus.sums = results + target.num_blocks();
    a.parallel_for(target.num_blocks(), kSamplingGrain / 2, bonus_sums<A>, &bonus);
    double total = 0;
    for (int64_t block = 0; block < target.num_blocks(); ++block) total += bonus.sums[block];
    if (!(total > 0)) bonus.is_residual = false, bonus.sums = target.block_results;
  }
  *bonus_id = draw_bonus(bonus, double(uniforms[0]));
  return row;
}

template <class A>
static void accept_sampled_sequences(int64_t begin, int64_t end, void* context) {
  const AcceptSampled& a = *static_cast<const AcceptSampled*>(context);
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    const int64_t last = accept_sampled_chain<A>(a, sequence, a.bonus_id + sequence);
    for (int64_t t = 0; t < a.num_rows; ++t) {
      a.path[sequence * a.num_rows + t] = t <= last ? int32_t(t) : -1;
      a.kind[sequence * a.num_rows + t] = t <= last ? 0 : 255;
    }
    a.num_accepted[sequence] = int32_t(last);
    static_cast<A*>(a.regret)[sequence] = A(0);
  }
}

static void accept_sampled(const AcceptSampled& a) {
  // One sequence alone is left to the loops over its blocks.
  const int64_t grain = 1 + kSamplingGrain / 2 * kSamplingBlock / (a.vocabulary + 1);
  a.parallel_for(a.batch_size, grain,
                 a.type == Type::f64 ? accept_sampled_sequences<double>
                                     : accept_sampled_sequences<float>,
                 const_cast<AcceptSampled*>(&a));
}

}  // namespace lvspec::LVSPEC_ARCH

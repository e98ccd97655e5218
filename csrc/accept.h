// accept: see lvspec.reference.accept.
//
// One sequence a task, all its state on the stack. Nodes come behind their parents, so one pass over
// the slots knows of every path whether it stands; a policy of exact matches reads tokens and best
// ids only.
#pragma once

#include <type_traits>

#include "rule.h"
#include "types.h"

namespace lvspec::LVSPEC_ARCH {

template <class A>
static inline A number_at(Type type, const void* from, int64_t index) {
  A x = A(0);
  with_type(type, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    x = A(widen(static_cast<const T*>(from)[index]));
  });
  return x;
}

static inline bool is_listed(int64_t id, const int64_t* ids, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] == id) return true;
  return false;
}

template <class A>
static inline bool is_finite(A x) {
  return x - x == A(0);
}

// One sequence's draft. Of every node what became of the path that ends in it, so that a node needs
// its parent's and its own row, and at most `shift_window` nodes above it.
template <class A>
struct AcceptDraft {
  const float* rule;
  int64_t num_slots;
  int64_t token[kMaxSlots];
  int32_t parent[kMaxSlots];  // -1: none that counts
  int32_t best[kMaxSlots];    // of the slot's own row
  bool is_path[kMaxSlots];    // whether the path to it can be a part of one that stands
  bool is_mismatch[kMaxSlots], is_loose[kMaxSlots];
  A regret[kMaxSlots];        // of mismatches
  double total[kMaxSlots], spent[kMaxSlots];  // regrets of the path, without and with those before
  uint64_t waiting[kMaxSlots];  // bit k: the node k above, a late shift, waits for its word
  uint8_t depth[kMaxSlots], run[kMaxSlots], exact_run[kMaxSlots];
  bool has_mismatch[kMaxSlots];

  double number(int column) const { return double(rule[column]); }
  int64_t count(int column) const { return int64_t(rule[column]); }
  // Of nodes with a parent.
  int64_t wanted(int64_t t) const { return best[parent[t]]; }
};

template <class A>
static void read_draft(const Accept& a, int64_t sequence, AcceptDraft<A>& draft) {
  draft.rule = a.rule + sequence * a.rule_stride;
  const int64_t in_use = a.num_slots[sequence * a.num_slots_stride];
  draft.num_slots = in_use < 1 ? 1 : in_use > a.num_rows ? a.num_rows : in_use;
  const int64_t* tokens = a.tokens + sequence * a.tokens_stride[0];
  const int32_t* parents = a.parents + sequence * a.parents_stride[0];
  const int32_t* top_ids = a.top_ids + sequence * a.top_ids_stride[0];
  for (int64_t t = 0; t < draft.num_slots; ++t) {
    draft.token[t] = tokens[t * a.tokens_stride[1]];
    draft.best[t] = top_ids[t * a.top_ids_stride[1]];
    const int32_t parent = parents[t * a.parents_stride[1]];
    draft.parent[t] = parent >= 0 && parent < t ? parent : -1;
  }
}

// Entropy of the row's best tokens.
template <class A>
static A gate_entropy(const Accept& a, const A* top_logits, A lse, int64_t entropy_top) {
  const A lowest = A(sizeof(A) == 4 ? -3.4028234663852886e38 : -1.7976931348623157e308);
  A sum = A(0);
  for (int64_t i = 0; i < entropy_top && i < a.kept; ++i) {
    const A x = top_logits[i * a.top_logits_stride[2]] - lse;
    const A p = sizeof(A) == 4 ? A(::expf(float(x))) : A(::exp(double(x)));
    // Not -inf, of which 0 times is NaN. The product is rounded before it is added, whether there
    // are fused instructions or not.
    sum += A(double(p) * double(x < lowest ? lowest : x));
  }
  return -sum;
}

// What mismatch t is by itself.
struct Mismatch {
  bool is_open, is_anchor, is_shiftable;
};

// Leaves in the draft what t loses and whether it is loose.
template <class A>
static Mismatch judge_mismatch(const Accept& a, int64_t sequence, int64_t t,
                               AcceptDraft<A>& draft) {
  using namespace column;
  Mismatch found = {false, false, false};
  draft.is_loose[t] = false;
  const int64_t row = draft.parent[t], token = draft.token[t];
  const A lse = static_cast<const A*>(a.lse)[sequence * a.lse_stride[0] + row * a.lse_stride[1]];
  const A* top_logits = static_cast<const A*>(a.top_logits) + sequence * a.top_logits_stride[0] +
                        row * a.top_logits_stride[1];
  A own = A(-INFINITY);
  if (token >= 0 && token < a.vocabulary)
    own = number_at<A>(a.type, a.logits, sequence * a.logits_stride[0] +
                                             row * a.logits_stride[1] + token * a.logits_stride[2]);
  const A regret = top_logits[0] - own;
  draft.regret[t] = regret;
  const int64_t wanted = draft.best[row];
  const int64_t* strict_ids = a.strict_ids + sequence * a.num_strict_ids;
  if (is_listed(token, a.eos_ids, a.num_eos_ids)) return found;
  if (is_listed(wanted, a.eos_ids, a.num_eos_ids)) return found;
  if (is_listed(token, strict_ids, a.num_strict_ids)) return found;
  if (is_listed(wanted, strict_ids, a.num_strict_ids)) return found;
  if (!is_finite(lse) || !is_finite(regret)) return found;
  found.is_open = true;

  const double threshold = draft.number(kAnchorThreshold);
  found.is_anchor = threshold < INFINITY;
  if (found.is_anchor && a.relevance != nullptr) {
    const double relevance = number_at<double>(
        a.relevance_type, a.relevance,
        sequence * a.relevance_stride[0] + row * a.relevance_stride[1]);
    found.is_anchor = !(relevance < threshold);
  }
  found.is_shiftable = regret <= A(draft.number(kShiftRegret));
  // What is off holds a number that no open mismatch fails.
  const A log_prob = own - lse;
  bool loose = regret <= A(draft.number(found.is_anchor ? kAnchorRegret : kMaxRegret)) &&
               log_prob >= A(draft.number(kMinLogProb));
  const int64_t top_k = draft.count(kTopK);
  if (loose && top_k > 0) {
    const int32_t* ids = a.top_ids + sequence * a.top_ids_stride[0] + row * a.top_ids_stride[1];
    loose = false;
    for (int64_t i = 0; i < top_k && i < a.kept; ++i)
      loose = loose || ids[i * a.top_ids_stride[2]] == token;
  }
  if (loose && draft.number(kTypicalLogEps) > -INFINITY) {
    const A entropy = static_cast<const A*>(
        a.entropy)[sequence * a.entropy_stride[0] + row * a.entropy_stride[1]];
    const A floor = A(draft.number(kTypicalLogDelta)) - entropy;
    const A eps = A(draft.number(kTypicalLogEps));
    loose = log_prob >= (floor > eps ? eps : floor);
  }
  if (loose && draft.number(kMinEntropy) > -INFINITY)
    loose = gate_entropy(a, top_logits, lse, draft.count(kEntropyTop)) >=
            A(draft.number(kMinEntropy));
  draft.is_loose[t] = loose;
  return found;
}

// Node t behind its parent, whose path can be a part of one that stands.
template <class A>
static void extend_path(const Accept& a, int64_t sequence, int64_t t, AcceptDraft<A>& draft) {
  using namespace column;
  const int64_t above = draft.parent[t];
  const bool is_mismatch = draft.token[t] != draft.wanted(t);
  draft.depth[t] = draft.depth[above] + 1;
  draft.is_mismatch[t] = is_mismatch;
  draft.has_mismatch[t] = is_mismatch || draft.has_mismatch[above];
  draft.run[t] = is_mismatch ? draft.run[above] + 1 : 0;
  draft.exact_run[t] = is_mismatch ? 0 : draft.exact_run[above] + 1;
  draft.total[t] = draft.total[above], draft.spent[t] = draft.spent[above];
  draft.is_path[t] = true;

  const int64_t levels = draft.count(kShiftWindow);
  // Those that wait are a level further up now, unless this is their word.
  uint64_t waiting = levels > 0 ? draft.waiting[above] << 1 : 0;
  bool is_early = false;
  int64_t node = above;
  const bool looks_up = levels > 0 && (waiting != 0 || is_mismatch);
  for (int64_t level = 1; looks_up && level <= levels && node > 0; ++level) {
    const bool is_word = draft.is_mismatch[node] && draft.wanted(node) == draft.token[t];
    is_early = is_early || is_word;
    if (draft.wanted(node) == draft.token[t]) waiting &= ~(uint64_t(1) << level);
    node = draft.parent[node];
  }
  // One that waits at the last level waits in vain.
  if (levels > 0 && (waiting >> levels) & 1) draft.is_path[t] = false;
  if (is_mismatch) {
    const Mismatch found = judge_mismatch(a, sequence, t, draft);
    draft.total[t] += double(draft.regret[t]), draft.spent[t] += double(draft.regret[t]);
    const bool is_shift = found.is_shiftable && is_early && !found.is_anchor;
    const bool may_wait = found.is_shiftable && levels > 0;
    if (!found.is_open || !(draft.is_loose[t] || is_shift || may_wait)) draft.is_path[t] = false;
    if (!draft.is_loose[t] && !is_shift) waiting |= 1;
    // The mismatch before must have had its exact tokens behind it.
    const bool follows = draft.has_mismatch[above];
    if (follows && int64_t(draft.exact_run[above]) < draft.count(kWindow)) draft.is_path[t] = false;
    if (int64_t(draft.run[t]) > draft.count(kMaxRun)) draft.is_path[t] = false;
    const double budget = draft.number(kRegretBudget);
    const double earned = draft.number(kRegretRate) * double(draft.depth[t]);
    if (budget != INFINITY && !(draft.spent[t] <= budget + earned)) draft.is_path[t] = false;
  }
  draft.waiting[t] = waiting;
}

// The end of the best path.
template <class A>
static int64_t best_end(const Accept& a, int64_t sequence, double regret_used,
                        AcceptDraft<A>& draft) {
  using namespace column;
  const bool is_tolerant = draft.rule[kAnchorThreshold] > -INFINITY ||
                           draft.rule[kAnchorRegret] > -INFINITY || draft.rule[kShiftWindow] > 0;
  const int64_t window = draft.count(kWindow);
  const double weight = draft.number(kPathRegret);
  bool stands[kMaxSlots], goes_on[kMaxSlots] = {};
  draft.is_path[0] = stands[0] = true;
  draft.is_mismatch[0] = draft.has_mismatch[0] = false;
  draft.total[0] = 0, draft.spent[0] = regret_used, draft.waiting[0] = 0;
  draft.depth[0] = draft.run[0] = draft.exact_run[0] = 0;
  for (int64_t t = 1; t < draft.num_slots; ++t) {
    const int64_t above = draft.parent[t];
    draft.is_path[t] = stands[t] = false;
    if (above < 0 || !draft.is_path[above]) continue;
    if (is_listed(draft.token[above], a.eos_ids, a.num_eos_ids)) continue;
    if (!is_tolerant && draft.token[t] != draft.wanted(t)) continue;
    extend_path(a, sequence, t, draft);
    stands[t] = draft.is_path[t] && draft.waiting[t] == 0 &&
                (!draft.has_mismatch[t] || int64_t(draft.exact_run[t]) >= window);
  }
  for (int64_t t = draft.num_slots - 1; t > 0; --t)
    if (draft.parent[t] >= 0 && (stands[t] || goes_on[t])) goes_on[draft.parent[t]] = true;
  int64_t best = -1;
  double best_score = 0;
  for (int64_t t = 0; t < draft.num_slots; ++t) {
    if (!stands[t] || goes_on[t]) continue;
    // Rounded before it is subtracted, whether there are fused instructions or not.
    const volatile double cost = weight * draft.total[t];
    const double score = double(draft.depth[t]) - cost;
    const bool is_better = best < 0 || score > best_score ||
                           (score == best_score && draft.total[t] < draft.total[best]);
    if (is_better) best = t, best_score = score;
  }
  return best;
}

template <class A>
static void accept_sequences(int64_t begin, int64_t end, void* context) {
  const Accept& a = *static_cast<const Accept*>(context);
  AcceptDraft<A> draft;
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    read_draft(a, sequence, draft);
    double used = 0;
    if (a.regret_used != nullptr)
      used = number_at<double>(a.regret_used_type, a.regret_used, sequence * a.regret_used_stride);
    const int64_t last = best_end(a, sequence, used, draft);

    int32_t* path = a.path + sequence * a.num_rows;
    uint8_t* kind = a.kind + sequence * a.num_rows;
    for (int64_t i = int64_t(draft.depth[last]) + 1; i < a.num_rows; ++i)
      path[i] = -1, kind[i] = 255;
    for (int64_t t = last; t >= 0; t = draft.parent[t]) {
      path[draft.depth[t]] = int32_t(t);
      kind[draft.depth[t]] = !draft.is_mismatch[t] ? 0 : draft.is_loose[t] ? 1 : 2;
    }
    a.num_accepted[sequence] = int32_t(draft.depth[last]);
    a.bonus_id[sequence] = draft.best[last];
    static_cast<A*>(a.regret)[sequence] = A(draft.total[last]);
  }
}

static void accept(const Accept& a) {
  // A slot takes some 50 nanoseconds; 20 microseconds at least before another thread wakes up.
  a.parallel_for(a.batch_size, 1 + 400 / a.num_rows,
                 a.type == Type::f64 ? accept_sequences<double> : accept_sequences<float>,
                 const_cast<Accept*>(&a));
}

}  // namespace lvspec::LVSPEC_ARCH

// accept: see lvspec.reference.accept.
//
// One sequence a task, all its state on the stack. A node is judged when the walk reaches it and
// finds no exact one beside it, so that a policy of exact matches reads tokens and best ids only.
#pragma once

#include <type_traits>

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

// One sequence's draft, and its path.
template <class A>
struct AcceptDraft {
  int64_t num_slots;
  int64_t token[kMaxSlots];
  int32_t parent[kMaxSlots];  // -1: none that counts
  int32_t best[kMaxSlots];    // of the slot's own row
  int8_t first_child[kMaxSlots], next_sibling[kMaxSlots];  // -1: none
  A regret[kMaxSlots];        // of open mismatches, like the next two
  bool is_loose[kMaxSlots], is_early[kMaxSlots];

  int8_t path[kMaxSlots];
  int64_t length;

  // Both of nodes with a parent.
  int64_t wanted(int64_t t) const { return best[parent[t]]; }
  bool is_mismatch(int64_t t) const { return t > 0 && token[t] != wanted(t); }
};

template <class A>
static void read_draft(const Accept& a, int64_t sequence, AcceptDraft<A>& draft) {
  const int64_t in_use = a.num_slots[sequence * a.num_slots_stride];
  draft.num_slots = in_use < 1 ? 1 : in_use > a.num_rows ? a.num_rows : in_use;
  const int64_t* tokens = a.tokens + sequence * a.tokens_stride[0];
  const int32_t* parents = a.parents + sequence * a.parents_stride[0];
  const int32_t* top_ids = a.top_ids + sequence * a.top_ids_stride[0];
  for (int64_t t = draft.num_slots - 1; t >= 0; --t) {
    draft.token[t] = tokens[t * a.tokens_stride[1]];
    draft.best[t] = top_ids[t * a.top_ids_stride[1]];
    draft.first_child[t] = -1;
    const int32_t parent = parents[t * a.parents_stride[1]];
    draft.parent[t] = parent >= 0 && parent < t ? parent : -1;
  }
  // From the last on, so that lists of children begin with the lowest.
  for (int64_t t = draft.num_slots - 1; t > 0; --t) {
    const int32_t parent = draft.parent[t];
    if (parent < 0) continue;
    draft.next_sibling[t] = draft.first_child[parent];
    draft.first_child[parent] = int8_t(t);
  }
}

// Entropy of the row's best tokens.
template <class A>
static A gate_entropy(const Accept& a, const A* top_logits, A lse) {
  const A lowest = A(sizeof(A) == 4 ? -3.4028234663852886e38 : -1.7976931348623157e308);
  A sum = A(0);
  for (int64_t i = 0; i < a.entropy_top && i < a.kept; ++i) {
    const A x = top_logits[i * a.top_logits_stride[2]] - lse;
    const A p = sizeof(A) == 4 ? A(::expf(float(x))) : A(::exp(double(x)));
    // Not -inf, of which 0 times is NaN. The product is rounded before it is added, whether there
    // are fused instructions or not.
    sum += A(double(p) * double(x < lowest ? lowest : x));
  }
  return -sum;
}

// Whether mismatch t is open; if it is, what it loses and whether it is loose.
template <class A>
static bool judge_mismatch(const Accept& a, int64_t sequence, int64_t t, AcceptDraft<A>& draft) {
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
  if (is_listed(token, a.eos_ids, a.num_eos_ids)) return false;
  if (is_listed(wanted, a.eos_ids, a.num_eos_ids)) return false;
  if (is_listed(token, a.strict_ids, a.num_strict_ids)) return false;
  if (is_listed(wanted, a.strict_ids, a.num_strict_ids)) return false;
  if (!is_finite(lse) || !is_finite(regret)) return false;

  bool loose = a.anchor_threshold > 0;
  if (is_finite(a.anchor_threshold)) {
    loose = false;
    if (a.relevance != nullptr) {
      const double relevance = number_at<double>(
          a.relevance_type, a.relevance,
          sequence * a.relevance_stride[0] + row * a.relevance_stride[1]);
      loose = relevance < a.anchor_threshold;
    }
  }
  // What is off holds a number that no open mismatch fails.
  const A log_prob = own - lse;
  loose = loose && regret <= A(a.max_regret) && log_prob >= A(a.min_log_prob);
  if (loose && a.top_k > 0) {
    const int32_t* ids = a.top_ids + sequence * a.top_ids_stride[0] + row * a.top_ids_stride[1];
    loose = false;
    for (int64_t i = 0; i < a.top_k && i < a.kept; ++i)
      loose = loose || ids[i * a.top_ids_stride[2]] == token;
  }
  if (loose && a.typical_log_eps > -INFINITY) {
    const A entropy = static_cast<const A*>(
        a.entropy)[sequence * a.entropy_stride[0] + row * a.entropy_stride[1]];
    const A floor = A(a.typical_log_delta) - entropy, eps = A(a.typical_log_eps);
    loose = log_prob >= (floor > eps ? eps : floor);
  }
  if (loose && a.min_entropy > -INFINITY)
    loose = gate_entropy(a, top_logits, lse) >= A(a.min_entropy);
  draft.is_loose[t] = loose;
  return true;
}

// Whether open mismatch t, at index `length` of the path, brings what one above it displaced.
template <class A>
static bool brings_displaced(const AcceptDraft<A>& draft, int64_t t, int64_t levels) {
  for (int64_t i = draft.length - 1; i >= 1 && i >= draft.length - levels; --i) {
    const int64_t above = draft.path[i];
    if (draft.is_mismatch(above) && draft.wanted(above) == draft.token[t]) return true;
  }
  return false;
}

// Whether a descendant, at most `levels` below, brings what open mismatch t displaced.
template <class A>
static bool is_brought_below(const AcceptDraft<A>& draft, int64_t t, int64_t levels) {
  const int64_t wanted = draft.wanted(t);
  for (int64_t node = t + 1; node < draft.num_slots; ++node) {
    if (draft.token[node] != wanted) continue;
    int64_t above = node;
    for (int64_t level = 0; level < levels && above > t; ++level) above = draft.parent[above];
    if (above == t) return true;
  }
  return false;
}

template <class A>
static void walk_draft(const Accept& a, int64_t sequence, AcceptDraft<A>& draft) {
  const bool is_tolerant = a.anchor_threshold > -INFINITY || a.shift_window > 0;
  draft.path[0] = 0;
  draft.length = 1;
  for (int64_t last = 0; last >= 0;) {
    if (is_listed(draft.token[last], a.eos_ids, a.num_eos_ids)) return;
    int64_t chosen = draft.first_child[last];
    while (chosen >= 0 && draft.token[chosen] != draft.best[last])
      chosen = draft.next_sibling[chosen];
    if (chosen < 0 && is_tolerant) {
      for (int64_t t = draft.first_child[last]; t >= 0; t = draft.next_sibling[t]) {
        if (!judge_mismatch(a, sequence, t, draft)) continue;
        draft.is_early[t] = brings_displaced(draft, t, a.shift_window);
        if (!draft.is_loose[t] && !draft.is_early[t] && !is_brought_below(draft, t, a.shift_window))
          continue;
        if (chosen < 0 || draft.regret[t] < draft.regret[chosen]) chosen = t;
      }
    }
    if (chosen >= 0) draft.path[draft.length++] = int8_t(chosen);
    last = chosen;
  }
}

// Whether the mismatch at index i stands, but for runs and budget.
template <class A>
static bool stands(const Accept& a, const AcceptDraft<A>& draft, int64_t i) {
  if (a.window >= draft.length - i) return false;
  for (int64_t behind = i + 1; behind <= i + a.window; ++behind)
    if (draft.is_mismatch(draft.path[behind])) return false;
  const int64_t t = draft.path[i];
  if (draft.is_loose[t] || draft.is_early[t]) return true;
  for (int64_t behind = i + 1; behind < draft.length && behind - i <= a.shift_window; ++behind)
    if (draft.token[draft.path[behind]] == draft.wanted(t)) return true;
  return false;
}

template <class A>
static void cut_path(const Accept& a, double regret_used, AcceptDraft<A>& draft) {
  bool is_shortened = true;
  while (is_shortened) {
    is_shortened = false;
    int64_t run = 0;
    double spent = regret_used;
    for (int64_t i = 1; i < draft.length; ++i) {
      const int64_t t = draft.path[i];
      if (!draft.is_mismatch(t)) {
        run = 0;
        continue;
      }
      ++run, spent += double(draft.regret[t]);
      const bool affordable = a.regret_budget == INFINITY || spent <= a.regret_budget;
      if (run > a.max_run || !affordable || !stands(a, draft, i)) {
        draft.length = i;
        is_shortened = true;
      }
    }
  }
}

template <class A>
static void accept_sequences(int64_t begin, int64_t end, void* context) {
  const Accept& a = *static_cast<const Accept*>(context);
  AcceptDraft<A> draft;
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    read_draft(a, sequence, draft);
    walk_draft(a, sequence, draft);
    double used = 0;
    if (a.regret_used != nullptr)
      used = number_at<double>(a.regret_used_type, a.regret_used, sequence * a.regret_used_stride);
    cut_path(a, used, draft);

    double regret = 0;
    int32_t* path = a.path + sequence * a.num_rows;
    uint8_t* kind = a.kind + sequence * a.num_rows;
    for (int64_t i = 0; i < a.num_rows; ++i) {
      if (i >= draft.length) {
        path[i] = -1, kind[i] = 255;
        continue;
      }
      const int64_t t = draft.path[i];
      path[i] = int32_t(t), kind[i] = 0;
      if (draft.is_mismatch(t)) {
        kind[i] = draft.is_loose[t] ? 1 : 2;
        regret += double(draft.regret[t]);
      }
    }
    a.num_accepted[sequence] = int32_t(draft.length - 1);
    a.bonus_id[sequence] = draft.best[draft.path[draft.length - 1]];
    static_cast<A*>(a.regret)[sequence] = A(regret);
  }
}

static void accept(const Accept& a) {
  // A slot takes some 50 nanoseconds; 20 microseconds at least before another thread wakes up.
  a.parallel_for(a.batch_size, 1 + 400 / a.num_rows,
                 a.type == Type::f64 ? accept_sequences<double> : accept_sequences<float>,
                 const_cast<Accept*>(&a));
}

}  // namespace lvspec::LVSPEC_ARCH

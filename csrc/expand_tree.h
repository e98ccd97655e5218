// expand_tree: see lvspec.reference.expand_tree.
//
// The statistics of all rows first, then, sequence by sequence, a merge of the nodes' children: a
// node's are sorted already, but for tokens that rounding makes equal.
#pragma once

#include "logit_stats.h"

namespace lvspec::LVSPEC_ARCH {

template <class A>
struct TreeChildren {
  const ExpandTree& a;
  const A* lse;     // [B, W]
  A* log_probs;     // [B, W, top_k]; logits at first
  int32_t* tokens;  // [B, W, top_k]
};

// Log-probabilities of a node's children from their logits, best first, ties to the lower token.
template <class A>
static void rank_children(A log_prob, A lse, int64_t count, A* values, int32_t* tokens) {
  for (int64_t i = 0; i < count; ++i) {
    A x = log_prob + (values[i] - lse);
    if (x != x) x = A(-INFINITY);
    if (x == A(INFINITY)) x = sizeof(A) == 4 ? A(__FLT_MAX__) : A(__DBL_MAX__);
    const int32_t token = tokens[i];
    int64_t rank = i;
    for (; rank > 0; --rank) {
      const bool is_before =
          x > values[rank - 1] || (x == values[rank - 1] && token < tokens[rank - 1]);
      if (!is_before) break;
      values[rank] = values[rank - 1];
      tokens[rank] = tokens[rank - 1];
    }
    values[rank] = x;
    tokens[rank] = token;
  }
}

template <class A>
static void merge_children(int64_t begin, int64_t end, void* context) {
  const TreeChildren<A>& t = *static_cast<const TreeChildren<A>*>(context);
  const ExpandTree& a = t.a;
  static thread_local Scratch<int64_t> scratch;
  int64_t* taken = scratch.get(a.num_nodes);
  for (int64_t b = begin; b < end; ++b) {
    A* values = t.log_probs + b * a.num_nodes * a.top_k;
    int32_t* tokens = t.tokens + b * a.num_nodes * a.top_k;
    for (int64_t w = 0; w < a.num_nodes; ++w) {
      const A log_prob = static_cast<const A*>(
          a.log_probs)[b * a.log_probs_stride[0] + w * a.log_probs_stride[1]];
      rank_children(log_prob, t.lse[b * a.num_nodes + w], a.top_k, values + w * a.top_k,
                    tokens + w * a.top_k);
      taken[w] = 0;
    }
    for (int64_t i = 0; i < a.width; ++i) {
      int64_t node = -1, child = 0;
      for (int64_t w = 0; w < a.num_nodes; ++w) {
        const int64_t candidate = w * a.top_k + taken[w];
        if (taken[w] == a.top_k || (node >= 0 && !(values[candidate] > values[child]))) continue;
        node = w;
        child = candidate;
      }
      ++taken[node];
      a.out_tokens[b * a.width + i] = tokens[child];
      a.out_parents[b * a.width + i] =
          a.slots[b * a.slots_stride[0] + node * a.slots_stride[1]];
      static_cast<A*>(a.out_log_probs)[b * a.width + i] = values[child];
    }
  }
}

template <class A>
static void expand_level(const ExpandTree& a) {
  static thread_local Scratch<A> scratch;
  static thread_local Scratch<int32_t> ids_scratch;
  const int64_t rows = a.batch_size * a.num_nodes;
  A* numbers = scratch.get(rows * (a.top_k + 2));
  LogitStats stats = {};
  stats.type = a.type;
  stats.logits = a.logits;
  stats.lse = numbers;
  stats.entropy = numbers + rows;
  stats.top_logits = numbers + 2 * rows;
  stats.top_ids = ids_scratch.get(rows * a.top_k);
  stats.batch_size = a.batch_size;
  stats.num_slots = a.num_nodes;
  stats.vocabulary = a.vocabulary;
  stats.top_k = a.top_k;
  for (int i = 0; i < 3; ++i) stats.stride[i] = a.logits_stride[i];
  stats.parallel_for = a.parallel_for;
  logit_stats(stats);

  TreeChildren<A> children = {a, numbers, numbers + 2 * rows, stats.top_ids};
  const int64_t grain = 1 + 15000 / (a.num_nodes * (a.top_k + a.width) + 1);
  a.parallel_for(a.batch_size, grain, merge_children<A>, &children);
}

static void expand_tree(const ExpandTree& a) {
  if (a.type == Type::f64)
    expand_level<double>(a);
  else
    expand_level<float>(a);
}

}  // namespace lvspec::LVSPEC_ARCH

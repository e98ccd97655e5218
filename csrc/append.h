// append: what `commit` in lvspec/phases/commit.py does to a few numbers a sequence, in one call.
//
// The same as lvspec.reference.append in PyTorch, which states it. No vectors: it is over before they
// would pay.
#pragma once

#include <cstring>

#include "types.h"

namespace lvspec::LVSPEC_ARCH {

template <class S>
static void append_sequence(const Append& a, int64_t b) {
  const int64_t slots = a.num_slots, accepted = a.num_accepted[b], bonus = a.bonus_id[b];
  const int32_t* path = a.path + b * slots;
  const int64_t* tokens = a.tokens + b * slots;
  // What is no slot counts as the root, which is on every path.
  const auto row = [&](int64_t i) { return path[i] < 0 ? 0 : path[i]; };
  bool& finished = a.finished[b];
  int32_t& count = a.num_out[b];
  int64_t end = -1, nan_row = a.no_nan;
  int64_t* report = a.report + b * (kReportHead + slots);
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t next = (i + 1) % slots;
    const int64_t token = i < accepted ? tokens[row(next)] : bonus;
    const int64_t offset = b * a.width + count + i;  // those behind the kept are scratch
    a.out_ids[offset] = report[kReportHead + i] = token;
    a.out_kinds[offset] = i < accepted ? a.kind[b * slots + next] : a.bonus_kind;
    if (a.relevance != nullptr) a.out_relevance[offset] = a.relevance[b * slots + row(i)];
    for (int64_t e = 0; e < a.num_eos_ids && i <= accepted && end < 0; ++e)
      if (token == a.eos_ids[e]) end = i;
    const S lse = static_cast<const S*>(a.lse)[b * slots + row(i)];
    if (lse != lse && nan_row == a.no_nan) nan_row = row(i);
  }
  int64_t kept = end < 0 ? accepted + 1 : end + 1;
  kept = kept < a.max_new[0] - count ? kept : a.max_new[0] - count;
  a.last_two[2 * b] = tokens[row(accepted)];
  a.last_two[2 * b + 1] = bonus;
  if (!finished) {
    static_cast<S*>(a.regret_used)[b] += static_cast<const S*>(a.regret)[b];
    count += int32_t(kept);
  }
  finished = finished || end >= 0 || count >= a.max_new[0];
  // The rows of what is finished are never read again, and must not run out of the cache.
  if (!finished) a.kv_len[b] += int32_t(accepted) + 1;
  report[0] = count, report[1] = finished, report[2] = nan_row;
  report[3] = accepted, report[4] = a.drafted_slots[b];
  const double used = double(static_cast<const S*>(a.regret_used)[b]);
  std::memcpy(report + 5, &used, sizeof used);
}

static void append_sequences(int64_t begin, int64_t end, void* context) {
  const Append& a = *static_cast<const Append*>(context);
  for (int64_t b = begin; b < end; ++b) {
    if (a.type == Type::f64)
      append_sequence<double>(a, b);
    else
      append_sequence<float>(a, b);
  }
}

static void append(const Append& a) {
  a.parallel_for(a.batch_size, 256, append_sequences, const_cast<Append*>(&a));
}

}  // namespace lvspec::LVSPEC_ARCH

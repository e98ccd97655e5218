// gate: see lvspec.reference.gate.
#pragma once

#include <cstring>

#include "rule.h"
#include "types.h"

namespace lvspec::LVSPEC_ARCH {

// The bin of a relevance, -1 for NaN: exponent and two bits of the mantissa.
static inline int64_t bin_of(float x) {
  if (x != x) return -1;
  if (!(x > 0)) return 0;
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t bin = (bits >> 21) - ((127 << 2) - int32_t(kGateBins));
  return bin < 0 ? 0 : bin >= kGateBins ? kGateBins - 1 : bin;
}

static inline float lower_end(int64_t bin) {
  const int32_t bits = int32_t(bin + ((127 << 2) - kGateBins)) << 21;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static void gate_sequence(const Gate& a, int64_t sequence) {
  using namespace column;
  const float* given = a.rule + sequence * a.rule_stride;
  const int32_t* before = a.seen + sequence * a.seen_stride;
  float* rule = a.new_rule + sequence * kCount;
  int32_t* seen = a.new_seen + sequence * kGateBins;
  for (int i = 0; i < kCount; ++i) rule[i] = given[i * a.rule_stride_column];
  for (int64_t i = 0; i < kGateBins; ++i) seen[i] = before[i * a.seen_stride_bin];
  if (!(rule[kGateRows] > 0)) return;
  int64_t rows = a.num_slots[sequence * a.num_slots_stride];
  rows = rows < 1 ? 1 : rows > a.num_rows ? a.num_rows : rows;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = sequence * a.relevance_stride[0] + r * a.relevance_stride[1];
    const float x = a.relevance_type == Type::f64
                        ? float(static_cast<const double*>(a.relevance)[at])
                        : static_cast<const float*>(a.relevance)[at];
    const int64_t bin = bin_of(x);
    if (bin >= 0) ++seen[bin];
  }
  int64_t n = 0, s = 0;
  for (int64_t i = 0; i < kGateBins; ++i) n += seen[i], s += seen[i] * i;
  int64_t cut = -1, n0 = 0, s0 = 0, cut_n0 = 0, cut_apart = 0;
  double most = 0;
  for (int64_t k = 0; k < kGateBins - 1; ++k) {
    n0 += seen[k], s0 += seen[k] * k;
    const int64_t n1 = n - n0;
    if (n0 == 0 || n1 == 0) continue;
    const int64_t apart = (s - s0) * n0 - s0 * n1;
    const double between = double(apart) * double(apart) / double(n0 * n1);
    if (between > most) most = between, cut = k, cut_n0 = n0, cut_apart = apart;
  }
  const bool found = cut >= 0 && double(n) >= double(rule[kGateRows]) &&
                     cut_apart >= kGateDistance * cut_n0 * (n - cut_n0);
  if (found) {
    rule[kAnchorThreshold] = lower_end(cut + 1);
  } else {
    rule[kAnchorThreshold] = rule[kAnchorRegret] = -INFINITY;
    rule[kShiftWindow] = 0;
  }
}

static void gate_sequences(int64_t begin, int64_t end, void* context) {
  for (int64_t sequence = begin; sequence < end; ++sequence)
    gate_sequence(*static_cast<const Gate*>(context), sequence);
}

static void gate(const Gate& a) {
  // A sequence takes less than a microsecond.
  a.parallel_for(a.batch_size, 64, gate_sequences, const_cast<Gate*>(&a));
}

}  // namespace lvspec::LVSPEC_ARCH

// Columns of a rule. Written from lvspec.rule.Rule:
//   python -c "from lvspec.rule import rule_header as h; print(h(), end=str())" > csrc/rule.h
#pragma once

namespace lvspec::column {

enum : int {
  kAnchorThreshold,
  kAnchorRegret,
  kMaxRegret,
  kTopK,
  kMinLogProb,
  kTypicalLogEps,
  kTypicalLogDelta,
  kMinEntropy,
  kEntropyTop,
  kShiftWindow,
  kShiftRegret,
  kWindow,
  kMaxRun,
  kRegretBudget,
  kRegretRate,
  kPathRegret,
  kGateRows,
  kRandomShare,
  kRandomSeed,
  kCount,
};

}  // namespace lvspec::column

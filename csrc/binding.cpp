// The C++ operations as implementations of torch.ops.lvspec.* on the CPU, through torch's stable ABI.
//
// Schemas are defined in Python (lvspec/ops/registry.py), arguments are checked there too.
#include "binding.h"

#include <cstdlib>

#include "rule.h"

namespace lvspec {

static const Kernels& choose_kernels() {
  const char* wanted = std::getenv("LVSPEC_CPU");
  const bool any = wanted == nullptr || *wanted == '\0';
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (any || std::strcmp(wanted, "avx512") == 0)) return avx512_kernels();
  if (has_avx2 && (any || std::strcmp(wanted, "avx2") == 0)) return avx2_kernels();
#endif
  return portable_kernels();
}

const Kernels& binding::kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

namespace {

using namespace binding;

std::tuple<Tensor, Tensor, Tensor, Tensor> verify_attention(
    Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_len, Tensor ancestors, Tensor visual,
    double scale, std::optional<Tensor> block_table, std::optional<Tensor> plan_start,
    std::optional<Tensor> plan_end, std::optional<Tensor> plan_kind, std::optional<Tensor> k_scale,
    std::optional<Tensor> v_scale, bool scores, std::optional<Tensor> /*workspace*/) {
  VerifyAttention a{};
  a.batch_size = q.size(0), a.num_q_heads = q.size(1);
  a.num_slots = q.size(2), a.head_dim = q.size(3);
  a.num_kv_heads = k_cache.size(1), a.capacity = k_cache.size(2);
  if (block_table.has_value()) {
    block_table = packed(*block_table);
    a.page_size = k_cache.size(2), a.num_pages = k_cache.size(0);
    a.max_pages = block_table->size(1), a.capacity *= a.max_pages;
    a.block_table = pointer<int32_t>(*block_table);
  }
  if (plan_start.has_value()) {
    plan_start = packed(*plan_start), plan_end = packed(*plan_end), plan_kind = packed(*plan_kind);
    a.num_pieces = plan_start->size(1);
  }
  kv_len = packed(kv_len), ancestors = packed(ancestors), visual = packed(visual);
  if (k_scale.has_value()) k_scale = packed(*k_scale);
  if (v_scale.has_value()) v_scale = packed(*v_scale);

  const ScalarType statistics = statistics_type(q);
  const int64_t B = a.batch_size, H = a.num_q_heads, S = a.num_slots;
  Tensor out = empty(q, {B, H, S, a.head_dim}, q.scalar_type());
  Tensor lse = empty(q, {B, H, S}, statistics);
  Tensor mass = scores ? empty(q, {B, H, S}, statistics) : empty(q, {0}, statistics);
  Tensor peak = scores ? empty(q, {B, H, S}, statistics) : empty(q, {0}, statistics);

  a.type = type_of(q), a.stored = type_of(k_cache);
  a.q = q.const_data_ptr(), a.k_cache = k_cache.const_data_ptr(),
  a.v_cache = v_cache.const_data_ptr();
  a.kv_len = pointer<int32_t>(kv_len);
  a.ancestors = pointer<int64_t>(ancestors);
  a.visual = pointer<uint8_t>(visual);
  a.scale = scale;
  a.plan_start = pointer_or_null<int32_t>(plan_start);
  a.plan_end = pointer_or_null<int32_t>(plan_end);
  a.plan_kind = pointer_or_null<int32_t>(plan_kind);
  a.k_scale = pointer_or_null<float>(k_scale);
  a.v_scale = pointer_or_null<float>(v_scale);
  a.out = out.mutable_data_ptr(), a.lse = lse.mutable_data_ptr();
  a.mass = scores ? mass.mutable_data_ptr() : nullptr;
  a.peak = scores ? peak.mutable_data_ptr() : nullptr;
  copy_strides(q, a.q_stride);
  copy_strides(k_cache, a.k_stride);
  copy_strides(v_cache, a.v_stride);
  a.parallel_for = parallel_for;
  kernels().verify_attention(a);
  return {out, lse, mass, peak};
}

using AcceptanceTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The results of accept and accept_sampled, in the arguments of either.
template <class Arguments>
AcceptanceTensors new_acceptance(const Tensor& logits, Arguments& a) {
  a.type = type_of(logits);
  a.batch_size = logits.size(0), a.num_rows = logits.size(1), a.vocabulary = logits.size(2);
  if (a.num_rows < 1 || a.num_rows > kMaxSlots)
    throw std::runtime_error("lvspec: more slots than lvspec.ops lets through");
  const int64_t B = a.batch_size, S = a.num_rows;
  Tensor path = empty(logits, {B, S}, ScalarType::Int);
  Tensor num_accepted = empty(logits, {B}, ScalarType::Int);
  Tensor bonus_id = empty(logits, {B}, ScalarType::Long);
  Tensor kind = empty(logits, {B, S}, ScalarType::Byte);
  Tensor regret = empty(logits, {B}, statistics_type(logits));
  a.path = static_cast<int32_t*>(path.mutable_data_ptr());
  a.num_accepted = static_cast<int32_t*>(num_accepted.mutable_data_ptr());
  a.bonus_id = static_cast<int64_t*>(bonus_id.mutable_data_ptr());
  a.kind = static_cast<uint8_t*>(kind.mutable_data_ptr());
  a.regret = regret.mutable_data_ptr();
  a.parallel_for = parallel_for;
  return {path, num_accepted, bonus_id, kind, regret};
}

AcceptanceTensors accept(
    Tensor logits, Tensor tokens, Tensor parents, Tensor num_slots, Tensor top_ids,
    Tensor top_logits, Tensor lse, Tensor entropy, std::optional<Tensor> relevance,
    std::optional<Tensor> regret_used, Tensor strict_ids, Tensor eos_ids, Tensor rule) {
  Accept a{};
  AcceptanceTensors result = new_acceptance(logits, a);
  strict_ids = packed(strict_ids), eos_ids = packed(eos_ids), rule = packed(rule);
  a.logits = logits.const_data_ptr();
  a.tokens = pointer<int64_t>(tokens), a.parents = pointer<int32_t>(parents);
  a.num_slots = pointer<int32_t>(num_slots), a.top_ids = pointer<int32_t>(top_ids);
  a.top_logits = top_logits.const_data_ptr();
  a.lse = lse.const_data_ptr(), a.entropy = entropy.const_data_ptr();
  a.strict_ids = pointer<int64_t>(strict_ids), a.eos_ids = pointer<int64_t>(eos_ids);
  a.num_strict_ids = strict_ids.size(1), a.num_eos_ids = eos_ids.size(0);
  a.kept = top_ids.size(2);
  copy_strides(logits, a.logits_stride), copy_strides(tokens, a.tokens_stride);
  copy_strides(parents, a.parents_stride), copy_strides(num_slots, &a.num_slots_stride);
  copy_strides(top_ids, a.top_ids_stride), copy_strides(top_logits, a.top_logits_stride);
  copy_strides(lse, a.lse_stride), copy_strides(entropy, a.entropy_stride);
  if (relevance.has_value()) {
    a.relevance = relevance->const_data_ptr(), a.relevance_type = type_of(*relevance);
    copy_strides(*relevance, a.relevance_stride);
  }
  if (regret_used.has_value()) {
    a.regret_used = regret_used->const_data_ptr(), a.regret_used_type = type_of(*regret_used);
    copy_strides(*regret_used, &a.regret_used_stride);
  }
  if (rule.size(1) != column::kCount)
    throw std::runtime_error("lvspec: the C++ operations were built for other rules; install again");
  a.rule = pointer<float>(rule), a.rule_stride = rule.size(1);
  kernels().accept(a);
  return result;
}

std::tuple<Tensor, Tensor> gate(Tensor relevance, Tensor num_slots, Tensor rule, Tensor seen) {
  Gate a{};
  a.batch_size = relevance.size(0), a.num_rows = relevance.size(1);
  if (rule.size(1) != column::kCount)
    throw std::runtime_error("lvspec: the C++ operations were built for other rules; install again");
  Tensor new_rule = empty(rule, {a.batch_size, rule.size(1)}, ScalarType::Float);
  Tensor new_seen = empty(seen, {a.batch_size, kGateBins}, ScalarType::Int);
  a.relevance = relevance.const_data_ptr(), a.relevance_type = type_of(relevance);
  a.num_slots = pointer<int32_t>(num_slots), a.rule = pointer<float>(rule);
  a.seen = pointer<int32_t>(seen);
  a.new_rule = static_cast<float*>(new_rule.mutable_data_ptr());
  a.new_seen = static_cast<int32_t*>(new_seen.mutable_data_ptr());
  copy_strides(relevance, a.relevance_stride), copy_strides(num_slots, &a.num_slots_stride);
  a.rule_stride = rule.stride(0), a.rule_stride_column = rule.stride(1);
  a.seen_stride = seen.stride(0), a.seen_stride_bin = seen.stride(1);
  a.parallel_for = parallel_for;
  kernels().gate(a);
  return {new_rule, new_seen};
}

AcceptanceTensors accept_sampled(Tensor logits, std::optional<Tensor> draft_logits, Tensor tokens,
                                 Tensor num_slots, Tensor uniforms, double temperature,
                                 std::optional<Tensor> /*workspace*/) {
  AcceptSampled a{};
  AcceptanceTensors result = new_acceptance(logits, a);
  a.logits = logits.const_data_ptr();
  a.tokens = pointer<int64_t>(tokens), a.num_slots = pointer<int32_t>(num_slots);
  a.uniforms = pointer<float>(uniforms);
  copy_strides(logits, a.logits_stride), copy_strides(tokens, a.tokens_stride);
  copy_strides(num_slots, &a.num_slots_stride), copy_strides(uniforms, a.uniforms_stride);
  if (draft_logits.has_value()) {
    a.draft_logits = draft_logits->const_data_ptr(), a.draft_type = type_of(*draft_logits);
    a.draft_vocabulary = draft_logits->size(2);
    copy_strides(*draft_logits, a.draft_stride);
  }
  a.temperature = temperature;
  kernels().accept_sampled(a);
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logit_stats(Tensor logits, int64_t top_k,
                                                       std::optional<Tensor>) {
  LogitStats a{};
  a.type = type_of(logits);
  a.batch_size = logits.size(0), a.num_slots = logits.size(1), a.vocabulary = logits.size(2);
  a.top_k = top_k;
  const ScalarType statistics = statistics_type(logits);
  const int64_t B = a.batch_size, S = a.num_slots;
  Tensor top_ids = empty(logits, {B, S, top_k}, ScalarType::Int);
  Tensor top_logits = empty(logits, {B, S, top_k}, statistics);
  Tensor lse = empty(logits, {B, S}, statistics);
  Tensor entropy = empty(logits, {B, S}, statistics);
  a.logits = logits.const_data_ptr();
  a.top_ids = static_cast<int32_t*>(top_ids.mutable_data_ptr());
  a.top_logits = top_logits.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr(), a.entropy = entropy.mutable_data_ptr();
  copy_strides(logits, a.stride);
  a.parallel_for = parallel_for;
  kernels().logit_stats(a);
  return {top_ids, top_logits, lse, entropy};
}

std::tuple<Tensor, Tensor, Tensor> expand_tree(Tensor logits, Tensor log_probs, Tensor slots,
                                               int64_t width, int64_t top_k,
                                               std::optional<Tensor>) {
  ExpandTree a{};
  a.type = type_of(logits);
  a.batch_size = logits.size(0), a.num_nodes = logits.size(1), a.vocabulary = logits.size(2);
  a.width = width, a.top_k = top_k;
  Tensor tokens = empty(logits, {a.batch_size, width}, ScalarType::Long);
  Tensor parents = empty(logits, {a.batch_size, width}, ScalarType::Int);
  Tensor best = empty(logits, {a.batch_size, width}, statistics_type(logits));
  a.logits = logits.const_data_ptr(), a.log_probs = log_probs.const_data_ptr();
  a.slots = pointer<int32_t>(slots);
  a.out_tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  a.out_parents = static_cast<int32_t*>(parents.mutable_data_ptr());
  a.out_log_probs = best.mutable_data_ptr();
  copy_strides(logits, a.logits_stride);
  copy_strides(log_probs, a.log_probs_stride);
  copy_strides(slots, a.slots_stride);
  a.parallel_for = parallel_for;
  kernels().expand_tree(a);
  return {tokens, parents, best};
}

void commit_kv(Tensor k_cache, Tensor v_cache, Tensor kv_len, Tensor path, Tensor num_accepted) {
  CommitKv a{};
  const int64_t first = k_cache.dim() - 4;  // 0: one layer
  a.num_layers = first == 0 ? 1 : k_cache.size(0);
  a.batch_size = k_cache.size(first), a.num_kv_heads = k_cache.size(first + 1);
  a.capacity = k_cache.size(first + 2), a.head_dim = k_cache.size(first + 3);
  a.num_slots = path.size(1);
  kv_len = packed(kv_len), path = packed(path), num_accepted = packed(num_accepted);
  a.kv_len = pointer<int32_t>(kv_len), a.path = pointer<int32_t>(path);
  a.num_accepted = pointer<int32_t>(num_accepted);
  a.element_size = static_cast<int64_t>(k_cache.element_size());
  a.k_cache = k_cache.mutable_data_ptr(), a.v_cache = v_cache.mutable_data_ptr();
  copy_strides(k_cache, a.k_stride + 1 - first);
  copy_strides(v_cache, a.v_stride + 1 - first);
  a.parallel_for = parallel_for;
  kernels().commit_kv(a);
}

Tensor visual_importance(Tensor q, Tensor k_cache, Tensor kv_len, Tensor visual, Tensor lse,
                         double scale) {
  VisualImportance a{};
  a.type = type_of(q);
  a.batch_size = q.size(0), a.num_q_heads = q.size(1), a.num_rows = q.size(2);
  a.head_dim = q.size(3), a.num_kv_heads = k_cache.size(1), a.capacity = k_cache.size(2);
  kv_len = packed(kv_len), visual = packed(visual), lse = packed(lse);
  Tensor importance = empty(q, {a.batch_size, a.capacity}, statistics_type(q));
  a.q = q.const_data_ptr(), a.k_cache = k_cache.const_data_ptr(), a.lse = lse.const_data_ptr();
  a.kv_len = pointer<int32_t>(kv_len), a.visual = pointer<uint8_t>(visual);
  a.scale = scale;
  a.out = importance.mutable_data_ptr();
  copy_strides(q, a.q_stride);
  copy_strides(k_cache, a.k_stride);
  a.parallel_for = parallel_for;
  kernels().visual_importance(a);
  return importance;
}

// Everything lvspec/phases/commit.py passes; dtypes and shapes are those of DecodeState and Acceptance.
Tensor append(Tensor out_ids, Tensor out_kinds, Tensor out_relevance, Tensor num_out,
                  Tensor max_new, Tensor last_two, Tensor regret_used, Tensor finished,
                  Tensor eos_ids, Tensor kv_len, Tensor tokens, Tensor num_slots, Tensor path,
                  Tensor num_accepted, Tensor bonus_id, Tensor kind, Tensor regret, Tensor lse,
                  std::optional<Tensor> relevance, int64_t /*head*/, int64_t bonus_kind,
              int64_t no_nan) {
  Append a{};
  tokens = packed(tokens), num_slots = packed(num_slots), lse = packed(lse);
  if (relevance.has_value()) relevance = packed(*relevance);
  a.batch_size = tokens.size(0), a.num_slots = tokens.size(1), a.width = out_ids.size(1);
  a.num_eos_ids = eos_ids.size(0), a.no_nan = no_nan, a.bonus_kind = uint8_t(bonus_kind);
  if (type_of(regret_used) != type_of(lse) || type_of(regret) != type_of(lse))
    throw std::runtime_error("lvspec: expected regret_used, regret and lse of one type");
  a.type = type_of(lse);
  a.out_ids = static_cast<int64_t*>(out_ids.mutable_data_ptr());
  a.out_kinds = static_cast<uint8_t*>(out_kinds.mutable_data_ptr());
  a.out_relevance = static_cast<float*>(out_relevance.mutable_data_ptr());
  a.num_out = static_cast<int32_t*>(num_out.mutable_data_ptr());
  a.max_new = pointer<int32_t>(max_new);
  a.last_two = static_cast<int64_t*>(last_two.mutable_data_ptr());
  a.regret_used = regret_used.mutable_data_ptr();
  a.finished = static_cast<bool*>(finished.mutable_data_ptr());
  a.eos_ids = pointer<int64_t>(eos_ids);
  a.kv_len = static_cast<int32_t*>(kv_len.mutable_data_ptr());
  a.tokens = pointer<int64_t>(tokens), a.path = pointer<int32_t>(path);
  a.num_accepted = pointer<int32_t>(num_accepted), a.bonus_id = pointer<int64_t>(bonus_id);
  a.kind = pointer<uint8_t>(kind), a.drafted_slots = pointer<int32_t>(num_slots);
  a.regret = regret.const_data_ptr(), a.lse = lse.const_data_ptr();
  a.relevance = pointer_or_null<float>(relevance);
  Tensor report = empty(tokens, {a.batch_size, kReportHead + a.num_slots}, ScalarType::Long);
  a.report = static_cast<int64_t*>(report.mutable_data_ptr());
  a.parallel_for = parallel_for;
  kernels().append(a);
  return report;
}

}  // namespace
}  // namespace lvspec

// Read by lvspec.ops.backends with ctypes.
extern "C" __attribute__((visibility("default"))) const char* lvspec_instruction_set() {
  return lvspec::binding::kernels().name;
}

STABLE_TORCH_LIBRARY_IMPL(lvspec, CPU, m) {
  m.impl("append", TORCH_BOX(&lvspec::append));
  m.impl("verify_attention", TORCH_BOX(&lvspec::verify_attention));
  m.impl("accept", TORCH_BOX(&lvspec::accept));
  m.impl("accept_sampled", TORCH_BOX(&lvspec::accept_sampled));
  m.impl("gate", TORCH_BOX(&lvspec::gate));
  m.impl("logit_stats", TORCH_BOX(&lvspec::logit_stats));
  m.impl("expand_tree", TORCH_BOX(&lvspec::expand_tree));
  m.impl("commit_kv", TORCH_BOX(&lvspec::commit_kv));
  m.impl("visual_importance", TORCH_BOX(&lvspec::visual_importance));
}

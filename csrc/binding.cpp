// The C++ operations as implementations of torch.ops.lvspec.* on the CPU, through torch's stable ABI.
//
// Schemas are defined in Python (lvspec/ops/registry.py), arguments are checked there too.
#include "binding.h"

#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>

#include "rule.h"

namespace {

using namespace lvspec::binding;

const lvspec::Kernels& choose_kernels() {
  const char* wanted = std::getenv("LVSPEC_CPU");
  const bool any = wanted == nullptr || *wanted == '\0';
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (any || std::strcmp(wanted, "avx512") == 0)) return lvspec::avx512_kernels();
  if (has_avx2 && (any || std::strcmp(wanted, "avx2") == 0)) return lvspec::avx2_kernels();
#endif
  return lvspec::portable_kernels();
}

}  // namespace

const lvspec::Kernels& lvspec::binding::kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> verify_attention(
    Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_len, Tensor ancestors, Tensor visual,
    double scale, std::optional<Tensor> block_table, std::optional<Tensor> plan_start,
    std::optional<Tensor> plan_end, std::optional<Tensor> plan_kind, std::optional<Tensor> k_scale,
    std::optional<Tensor> v_scale, bool scores, std::optional<Tensor> /*workspace*/) {
  lvspec::VerifyAttention a{};
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
  if (a.num_rows < 1 || a.num_rows > lvspec::kMaxSlots)
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
  lvspec::Accept a{};
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
  if (rule.size(1) != lvspec::column::kCount)
    throw std::runtime_error("lvspec: the C++ operations were built for other rules; install again");
  a.rule = pointer<float>(rule), a.rule_stride = rule.size(1);
  kernels().accept(a);
  return result;
}

std::tuple<Tensor, Tensor> gate(Tensor relevance, Tensor num_slots, Tensor rule, Tensor seen) {
  lvspec::Gate a{};
  a.batch_size = relevance.size(0), a.num_rows = relevance.size(1);
  if (rule.size(1) != lvspec::column::kCount)
    throw std::runtime_error("lvspec: the C++ operations were built for other rules; install again");
  Tensor new_rule = empty(rule, {a.batch_size, rule.size(1)}, ScalarType::Float);
  Tensor new_seen = empty(seen, {a.batch_size, lvspec::kGateBins}, ScalarType::Int);
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
  lvspec::AcceptSampled a{};
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
  lvspec::LogitStats a{};
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
  lvspec::ExpandTree a{};
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
  lvspec::CommitKv a{};
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
  lvspec::VisualImportance a{};
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
Tensor cpu_append(Tensor out_ids, Tensor out_kinds, Tensor out_relevance, Tensor num_out,
                  Tensor max_new, Tensor last_two, Tensor regret_used, Tensor finished,
                  Tensor eos_ids, Tensor kv_len, Tensor tokens, Tensor num_slots, Tensor path,
                  Tensor num_accepted, Tensor bonus_id, Tensor kind, Tensor regret, Tensor lse,
                  std::optional<Tensor> relevance, int64_t bonus_kind, int64_t no_nan) {
  lvspec::Append a{};
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
  Tensor report = empty(tokens, {a.batch_size, lvspec::kReportHead + a.num_slots}, ScalarType::Long);
  a.report = static_cast<int64_t*>(report.mutable_data_ptr());
  a.parallel_for = parallel_for;
  kernels().append(a);
  return report;
}

// From here on: operations of recorded passes. lvspec/models/recorder.py and lvspec/models/fused see to it that
// tensors are float32 and weights contiguous.
Tensor cpu_linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  lvspec::Linear a{};
  a.inputs = weight.size(1), a.outputs = weight.size(0);
  a.rows = x.numel() / a.inputs;
  x = packed(x);
  Tensor y = empty(x, {x.size(0), x.size(1), a.outputs}, ScalarType::Float);
  a.x = pointer<float>(x), a.weight = pointer<float>(weight);
  a.bias = pointer_or_null<float>(bias);
  a.y = static_cast<float*>(y.mutable_data_ptr());
  a.parallel_for = parallel_for;
  kernels().linear(a);
  return y;
}

Tensor cpu_gated_linear(Tensor x, Tensor gate, Tensor up) {
  lvspec::GatedLinear a{};
  a.inputs = gate.size(1), a.outputs = gate.size(0);
  a.rows = x.numel() / a.inputs;
  x = packed(x);
  Tensor y = empty(x, {x.size(0), x.size(1), a.outputs}, ScalarType::Float);
  a.x = pointer<float>(x), a.gate = pointer<float>(gate), a.up = pointer<float>(up);
  a.y = static_cast<float*>(y.mutable_data_ptr());
  a.parallel_for = parallel_for;
  kernels().gated_linear(a);
  return y;
}

Tensor cpu_silu_multiply(Tensor gate, Tensor up) {
  lvspec::SiluMultiply a{};
  gate = packed(gate), up = packed(up);
  Tensor y = empty(gate, {gate.size(0), gate.size(1), gate.size(2)}, ScalarType::Float);
  a.gate = pointer<float>(gate), a.up = pointer<float>(up);
  a.y = static_cast<float*>(y.mutable_data_ptr());
  a.count = y.numel();
  a.parallel_for = parallel_for;
  kernels().silu_multiply(a);
  return y;
}

Tensor cpu_rms_norm(Tensor x, Tensor weight, double eps) {
  lvspec::RmsNorm a{};
  a.size = weight.size(0), a.eps = eps;
  x = packed(x);
  a.rows = x.numel() / a.size;
  Tensor y = empty(x, {x.size(0), x.size(1), x.size(2)}, ScalarType::Float);
  a.x = pointer<float>(x), a.weight = pointer<float>(weight);
  a.y = static_cast<float*>(y.mutable_data_ptr());
  a.parallel_for = parallel_for;
  kernels().rms_norm(a);
  return y;
}

std::tuple<Tensor, Tensor> cpu_rotary_angles(Tensor positions, Tensor frequencies, Tensor sections,
                                             double scaling) {
  lvspec::RotaryAngles a{};
  a.batch_size = positions.size(1), a.num_slots = positions.size(2);
  a.head_dim = 2 * frequencies.size(0), a.num_sections = sections.size(0);
  frequencies = packed(frequencies), sections = packed(sections);
  Tensor cos = empty(frequencies, {a.batch_size, a.num_slots, a.head_dim}, ScalarType::Float);
  Tensor sin = empty(frequencies, {a.batch_size, a.num_slots, a.head_dim}, ScalarType::Float);
  a.positions = pointer<int64_t>(positions), a.frequencies = pointer<float>(frequencies);
  a.sections = pointer<int64_t>(sections), a.scaling = scaling;
  a.cos = static_cast<float*>(cos.mutable_data_ptr());
  a.sin = static_cast<float*>(sin.mutable_data_ptr());
  copy_strides(positions, a.positions_stride);
  a.parallel_for = parallel_for;
  kernels().rotary_angles(a);
  return {cos, sin};
}

// Strides of heads that stand side by side in the rows of a projection.
void projected_strides(int64_t num_heads, int64_t num_slots, int64_t head_dim, int64_t* to) {
  to[0] = num_slots * num_heads * head_dim, to[1] = head_dim, to[2] = num_heads * head_dim;
  to[3] = 1;
}

// Queries, keys and values [B, S, heads * D] as they come from their projections; caches of all
// layers. Returns the turned queries, [B, Hq, S, D].
Tensor cpu_rotate_and_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor k_cache,
                            Tensor v_cache, int64_t layer, Tensor kv_len) {
  q = packed(q), k = packed(k), v = packed(v), cos = packed(cos), sin = packed(sin);
  kv_len = packed(kv_len);
  lvspec::WriteKv w{};
  w.batch_size = q.size(0), w.num_kv_heads = k_cache.size(2), w.num_slots = q.size(1);
  w.capacity = k_cache.size(3), w.head_dim = k_cache.size(4);
  w.kv_len = pointer<int32_t>(kv_len);
  for (int64_t b = 0; b < w.batch_size; ++b)
    if (w.kv_len[b] < 0 || w.kv_len[b] + w.num_slots > w.capacity)
      throw std::runtime_error("lvspec: expected kv_len with room for the slots in the cache, "
                               "got " + std::to_string(w.kv_len[b]) + " with " +
                               std::to_string(w.num_slots) + " slots and a capacity of " +
                               std::to_string(w.capacity));
  lvspec::Rotate r{};
  r.cos = pointer<float>(cos), r.sin = pointer<float>(sin);
  r.batch_size = w.batch_size, r.num_slots = w.num_slots, r.head_dim = w.head_dim;
  r.parallel_for = w.parallel_for = parallel_for;
  const auto turned = [&](const Tensor& x) {
    r.num_heads = x.size(2) / r.head_dim;
    projected_strides(r.num_heads, r.num_slots, r.head_dim, r.x_stride);
    Tensor y = empty(x, {r.batch_size, r.num_heads, r.num_slots, r.head_dim}, ScalarType::Float);
    r.x = pointer<float>(x), r.y = static_cast<float*>(y.mutable_data_ptr());
    kernels().rotate(r);
    return y;
  };
  const Tensor keys = turned(k);
  w.element_size = sizeof(float);
  w.k = keys.const_data_ptr(), w.v = v.const_data_ptr();
  copy_strides(keys, w.k_stride);
  projected_strides(w.num_kv_heads, w.num_slots, w.head_dim, w.v_stride);
  for (int64_t i = 0; i < 4; ++i)
    w.k_cache_stride[i] = k_cache.stride(i + 1), w.v_cache_stride[i] = v_cache.stride(i + 1);
  w.k_cache = static_cast<float*>(k_cache.mutable_data_ptr()) + layer * k_cache.stride(0);
  w.v_cache = static_cast<float*>(v_cache.mutable_data_ptr()) + layer * v_cache.stride(0);
  kernels().write_kv(w);
  return turned(q);
}

}  // namespace

// Read by lvspec.ops.backends with ctypes.
extern "C" __attribute__((visibility("default"))) const char* lvspec_instruction_set() {
  return kernels().name;
}

STABLE_TORCH_LIBRARY_FRAGMENT(lvspec, m) {
  m.def("cpu_append(Tensor(a!) out_ids, Tensor(b!) out_kinds, Tensor(c!) out_relevance, "
        "Tensor(d!) num_out, Tensor max_new, Tensor(e!) last_two, Tensor(f!) regret_used, "
        "Tensor(g!) finished, Tensor eos_ids, Tensor(h!) kv_len, Tensor tokens, Tensor num_slots, "
        "Tensor path, Tensor num_accepted, Tensor bonus_id, Tensor kind, Tensor regret, Tensor lse, "
        "Tensor? relevance, int bonus_kind, int no_nan) -> Tensor");
  m.def("cpu_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("cpu_gated_linear(Tensor x, Tensor gate, Tensor up) -> Tensor");
  m.def("cpu_silu_multiply(Tensor gate, Tensor up) -> Tensor");
  m.def("cpu_rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def(
      "cpu_rotary_angles(Tensor positions, Tensor frequencies, Tensor sections, float scaling) -> "
      "(Tensor, Tensor)");
  m.def(
      "cpu_rotate_and_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, "
      "Tensor(a!) k_cache, Tensor(b!) v_cache, int layer, Tensor kv_len) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lvspec, CPU, m) {
  m.impl("cpu_append", TORCH_BOX(&cpu_append));
  m.impl("cpu_linear", TORCH_BOX(&cpu_linear));
  m.impl("cpu_gated_linear", TORCH_BOX(&cpu_gated_linear));
  m.impl("cpu_silu_multiply", TORCH_BOX(&cpu_silu_multiply));
  m.impl("cpu_rms_norm", TORCH_BOX(&cpu_rms_norm));
  m.impl("cpu_rotary_angles", TORCH_BOX(&cpu_rotary_angles));
  m.impl("cpu_rotate_and_write", TORCH_BOX(&cpu_rotate_and_write));
  m.impl("verify_attention", TORCH_BOX(&verify_attention));
  m.impl("accept", TORCH_BOX(&accept));
  m.impl("accept_sampled", TORCH_BOX(&accept_sampled));
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("logit_stats", TORCH_BOX(&logit_stats));
  m.impl("expand_tree", TORCH_BOX(&expand_tree));
  m.impl("commit_kv", TORCH_BOX(&commit_kv));
  m.impl("visual_importance", TORCH_BOX(&visual_importance));
}

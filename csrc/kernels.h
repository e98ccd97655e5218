// What the kernels are given: raw pointers, sizes and strides, nothing of torch.
//
// Strides count elements. Meaning, shapes and ranges are those of lvspec.reference; the caller has
// checked them. Tensors without a stride here are contiguous.
#pragma once

#include <cstdint>

namespace lvspec {

// Numbers that lvspec/models/cpu_pass.py knows too.
enum class Type : int32_t { f32, bf16, f16, f64, f8_e4m3 };

// Calls body(begin, end, context) on ranges that together are [0, count), on any threads.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*),
                             void* context);

struct VerifyAttention {
  Type type, stored;  // of q and out; of the caches
  const void *q, *k_cache, *v_cache;
  const int32_t* kv_len;
  const int64_t* ancestors;
  const uint8_t* visual;
  double scale;
  const int32_t* block_table;  // null: not paged
  const int32_t *plan_start, *plan_end, *plan_kind;  // null: no plan
  const float *k_scale, *v_scale;  // null: 1
  void *out, *lse;
  void *mass, *peak;  // null: not wanted
  int64_t batch_size, num_q_heads, num_kv_heads, num_slots, head_dim, capacity;
  int64_t page_size, max_pages, num_pages, num_pieces;
  int64_t q_stride[4], k_stride[4], v_stride[4];
  ParallelFor parallel_for;
};

// The most draft slots a pass has; `accept` keeps a sequence of them on the stack.
constexpr int64_t kMaxSlots = 64;

struct Accept {
  Type type;                            // of logits; statistics are float64 where these are
  Type relevance_type, regret_used_type;  // f32 or f64
  const void* logits;
  const int64_t* tokens;
  const int32_t *parents, *num_slots, *top_ids;
  const void *top_logits, *lse, *entropy;
  const void *relevance, *regret_used;  // null: not given
  const int64_t *strict_ids, *eos_ids;
  const float* rule;  // columns of rule.h
  int32_t *path, *num_accepted;
  int64_t* bonus_id;
  uint8_t* kind;
  void* regret;
  int64_t batch_size, num_rows, vocabulary, kept, num_strict_ids, num_eos_ids;
  int64_t logits_stride[3], tokens_stride[2], parents_stride[2], num_slots_stride;
  int64_t top_ids_stride[3], top_logits_stride[3], lse_stride[2], entropy_stride[2];
  int64_t relevance_stride[2], regret_used_stride;
  int64_t rule_stride;  // of sequences; columns are next to each other, and strict_ids packed
  ParallelFor parallel_for;
};

// Bins of a sequence's rows, and how far apart its two kinds of rows are: lvspec/rule.py.
constexpr int64_t kGateBins = 64, kGateDistance = 4;

struct Gate {
  Type relevance_type;  // f32 or f64
  const void* relevance;
  const int32_t* num_slots;
  const float* rule;
  const int32_t* seen;
  float* new_rule;
  int32_t* new_seen;
  int64_t batch_size, num_rows;
  int64_t relevance_stride[2], num_slots_stride;
  int64_t rule_stride, rule_stride_column, seen_stride, seen_stride_bin;
  ParallelFor parallel_for;
};

struct AcceptSampled {
  Type type, draft_type;
  const void *logits, *draft_logits;  // draft_logits null: chosen without sampling
  const int64_t* tokens;
  const int32_t* num_slots;
  const float* uniforms;
  double temperature;
  int32_t *path, *num_accepted;
  int64_t* bonus_id;
  uint8_t* kind;
  void* regret;
  int64_t batch_size, num_rows, vocabulary, draft_vocabulary;
  int64_t logits_stride[3], draft_stride[3], tokens_stride[2], num_slots_stride;
  int64_t uniforms_stride[2];
  ParallelFor parallel_for;
};

struct LogitStats {
  Type type;
  const void* logits;
  int32_t* top_ids;
  void *top_logits, *lse, *entropy;
  int64_t batch_size, num_slots, vocabulary, top_k;
  int64_t stride[3];
  ParallelFor parallel_for;
};

struct ExpandTree {
  Type type;
  const void *logits, *log_probs;
  const int32_t* slots;
  int64_t* out_tokens;
  int32_t* out_parents;
  void* out_log_probs;
  int64_t batch_size, num_nodes, vocabulary, width, top_k;
  int64_t logits_stride[3], log_probs_stride[2], slots_stride[2];
  ParallelFor parallel_for;
};

struct CommitKv {
  int64_t element_size;
  void *k_cache, *v_cache;
  const int32_t *kv_len, *path, *num_accepted;
  int64_t num_layers, batch_size, num_kv_heads, capacity, head_dim, num_slots;
  int64_t k_stride[5], v_stride[5];
  ParallelFor parallel_for;
};

struct VisualImportance {
  Type type;
  const void *q, *k_cache;
  const int32_t* kv_len;
  const uint8_t* visual;
  const void* lse;
  double scale;
  void* out;
  int64_t batch_size, num_q_heads, num_kv_heads, num_rows, capacity, head_dim;
  int64_t q_stride[4], k_stride[4];
  ParallelFor parallel_for;
};

struct Linear {
  const float *x, *weight, *bias;  // [rows, inputs], [outputs, inputs], [outputs] or null
  float* y;                        // [rows, outputs]
  int64_t rows, inputs, outputs;
  ParallelFor parallel_for;
};

struct GatedLinear {
  const float *x, *gate, *up;  // [rows, inputs], [outputs, inputs] both
  float* y;                    // [rows, outputs]
  int64_t rows, inputs, outputs;
  ParallelFor parallel_for;
};

// Which of the 16-bit types hold every weight exactly.
constexpr uint8_t kExactF16 = 1, kExactBf16 = 2;

struct ExactTypes {
  const float* weight;
  int64_t count;
  uint8_t* types;  // of the bits above those stay that hold for these weights too
  ParallelFor parallel_for;
};

// To panels of Kernels::panel outputs each, [panels][inputs][panel]. Their order within a panel is
// that of the instruction set. What stands beside the outputs given here stays as it is.
struct PackWeights {
  Type type;            // f16, bf16 or f32: one in which every weight is exact
  const float* weight;  // [outputs, inputs]
  void* packed;         // zeros where no output stands
  int64_t outputs, inputs;
  int64_t first_output;  // of `packed`: matrices stand one after the other
  int64_t first_panel, panel_step;  // 0, 1; or 0, 2 for gates and 1, 2 for ups, see PackedLinear
  ParallelFor parallel_for;
};

struct PackedLinear {
  Type type;  // of packed: f16, bf16 or f32
  const float* x;  // [rows, inputs]
  const void* packed;
  const float *bias, *residual;  // [outputs], [rows, outputs] (perhaps y itself); or null
  float* y;                      // [rows, outputs]
  int64_t rows, inputs, outputs;
  bool is_gated;  // y = silu(gate) * up: panels of gates and of ups in turn; no bias
  ParallelFor parallel_for;
};

struct SiluMultiply {
  const float *gate, *up;
  float* y;
  int64_t count;
  ParallelFor parallel_for;
};

struct RmsNorm {
  const float *x, *weight;  // [rows, size], [size]
  float* y;
  double eps;
  int64_t rows, size;
  ParallelFor parallel_for;
};

struct Rotate {
  const float* x;          // [batch_size, num_heads, num_slots, head_dim]
  const float *cos, *sin;  // [batch_size, num_slots, head_dim]
  float* y;                // as x, contiguous
  int64_t batch_size, num_heads, num_slots, head_dim;
  int64_t x_stride[4];     // of the last dimension: 1
  ParallelFor parallel_for;
};

struct RotaryAngles {
  const int64_t* positions;   // [rows, batch_size, num_slots]
  const float* frequencies;   // [head_dim / 2]
  const int32_t* dimensions;  // [head_dim / 2], which row of positions each multiplies
  double scaling;
  float *cos, *sin;           // [batch_size, num_slots, head_dim]
  int64_t batch_size, num_slots, head_dim;
  int64_t positions_stride[3];
  ParallelFor parallel_for;
};

struct WriteKv {
  int64_t element_size;
  const void *k, *v;  // [batch_size, num_kv_heads, num_slots, head_dim]
  void *k_cache, *v_cache;
  const int32_t* kv_len;
  int64_t batch_size, num_kv_heads, num_slots, capacity, head_dim;
  int64_t k_stride[4], v_stride[4];  // last dimension: 1
  int64_t k_cache_stride[4], v_cache_stride[4];
  ParallelFor parallel_for;
};

// Of commit in lvspec/phases/commit.py; [B, num_slots] but for out_*, which are [B, width].
constexpr int64_t kReportHead = 6;

struct Append {
  Type type;  // of lse and regrets: f32 or f64
  int64_t* out_ids;
  uint8_t* out_kinds;
  float* out_relevance;
  int32_t* num_out;
  const int32_t* max_new;
  int64_t* last_two;
  void* regret_used;
  bool* finished;
  const int64_t* eos_ids;
  int32_t* kv_len;
  const int64_t* tokens;
  const int32_t *path, *num_accepted;
  const int64_t* bonus_id;
  const uint8_t* kind;
  const void *regret, *lse;
  const float* relevance;  // null: not given
  const int32_t* drafted_slots;
  int64_t* report;  // [B, kReportHead + num_slots], see lvspec/engine/mailbox.py
  int64_t batch_size, num_slots, width, num_eos_ids, no_nan;
  uint8_t bonus_kind;
  ParallelFor parallel_for;
};

// Weights of a product in text_pass: float32 [outputs, inputs] as HF has them, or packed in a 16-bit type.
struct PassWeight {
  const void* data;
  Type type;  // f32: not packed

  bool is_packed() const { return type != Type::f32; }
};

// One decoder layer of text_pass. Of q, k and v, and of gate and up, the first stands for all where it is
// packed, with its bias. Biases and head norms may be null.
struct PassLayer {
  const float *input_norm, *post_norm, *q_norm, *k_norm;
  PassWeight q, k, v, out, gate, up, down;
  const float *q_bias, *k_bias, *v_bias, *out_bias;
  double input_eps, post_eps, head_eps, scaling;
};

// A pass over slots, see text_pass.h. Tensors of the cache are those of all layers.
struct TextPass {
  const int64_t* tokens;  // [batch_size, num_slots]; null: hidden is there already
  const int64_t* depths;  // [num_slots], or [batch_size, num_slots] with their stride
  const int64_t* ancestors;
  float *k_cache, *v_cache;
  const int32_t* kv_len;
  const uint8_t* visual;
  const int64_t* positions;       // [position_rows, batch_size, capacity]
  const PassLayer* layers;
  const float *embedding, *norm;  // norm null: hidden is all that is wanted
  PassWeight head;                // likewise
  const float* frequencies;       // [head_dim / 2]
  const int32_t* dimensions;      // [head_dim / 2], which row of positions each multiplies
  double norm_eps, angle_scaling;
  float *hidden;                  // [batch_size, num_slots, width]
  float *logits;                  // [batch_size, num_slots, outputs]
  float *mass, *peak;             // [num_layers, batch_size, num_q_heads, num_slots], or null
  int64_t batch_size, num_slots, width, inner, num_layers, first_layer, outputs;
  int64_t num_q_heads, num_kv_heads, head_dim, capacity, position_rows;
  int64_t depths_stride;          // of sequences
  int64_t k_stride[5], v_stride[5];
  ParallelFor parallel_for;
};

struct Kernels {
  const char* name;
  int64_t panel;    // outputs of a panel of packed weights
  bool widens_f16;  // at no cost to speak of; else 16 bits of that type are slower than 32
  void (*verify_attention)(const VerifyAttention&);
  void (*accept)(const Accept&);
  void (*accept_sampled)(const AcceptSampled&);
  void (*gate)(const Gate&);
  void (*logit_stats)(const LogitStats&);
  void (*expand_tree)(const ExpandTree&);
  void (*commit_kv)(const CommitKv&);
  void (*visual_importance)(const VisualImportance&);
  void (*linear)(const Linear&);
  void (*gated_linear)(const GatedLinear&);
  void (*find_exact_types)(const ExactTypes&);
  void (*pack_weights)(const PackWeights&);
  void (*packed_linear)(const PackedLinear&);
  void (*silu_multiply)(const SiluMultiply&);
  void (*rms_norm)(const RmsNorm&);
  void (*rotate)(const Rotate&);
  void (*rotary_angles)(const RotaryAngles&);
  void (*write_kv)(const WriteKv&);
  void (*append)(const Append&);
  void (*text_pass)(const TextPass&);
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace lvspec

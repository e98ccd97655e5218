// Parts of text models, and a whole pass of one, as implementations of torch.ops.lvspec.* on the CPU.
//
// lvspec.ops and lvspec/models/cpu_pass.py see to it that tensors are float32 and weights contiguous.
#include "binding.h"

#include <vector>

namespace lvspec {
namespace {

using namespace binding;

Tensor silu_multiply(Tensor gate, Tensor up) {
  SiluMultiply a{};
  gate = packed(gate), up = packed(up);
  Tensor y = new_like(gate);
  a.gate = pointer<float>(gate), a.up = pointer<float>(up), a.y = numbers(y);
  a.count = y.numel();
  a.parallel_for = parallel_for;
  kernels().silu_multiply(a);
  return y;
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  RmsNorm a{};
  a.size = weight.size(0), a.eps = eps;
  x = packed(x);
  a.rows = x.numel() / a.size;
  Tensor y = new_like(x);
  a.x = pointer<float>(x), a.weight = pointer<float>(weight), a.y = numbers(y);
  a.parallel_for = parallel_for;
  kernels().rms_norm(a);
  return y;
}

std::tuple<Tensor, Tensor> rotary_angles(Tensor positions, Tensor frequencies, Tensor dimensions,
                                         double scaling, ScalarType) {
  RotaryAngles a{};
  a.batch_size = positions.size(1), a.num_slots = positions.size(2);
  a.head_dim = 2 * frequencies.size(0);
  frequencies = packed(frequencies), dimensions = packed(dimensions);
  Tensor cos = empty(frequencies, {a.batch_size, a.num_slots, a.head_dim}, ScalarType::Float);
  Tensor sin = empty(frequencies, {a.batch_size, a.num_slots, a.head_dim}, ScalarType::Float);
  a.positions = pointer<int64_t>(positions), a.frequencies = pointer<float>(frequencies);
  a.dimensions = pointer<int32_t>(dimensions), a.scaling = scaling;
  a.cos = numbers(cos), a.sin = numbers(sin);
  copy_strides(positions, a.positions_stride);
  a.parallel_for = parallel_for;
  kernels().rotary_angles(a);
  return {cos, sin};
}

void check_room(const Tensor& kv_len, int64_t num_slots, int64_t capacity) {
  for (int64_t b = 0; b < kv_len.size(0); ++b) {
    const int32_t length = pointer<int32_t>(kv_len)[b];
    if (length < 0 || length + num_slots > capacity)
      throw std::runtime_error("lvspec: expected kv_len with room for the slots in the cache, got " +
                               std::to_string(length) + " with " + std::to_string(num_slots) +
                               " slots and a capacity of " + std::to_string(capacity));
  }
}

// Queries, keys and values stand side by side in rows [B, S, (Hq + 2 Hkv) * D]; caches of all layers.
// Returns the turned queries, [B, Hq, S, D].
Tensor rotate_and_write(Tensor qkv, Tensor cos, Tensor sin, std::optional<Tensor> q_norm,
                        std::optional<Tensor> k_norm, double eps, Tensor k_cache, Tensor v_cache,
                        int64_t layer, Tensor kv_len) {
  qkv = packed(qkv), cos = packed(cos), sin = packed(sin), kv_len = packed(kv_len);
  WriteKv w{};
  w.batch_size = qkv.size(0), w.num_slots = qkv.size(1), w.num_kv_heads = k_cache.size(2);
  w.capacity = k_cache.size(3), w.head_dim = k_cache.size(4);
  w.kv_len = pointer<int32_t>(kv_len);
  const int64_t D = w.head_dim, B = w.batch_size, S = w.num_slots, width = qkv.size(2);
  const int64_t num_q_heads = width / D - 2 * w.num_kv_heads;
  Rotate r{};
  r.cos = pointer<float>(cos), r.sin = pointer<float>(sin);
  r.batch_size = B, r.num_slots = S, r.head_dim = D;
  r.parallel_for = w.parallel_for = parallel_for;
  const auto turned = [&](int64_t first, int64_t heads, const std::optional<Tensor>& norm) {
    Tensor y = empty(qkv, {B, heads, S, D}, ScalarType::Float);
    const float* x = pointer<float>(qkv) + first * D;
    const int64_t strides[4] = {S * width, D, width, 1};
    r.num_heads = heads, r.y = numbers(y);
    std::optional<Tensor> normed;
    if (norm.has_value()) {
      normed = empty(qkv, {B, S, heads, D}, ScalarType::Float);
      for (int64_t row = 0; row < B * S; ++row) {
        float* to = numbers(*normed) + row * heads * D;
        kernels().rms_norm({x + row * width, pointer<float>(*norm), to, eps, heads, D, parallel_for});
      }
      const int64_t packed_strides[4] = {S * heads * D, D, heads * D, 1};
      r.x = numbers(*normed);
      std::memcpy(r.x_stride, packed_strides, sizeof packed_strides);
    } else {
      r.x = x;
      std::memcpy(r.x_stride, strides, sizeof strides);
    }
    kernels().rotate(r);
    return y;
  };
  const Tensor keys = turned(num_q_heads, w.num_kv_heads, k_norm);
  w.element_size = sizeof(float);
  w.k = keys.const_data_ptr();
  w.v = pointer<float>(qkv) + (num_q_heads + w.num_kv_heads) * D;
  copy_strides(keys, w.k_stride);
  const int64_t value_strides[4] = {S * width, D, width, 1};
  std::memcpy(w.v_stride, value_strides, sizeof value_strides);
  for (int64_t i = 0; i < 4; ++i)
    w.k_cache_stride[i] = k_cache.stride(i + 1), w.v_cache_stride[i] = v_cache.stride(i + 1);
  w.k_cache = numbers(k_cache) + layer * k_cache.stride(0);
  w.v_cache = numbers(v_cache) + layer * v_cache.stride(0);
  kernels().write_kv(w);
  return turned(0, num_q_heads, q_norm);
}

// The table that lvspec/models/cpu_pass.py makes of a model: numbers, addresses, bits of float64.
// Columns of both are the fields there, in this order.
struct Columns {
  const int64_t* next;

  int64_t integer() { return *next++; }
  double number() {
    double value;
    std::memcpy(&value, next++, sizeof value);
    return value;
  }
  template <class T>
  const T* address() {
    return reinterpret_cast<const T*>(static_cast<intptr_t>(*next++));
  }
  PassWeight weight() {
    const void* data = address<void>();
    return {data, static_cast<Type>(integer())};
  }
};

PassLayer read_layer(Columns& c) {
  PassLayer layer{};
  layer.input_norm = c.address<float>(), layer.input_eps = c.number();
  layer.q = c.weight(), layer.k = c.weight(), layer.v = c.weight();
  layer.q_bias = c.address<float>(), layer.k_bias = c.address<float>();
  layer.v_bias = c.address<float>();
  layer.q_norm = c.address<float>(), layer.k_norm = c.address<float>();
  layer.head_eps = c.number(), layer.scaling = c.number();
  layer.out = c.weight(), layer.out_bias = c.address<float>();
  layer.post_norm = c.address<float>(), layer.post_eps = c.number();
  layer.gate = c.weight(), layer.up = c.weight(), layer.down = c.weight();
  return layer;
}

// What passes over slots of one model and cache share; owns what the arguments point into.
struct Passes {
  TextPass a{};
  int64_t vocabulary;
  std::vector<PassLayer> layers;
  Tensor kv_len, visual, positions;

  Passes(const Tensor& table, const Tensor& k, const Tensor& v, const Tensor& length,
         const Tensor& marks, const Tensor& places)
      : kv_len(packed(length)), visual(packed(marks)), positions(packed(places)) {
    Columns c{pointer<int64_t>(table)};
    vocabulary = c.integer();
    const int64_t num_layers = c.integer();
    a.width = c.integer(), a.inner = c.integer(), a.num_q_heads = c.integer();
    a.embedding = c.address<float>();
    a.norm = c.address<float>(), a.norm_eps = c.number();
    a.frequencies = c.address<float>(), a.dimensions = c.address<int32_t>();
    a.angle_scaling = c.number();
    for (int64_t i = 0; i < num_layers; ++i) layers.push_back(read_layer(c));
    a.layers = layers.data(), a.num_layers = num_layers;
    a.batch_size = kv_len.size(0);
    a.num_kv_heads = k.size(2), a.capacity = k.size(3), a.head_dim = k.size(4);
    a.k_cache = const_cast<float*>(pointer<float>(k));
    a.v_cache = const_cast<float*>(pointer<float>(v));
    copy_strides(k, a.k_stride), copy_strides(v, a.v_stride);
    a.kv_len = pointer<int32_t>(kv_len), a.visual = pointer<uint8_t>(visual);
    a.positions = pointer<int64_t>(positions), a.position_rows = positions.size(0);
    a.parallel_for = parallel_for;
  }

  // `depths` is [S] or [B, S]; both stay with the caller.
  void set_slots(int64_t num_slots, const Tensor& depths, const Tensor& ancestors) {
    a.num_slots = num_slots, a.ancestors = pointer<int64_t>(ancestors);
    a.depths = pointer<int64_t>(depths), a.depths_stride = depths.dim() > 1 ? num_slots : 0;
  }

  void set_head(const Tensor& head, int64_t outputs) {
    a.head = {head.const_data_ptr(), type_of(head)}, a.outputs = outputs;
  }

  void run() const {
    check_room(kv_len, a.num_slots, a.capacity);
    for (int64_t b = 0; b < a.batch_size; ++b)
      for (int64_t s = 0; s < a.num_slots; ++s) {
        const int64_t index = a.kv_len[b] + a.depths[b * a.depths_stride + s];
        if (index < 0 || index >= a.capacity)
          throw std::runtime_error("lvspec: expected depths within the cache, got position " +
                                   std::to_string(index) + " of " + std::to_string(a.capacity));
      }
    for (int64_t i = 0; a.tokens != nullptr && i < a.batch_size * a.num_slots; ++i)
      if (a.tokens[i] < 0 || a.tokens[i] >= vocabulary)
        throw std::runtime_error("lvspec: expected token ids below " + std::to_string(vocabulary) +
                                 ", got " + std::to_string(a.tokens[i]));
    kernels().text_pass(a);
  }
};

constexpr const char* kTextPassSchema =
    "text_pass(Tensor table, Tensor? tokens, Tensor? hidden, Tensor depths, Tensor ancestors, "
    "Tensor(a!) k, Tensor(b!) v, Tensor kv_len, Tensor visual, Tensor positions, int first, "
    "int count, Tensor? head, int outputs, bool scores) -> (Tensor, Tensor, Tensor)";

// A pass over slots. With `hidden` [B, S, H] in the place of tokens it runs layers first to
// first + count of it and returns what they make of it; otherwise it returns logits
// [B, S, outputs] by the first rows of a head, [V, H] or packed. Masses and peaks are empty without scores.
std::tuple<Tensor, Tensor, Tensor> text_pass(
    Tensor table, std::optional<Tensor> tokens, std::optional<Tensor> hidden, Tensor depths,
    Tensor ancestors, Tensor k, Tensor v, Tensor kv_len, Tensor visual, Tensor positions,
    int64_t first, int64_t count, std::optional<Tensor> head, int64_t outputs, bool scores) {
  Passes passes(table, k, v, kv_len, visual, positions);
  TextPass& a = passes.a;
  a.first_layer = first, a.num_layers = count;
  depths = packed(depths), ancestors = packed(ancestors);
  const int64_t B = a.batch_size, S = hidden.has_value() ? hidden->size(1) : tokens->size(1);
  passes.set_slots(S, depths, ancestors);
  Tensor made = empty(k, {B, S, a.width}, ScalarType::Float);
  a.hidden = numbers(made);
  if (hidden.has_value()) {
    const Tensor given = packed(*hidden);
    std::memcpy(a.hidden, pointer<float>(given), size_t(given.numel()) * sizeof(float));
    a.norm = nullptr;
  } else {
    tokens = packed(*tokens);
    a.tokens = pointer<int64_t>(*tokens);
    passes.set_head(*head, outputs);
  }
  const bool has_head = a.head.data != nullptr;
  Tensor logits = empty(k, {B, S, has_head ? outputs : 0}, ScalarType::Float);
  a.logits = numbers(logits);
  const int64_t scored = scores ? count : 0;
  Tensor masses = empty(k, {scored, B, a.num_q_heads, S}, ScalarType::Float);
  Tensor peaks = empty(k, {scored, B, a.num_q_heads, S}, ScalarType::Float);
  a.mass = scores ? numbers(masses) : nullptr, a.peak = scores ? numbers(peaks) : nullptr;
  passes.run();
  return {has_head ? logits : made, masses, peaks};
}

// The first of the largest, or of the NaNs: as torch.argmax.
int64_t best_of(const float* x, int64_t count) {
  int64_t best = 0;
  for (int64_t i = 1; i < count && x[best] == x[best]; ++i)
    if (x[i] > x[best] || x[i] != x[i]) best = i;
  return best;
}

constexpr const char* kTextChainSchema =
    "text_chain(Tensor table, Tensor tokens, Tensor depths, Tensor ancestors, Tensor moved, "
    "Tensor(a!) k, Tensor(b!) v, Tensor(c!) kv_len, Tensor visual, Tensor positions, int count, "
    "Tensor head, int outputs, Tensor? vocabulary) -> Tensor";

// A greedy chain, int64 [B, count]: a pass over tokens [B, S], whose last row chooses the first, then
// count - 1 passes of one slot, each over what was chosen last. kv_len, contiguous, moves on by `moved`,
// int32 [B], behind the first pass, and by one before each of the others. `vocabulary` is the id of
// each output, or outputs are ids.
Tensor text_chain(Tensor table, Tensor tokens, Tensor depths, Tensor ancestors, Tensor moved,
                  Tensor k, Tensor v, Tensor kv_len, Tensor visual, Tensor positions,
                  int64_t count, Tensor head, int64_t outputs, std::optional<Tensor> vocabulary) {
  if (!kv_len.is_contiguous()) throw std::runtime_error("lvspec: expected contiguous kv_len");
  Passes passes(table, k, v, kv_len, visual, positions);
  TextPass& a = passes.a;
  int32_t* lengths = const_cast<int32_t*>(a.kv_len);
  const int32_t* steps = pointer<int32_t>(moved);
  const int64_t B = a.batch_size, S = tokens.size(1);
  tokens = packed(tokens), depths = packed(depths), ancestors = packed(ancestors);
  passes.set_slots(S, depths, ancestors);
  passes.set_head(head, outputs);
  std::vector<float> hidden(size_t(B * S * a.width)), logits(size_t(B * S * outputs));
  std::vector<int64_t> last(size_t(B), 0);
  const std::vector<int64_t> no_depths(size_t(B), 0), themselves(size_t(B), 1);
  a.tokens = pointer<int64_t>(tokens), a.hidden = hidden.data(), a.logits = logits.data();
  Tensor chosen = empty(tokens, {B, count}, ScalarType::Long);
  int64_t* ids = static_cast<int64_t*>(chosen.mutable_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    if (i == 1) {
      a.tokens = last.data(), a.depths = no_depths.data(), a.depths_stride = 0;
      a.ancestors = themselves.data(), a.num_slots = 1;
    }
    for (int64_t b = 0; i > 0 && b < B; ++b) ++lengths[b];
    passes.run();
    for (int64_t b = 0; b < B; ++b) {
      const int64_t row = (b + 1) * a.num_slots - 1;
      const int64_t best = best_of(logits.data() + row * outputs, outputs);
      last[b] = vocabulary.has_value() ? pointer<int64_t>(*vocabulary)[best] : best;
      ids[b * count + i] = last[b];
    }
    for (int64_t b = 0; i == 0 && b < B; ++b) lengths[b] += steps[b];
  }
  return chosen;
}

}  // namespace
}  // namespace lvspec

STABLE_TORCH_LIBRARY_FRAGMENT(lvspec, m) {
  m.def(lvspec::kTextPassSchema);
  m.def(lvspec::kTextChainSchema);
}

STABLE_TORCH_LIBRARY_IMPL(lvspec, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&lvspec::rms_norm));
  m.impl("silu_multiply", TORCH_BOX(&lvspec::silu_multiply));
  m.impl("rotary_angles", TORCH_BOX(&lvspec::rotary_angles));
  m.impl("rotate_and_write", TORCH_BOX(&lvspec::rotate_and_write));
  m.impl("text_pass", TORCH_BOX(&lvspec::text_pass));
  m.impl("text_chain", TORCH_BOX(&lvspec::text_chain));
}

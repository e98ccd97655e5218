// text_pass: the decoder of a text model over a few slots, in float32: a whole pass in one call.
//
// Embedding; in every layer norm, q/k/v, head norms, rotation, cache, attention, product and sum, norm,
// gated MLP and sum; the last norm and the head. Weights are read where HF's modules have them, or from
// copies in 16 bits that hold the same numbers. What it computes, lvspec/models/text_pass.py states.
#pragma once

#include <cstring>

#include "gated_linear.h"
#include "linear.h"
#include "packed_linear.h"
#include "rms_norm.h"
#include "rotary.h"
#include "verify_attention.h"
#include "write_kv.h"

namespace lvspec::LVSPEC_ARCH {

// One pass under way: what its parts read and write, in one piece of memory.
struct PassState {
  const TextPass& a;
  const int64_t rows, q_width, kv_width;
  float *cos, *sin, *normed, *qkv, *turned_q, *turned_k, *attended, *lse, *inner;

  // Heads side by side in rows that are `stride` apart.
  struct Heads {
    float* x;
    int64_t count, stride;
  };

  PassState(const TextPass& pass, Scratch<float>& scratch)
      : a(pass), rows(pass.batch_size * pass.num_slots), q_width(pass.num_q_heads * pass.head_dim),
        kv_width(pass.num_kv_heads * pass.head_dim) {
    struct Part {
      float** to;
      int64_t width;
    };
    const int64_t widest = q_width > a.width ? q_width : a.width;
    const Part parts[] = {{&cos, a.head_dim}, {&sin, a.head_dim},   {&normed, widest},
                          {&qkv, q_width + 2 * kv_width}, {&turned_q, q_width},
                          {&turned_k, kv_width}, {&attended, widest}, {&lse, a.num_q_heads},
                          {&inner, a.inner}};
    int64_t total = 0;
    const auto padded = [&](const Part& part) { return (rows * part.width + 15) / 16 * 16; };
    for (const Part& part : parts) total += padded(part);
    float* next = scratch.get(total);
    for (const Part& part : parts) *part.to = next, next += padded(part);
  }

  void norm(const float* x, const float* weight, double eps, float* y) const {
    rms_norm({x, weight, y, eps, rows, a.width, a.parallel_for});
  }

  void multiply(const float* x, const PassWeight& weight, const float* bias, int64_t inputs,
                int64_t outputs, float* y, const float* residual = nullptr) const {
    if (weight.is_packed())
      packed_linear({weight.type, x, weight.data, bias, residual, y, rows, inputs, outputs, false,
                     a.parallel_for});
    else
      linear({x, static_cast<const float*>(weight.data), bias, y, rows, inputs, outputs,
              a.parallel_for});
  }

  // hidden += x W^T + b, by way of `product`.
  void add_product(const float* x, const PassWeight& weight, const float* bias, int64_t inputs,
                   float* product) const {
    if (weight.is_packed())
      return multiply(x, weight, bias, inputs, a.width, a.hidden, a.hidden);
    multiply(x, weight, bias, inputs, a.width, product);
    for (int64_t i = 0; i < rows * a.width; ++i) a.hidden[i] += product[i];
  }

  void multiply_gated(const float* x, const PassLayer& layer) const {
    if (layer.gate.is_packed())
      packed_linear({layer.gate.type, x, layer.gate.data, nullptr, nullptr, inner, rows, a.width,
                     a.inner, true, a.parallel_for});
    else
      gated_linear({x, static_cast<const float*>(layer.gate.data),
                    static_cast<const float*>(layer.up.data), inner, rows, a.width, a.inner,
                    a.parallel_for});
  }

  void embed() const {
    for (int64_t row = 0; row < rows; ++row)
      std::memcpy(a.hidden + row * a.width, a.embedding + a.tokens[row] * a.width,
                  size_t(a.width) * sizeof(float));
  }

  // Of the cache's positions behind kv_len.
  void find_angles(Scratch<int64_t>& scratch) const {
    int64_t* found = scratch.get(a.position_rows * rows);
    for (int64_t p = 0; p < a.position_rows; ++p)
      for (int64_t b = 0; b < a.batch_size; ++b)
        for (int64_t s = 0; s < a.num_slots; ++s) {
          const int64_t index = a.kv_len[b] + a.depths[b * a.depths_stride + s];
          found[(p * a.batch_size + b) * a.num_slots + s] =
              a.positions[(p * a.batch_size + b) * a.capacity + index];
        }
    rotary_angles({found, a.frequencies, a.dimensions, a.angle_scaling, cos, sin, a.batch_size,
                   a.num_slots, a.head_dim, {rows, a.num_slots, 1}, a.parallel_for});
  }

  // Queries, keys and values of all rows.
  void project(const PassLayer& layer, Heads& q, Heads& k, Heads& v) const {
    const int64_t width = q_width + 2 * kv_width;
    if (layer.q.is_packed()) {
      multiply(normed, layer.q, layer.q_bias, a.width, width, qkv);
      q = {qkv, a.num_q_heads, width};
      k = {qkv + q_width, a.num_kv_heads, width};
      v = {k.x + kv_width, a.num_kv_heads, width};
      return;
    }
    q = {qkv, a.num_q_heads, q_width};
    k = {qkv + rows * q_width, a.num_kv_heads, kv_width};
    v = {k.x + rows * kv_width, a.num_kv_heads, kv_width};
    multiply(normed, layer.q, layer.q_bias, a.width, q_width, q.x);
    multiply(normed, layer.k, layer.k_bias, a.width, kv_width, k.x);
    multiply(normed, layer.v, layer.v_bias, a.width, kv_width, v.x);
  }

  void turn(const Heads& heads, const float* head_norm, double eps, float* y) const {
    const int64_t D = a.head_dim;
    if (head_norm != nullptr)
      for (int64_t row = 0; row < rows; ++row) {
        float* x = heads.x + row * heads.stride;
        rms_norm({x, head_norm, x, eps, heads.count, D, a.parallel_for});
      }
    rotate({heads.x, cos, sin, y, a.batch_size, heads.count, a.num_slots, D,
            {a.num_slots * heads.stride, D, heads.stride, 1}, a.parallel_for});
  }

  void write(int64_t index, const Heads& v) const {
    const int64_t D = a.head_dim, S = a.num_slots, head_stride = S * D;
    WriteKv w{};
    w.element_size = sizeof(float);
    w.k = turned_k, w.v = v.x;
    w.k_cache = a.k_cache + index * a.k_stride[0], w.v_cache = a.v_cache + index * a.v_stride[0];
    w.kv_len = a.kv_len;
    w.batch_size = a.batch_size, w.num_kv_heads = a.num_kv_heads, w.num_slots = S;
    w.capacity = a.capacity, w.head_dim = D;
    const int64_t turned[4] = {a.num_kv_heads * head_stride, head_stride, D, 1};
    const int64_t projected[4] = {S * v.stride, D, v.stride, 1};
    std::memcpy(w.k_stride, turned, sizeof turned);
    std::memcpy(w.v_stride, projected, sizeof projected);
    std::memcpy(w.k_cache_stride, a.k_stride + 1, sizeof turned);
    std::memcpy(w.v_cache_stride, a.v_stride + 1, sizeof turned);
    w.parallel_for = a.parallel_for;
    write_kv(w);
  }

  // Leaves rows [rows, q_width] in `normed`.
  void attend(int64_t index, double scaling) const {
    const int64_t D = a.head_dim, S = a.num_slots, H = a.num_q_heads;
    VerifyAttention t{};
    t.type = t.stored = Type::f32;
    t.q = turned_q;
    t.k_cache = a.k_cache + index * a.k_stride[0], t.v_cache = a.v_cache + index * a.v_stride[0];
    t.kv_len = a.kv_len, t.ancestors = a.ancestors, t.visual = a.visual, t.scale = scaling;
    t.out = S == 1 ? normed : attended, t.lse = lse;
    if (a.mass != nullptr) {
      const int64_t offset = (index - a.first_layer) * H * rows;
      t.mass = a.mass + offset, t.peak = a.peak + offset;
    }
    t.batch_size = a.batch_size, t.num_q_heads = H, t.num_kv_heads = a.num_kv_heads;
    t.num_slots = S, t.head_dim = D, t.capacity = a.capacity;
    const int64_t turned[4] = {H * S * D, S * D, D, 1};
    std::memcpy(t.q_stride, turned, sizeof turned);
    std::memcpy(t.k_stride, a.k_stride + 1, sizeof turned);
    std::memcpy(t.v_stride, a.v_stride + 1, sizeof turned);
    t.parallel_for = a.parallel_for;
    verify_attention(t);
    if (S == 1) return;
    for (int64_t b = 0; b < a.batch_size; ++b)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t s = 0; s < S; ++s)
          std::memcpy(normed + (b * S + s) * q_width + h * D,
                      attended + ((b * H + h) * S + s) * D, size_t(D) * sizeof(float));
  }

  void run_layer(int64_t index) const {
    const PassLayer& layer = a.layers[index];
    norm(a.hidden, layer.input_norm, layer.input_eps, normed);
    Heads q, k, v;
    project(layer, q, k, v);
    turn(q, layer.q_norm, layer.head_eps, turned_q);
    turn(k, layer.k_norm, layer.head_eps, turned_k);
    write(index, v);
    attend(index, layer.scaling);
    add_product(normed, layer.out, layer.out_bias, q_width, attended);
    norm(a.hidden, layer.post_norm, layer.post_eps, normed);
    multiply_gated(normed, layer);
    add_product(inner, layer.down, nullptr, a.inner, attended);
  }
};

static void text_pass(const TextPass& a) {
  static thread_local Scratch<float> scratch;
  static thread_local Scratch<int64_t> positions;
  const PassState pass(a, scratch);
  if (a.tokens != nullptr) pass.embed();
  pass.find_angles(positions);
  for (int64_t i = 0; i < a.num_layers; ++i) pass.run_layer(a.first_layer + i);
  if (a.norm != nullptr) pass.norm(a.hidden, a.norm, a.norm_eps, a.hidden);
  if (a.head.data != nullptr) pass.multiply(a.hidden, a.head, nullptr, a.width, a.outputs, a.logits);
}

}  // namespace lvspec::LVSPEC_ARCH

// Packed weights and products with them. Apart from fuzz.cpp's `run`, because every instruction set
// packs for itself.
#pragma once

#include "fuzz.h"

namespace {

// Numbers that `type` has, as float32.
Array numbers_in(Random& random, Type type, Shape shape) {
  Array x = numbers(random, Type::f32, std::move(shape), false, 1, false);
  with_type(type, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    if constexpr (sizeof(T) == 2)
      x.each([&](int64_t i) {
        T narrowed;
        narrow(x.as<float>()[i], &narrowed);
        x.as<float>()[i] = widen(narrowed);
      });
  });
  return x;
}

// Two matrices one after the other, or gates and ups in turn.
Bytes pack_two(const Kernels& kernels, Type type, const Array* matrices, bool is_gated,
               lvspec::ParallelFor parallel_for) {
  const int64_t inputs = matrices[0].shape[1], panel = kernels.panel;
  const int64_t total = matrices[0].shape[0] + (is_gated ? 0 : matrices[1].shape[0]);
  const int64_t panels = (total + panel - 1) / panel * (is_gated ? 2 : 1);
  Bytes packed(size_t(panels * panel * inputs * size_of(type)), 0);
  lvspec::PackWeights a{};
  a.type = type, a.packed = packed.data(), a.inputs = inputs, a.panel_step = is_gated ? 2 : 1;
  a.parallel_for = parallel_for;
  for (int i = 0; i < 2; ++i) {
    Array& matrix = const_cast<Array&>(matrices[i]);
    a.weight = matrix.as<float>(), a.outputs = matrix.shape[0];
    if (is_gated)
      a.first_panel = i;
    else
      a.first_output = i * matrices[0].shape[0];
    kernels.pack_weights(a);
  }
  return packed;
}

void fuzz_packed_linear(Random& random) {
  const Type type = Type(random.between(0, 2));
  lvspec::PackedLinear a{};
  a.type = type, a.is_gated = random.one_in(2);
  a.rows = any_size(random, 70), a.inputs = any_size(random, 1300);
  const int64_t first = any_size(random, 90), second = a.is_gated ? first : any_size(random, 90);
  a.outputs = first + (a.is_gated ? 0 : second);
  const Array matrices[] = {numbers_in(random, type, {first, a.inputs}),
                            numbers_in(random, type, {second, a.inputs})};
  Array x = numbers(random, Type::f32, {a.rows, a.inputs}, false, 0.3, false);
  Array bias = numbers(random, Type::f32, {a.outputs}, false, 1, false);
  Array residual = numbers(random, Type::f32, {a.rows, a.outputs}, false, 1, false);
  a.x = x.as<float>();
  if (!a.is_gated && random.one_in(2)) a.bias = bias.as<float>();
  const bool is_added = random.one_in(2), is_in_place = random.one_in(2);
  std::vector<std::vector<float>> results;
  for (const Kernels* kernels : instruction_sets()) {
    uint8_t types = lvspec::kExactF16 | lvspec::kExactBf16;
    for (const Array& matrix : matrices) {
      lvspec::ExactTypes e{const_cast<Array&>(matrix).as<float>(), matrix.shape[0] * a.inputs,
                           &types, one_by_one};
      kernels->find_exact_types(e);
    }
    require(type == Type::f32 || types & (type == Type::f16 ? lvspec::kExactF16 : lvspec::kExactBf16),
            "find_exact_types, %s: not exact in its own type", kernels->name);
    const Bytes packed = pack_two(*kernels, type, matrices, a.is_gated, all_at_once);
    require(packed == pack_two(*kernels, type, matrices, a.is_gated, one_by_one),
            "pack_weights, %s: depends on the division of the work", kernels->name);
    a.packed = packed.data();
    std::vector<float> runs[2];
    for (int time = 0; time < 2; ++time) {
      std::vector<float>& y = runs[time];
      y.assign(size_t(a.rows * a.outputs), time == 0 ? 7.0f : NAN);
      if (is_added && is_in_place) std::memcpy(y.data(), residual.as<float>(), y.size() * 4);
      a.residual = !is_added ? nullptr : is_in_place ? y.data() : residual.as<float>();
      a.y = y.data();
      a.parallel_for = time == 0 ? all_at_once : one_by_one;
      kernels->packed_linear(a);
    }
    require(std::memcmp(runs[0].data(), runs[1].data(), runs[0].size() * 4) == 0,
            "packed_linear, %s: not written, or depends on the division of the work",
            kernels->name);
    results.push_back(runs[0]);
    for (size_t i = 0; i < results[0].size(); ++i)
      require(is_near(Type::f32, results[0][i], runs[0][i]),
              "packed_linear: result %d: portable %g, %s %g", int(i), double(results[0][i]),
              kernels->name, double(runs[0][i]));
  }
}

}  // namespace

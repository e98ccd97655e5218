// Products with packed weights as torch.ops.lvspec.cpu_pack and cpu_packed_*, on the CPU alone: parts
// of passes, like those at the end of binding.cpp.
#include "binding.h"

#include <cstring>
#include <string>

namespace {

using namespace lvspec::binding;

int64_t panels_of(int64_t outputs) { return (outputs + kernels().panel - 1) / kernels().panel; }

void require(bool holds, const char* name, const char* expected, int64_t got) {
  if (!holds)
    throw std::runtime_error(std::string("lvspec: ") + name + ": expected " + expected + ", got " +
                             std::to_string(got));
}

ScalarType exact_type(const Tensor& weight) {
  uint8_t types = lvspec::kExactF16 | lvspec::kExactBf16;
  lvspec::ExactTypes a{};
  a.weight = pointer<float>(weight), a.count = weight.numel(), a.types = &types;
  a.parallel_for = parallel_for;
  kernels().find_exact_types(a);
  if (types & lvspec::kExactF16 && kernels().widens_f16) return ScalarType::Half;
  return types & lvspec::kExactBf16 ? ScalarType::BFloat16 : ScalarType::Float;
}

// Weights [O, I] of float32, or gates and behind them ups [2 * O, I], in panels for the instruction
// set of this process: one dimension, of float16 if all of them are exact in it (and it is widened by
// an instruction), else of bfloat16 if they are in that, else of float32.
Tensor cpu_pack(Tensor weight, bool gated) {
  require(weight.dim() == 2, "weight", "two dimensions", weight.dim());
  require(weight.scalar_type() == ScalarType::Float, "weight", "float32, type 6",
          int64_t(weight.scalar_type()));
  require(!gated || weight.size(0) % 2 == 0, "weight", "as many gates as ups", weight.size(0));
  weight = packed(weight);
  const int64_t parts = gated ? 2 : 1;
  lvspec::PackWeights a{};
  a.outputs = weight.size(0) / parts, a.inputs = weight.size(1);
  Tensor result = empty(weight, {parts * panels_of(a.outputs) * kernels().panel * a.inputs},
                        exact_type(weight));
  a.type = type_of(result);
  a.packed = result.mutable_data_ptr();
  std::memset(a.packed, 0, size_t(result.numel()) * size_t(result.element_size()));
  a.panel_step = parts;
  a.parallel_for = parallel_for;
  for (a.first_panel = 0; a.first_panel < parts; ++a.first_panel) {
    a.weight = pointer<float>(weight) + a.first_panel * a.outputs * a.inputs;
    kernels().pack_weights(a);
  }
  return result;
}

// The product of x [R, I] or [B, S, I], of `outputs` columns.
Tensor multiply(Tensor x, const Tensor& weight, int64_t outputs, bool gated, const float* bias,
                const float* residual) {
  require(x.scalar_type() == ScalarType::Float, "x", "float32, type 6", int64_t(x.scalar_type()));
  require(x.dim() == 2 || x.dim() == 3, "x", "two or three dimensions", x.dim());
  lvspec::PackedLinear a{};
  a.inputs = x.size(x.dim() - 1), a.outputs = outputs, a.is_gated = gated;
  const int64_t parts = gated ? 2 : 1, size = parts * panels_of(outputs) * kernels().panel * a.inputs;
  require(weight.numel() == size, "packed", (std::to_string(size) + " numbers").c_str(),
          weight.numel());
  x = packed(x);
  Tensor y = x.dim() == 2 ? empty(x, {x.size(0), outputs}, ScalarType::Float)
                          : empty(x, {x.size(0), x.size(1), outputs}, ScalarType::Float);
  a.rows = x.numel() / (a.inputs > 0 ? a.inputs : 1);
  a.type = type_of(weight), a.packed = weight.const_data_ptr();
  a.x = pointer<float>(x), a.bias = bias, a.residual = residual;
  a.y = static_cast<float*>(y.mutable_data_ptr());
  a.parallel_for = parallel_for;
  if (a.rows > 0) kernels().packed_linear(a);
  return y;
}

// residual + x W^T + bias: weights from cpu_pack(W, False).
Tensor cpu_packed_linear(Tensor x, Tensor weight, int64_t outputs, std::optional<Tensor> bias,
                         std::optional<Tensor> residual) {
  if (residual.has_value()) residual = packed(*residual);
  return multiply(x, weight, outputs, false, pointer_or_null<float>(bias),
                  pointer_or_null<float>(residual));
}

// silu(x G^T) * (x U^T): weights from cpu_pack([G; U], True).
Tensor cpu_packed_gated_linear(Tensor x, Tensor weight, int64_t outputs) {
  return multiply(x, weight, outputs, true, nullptr, nullptr);
}

// Whether float32 numbers at some addresses are still those that were there, to the last bit.
bool cpu_unchanged(Tensor addresses, Tensor numbers) {
  const int64_t* from = pointer<int64_t>(addresses);
  const float* then = pointer<float>(numbers);
  for (int64_t i = 0; i < addresses.numel(); ++i)
    if (std::memcmp(reinterpret_cast<const void*>(static_cast<intptr_t>(from[i])), then + i,
                    sizeof(float)) != 0)
      return false;
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lvspec, m) {
  m.def("cpu_unchanged(Tensor addresses, Tensor numbers) -> bool");
  m.def("cpu_pack(Tensor weight, bool gated) -> Tensor");
  m.def(
      "cpu_packed_linear(Tensor x, Tensor packed, int outputs, Tensor? bias, Tensor? residual) -> "
      "Tensor");
  m.def("cpu_packed_gated_linear(Tensor x, Tensor packed, int outputs) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lvspec, CPU, m) {
  m.impl("cpu_pack", TORCH_BOX(&cpu_pack));
  m.impl("cpu_unchanged", TORCH_BOX(&cpu_unchanged));
  m.impl("cpu_packed_linear", TORCH_BOX(&cpu_packed_linear));
  m.impl("cpu_packed_gated_linear", TORCH_BOX(&cpu_packed_gated_linear));
}

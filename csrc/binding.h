// What binding*.cpp share: tensors of torch's stable ABI as pointers, new ones, its threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "kernels.h"

namespace lvspec::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Those of the instruction set that was chosen when the library was loaded.
const Kernels& kernels();

inline void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*),
                         void* context) {
  if (count <= grain) {
    body(0, count, context);
    return;
  }
  torch::stable::parallel_for(
      0, count, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    case ScalarType::Double: return Type::f64;
    case ScalarType::Float8_e4m3fn: return Type::f8_e4m3;
    default: throw std::runtime_error("lvspec: a type that lvspec.ops does not let through");
  }
}

inline ScalarType statistics_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor packed(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

template <class T>
constexpr ScalarType scalar_type() {
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, int32_t>) return ScalarType::Int;
  if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
  if constexpr (std::is_same_v<T, uint8_t>) return ScalarType::Byte;
  if constexpr (std::is_same_v<T, bool>) return ScalarType::Bool;
}

template <class T>
const T* pointer(const Tensor& x) {
  if (x.scalar_type() != scalar_type<T>())
    throw std::runtime_error("lvspec: another dtype than the C++ takes; lvspec.ops asks it only then");
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
const T* pointer_or_null(const std::optional<Tensor>& x) {
  return x.has_value() ? pointer<T>(*x) : nullptr;
}

inline void copy_strides(const Tensor& x, int64_t* to) {
  for (int64_t i = 0; i < x.dim(); ++i) to[i] = x.stride(i);
}

// A contiguous tensor. Not torch::stable::new_empty, which looks its operator up by name each time.
inline Tensor empty(const Tensor& like, const int64_t* shape, int64_t dim, ScalarType type) {
  int64_t strides[8], step = 1;
  for (int64_t i = dim; i-- > 0;) strides[i] = step, step *= shape[i] > 1 ? shape[i] : 1;
  int32_t device = 0;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, shape, strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device, 0, &handle));
  return Tensor(handle);
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return empty(like, shape.begin(), static_cast<int64_t>(shape.size()), type);
}

// A contiguous tensor of the shape and type of x.
inline Tensor new_like(const Tensor& x) {
  int64_t shape[8];
  for (int64_t i = 0; i < x.dim(); ++i) shape[i] = x.size(i);
  return empty(x, shape, x.dim(), x.scalar_type());
}

inline float* numbers(Tensor& x) { return const_cast<float*>(pointer<float>(x)); }

}  // namespace lvspec::binding

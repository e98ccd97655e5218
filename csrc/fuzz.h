// What fuzz.cpp needs: random arrays that end where their data ends, every kernel run on them, the
// results compared.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <utility>
#include <vector>

#include "types.h"

namespace {

using lvspec::Kernels;
using lvspec::Type;
using namespace lvspec::fuzz;
using Shape = std::vector<int64_t>;

uint64_t current_seed;

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t x = state += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }
  int64_t between(int64_t least, int64_t most) {
    return least + int64_t(next() % uint64_t(most - least + 1));
  }
  bool one_in(int64_t count) { return between(1, count) == 1; }
  double uniform() { return double(next() >> 40) * 0x1p-24; }
  double normal() {  // nearly
    double sum = -2;
    for (int i = 0; i < 4; ++i) sum += uniform();
    return 1.7 * sum;
  }
};

// Mostly small, now and then `most`.
int64_t any_size(Random& random, int64_t most) {
  const int64_t usual = most < 12 ? most : 12;
  return random.one_in(4) ? random.between(1, most) : random.between(1, usual);
}

// Elements in a heap block of their own, contiguous or scattered.
struct Array {
  int64_t element, front;
  Shape shape, stride;
  std::vector<char> bytes;

  Array(Random& random, int64_t element_size, Shape sizes, bool scattered)
      : element(element_size), front(random.between(0, 2)), shape(std::move(sizes)) {
    const int64_t dims = int64_t(shape.size());
    stride.assign(size_t(dims), 0);
    Shape order;  // the fastest dimension first
    for (int64_t i = 0; i < dims; ++i) {
      const int64_t index = scattered && random.one_in(2) ? random.between(0, i) : 0;
      order.insert(order.begin() + index, i);
    }
    int64_t step = scattered && random.one_in(2) ? 2 : 1, end = 1;
    for (const int64_t dim : order) {
      const size_t i = size_t(dim);
      stride[i] = step;
      step = step * (shape[i] > 0 ? shape[i] : 1) + (scattered ? random.between(0, 3) : 0);
      end = shape[i] == 0 || end == 0 ? 0 : end + (shape[i] - 1) * stride[i];
    }
    bytes.assign(size_t((front + end) * element), char(0xff));  // NaN, or -1
  }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(bytes.data() + front * element);
  }
  template <class F>
  void each(const F& f) const {  // f(offset) in the order of the indices
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    for (int64_t index = 0; index < count; ++index) {
      int64_t offset = 0, rest = index;
      for (size_t i = shape.size(); i-- > 0; rest /= shape[i])
        offset += rest % shape[i] * stride[i];
      f(offset);
    }
  }
  void pack() {
    std::vector<char> packed;
    each([&](int64_t offset) {
      const char* from = bytes.data() + (front + offset) * element;
      packed.insert(packed.end(), from, from + element);
    });
    packed.shrink_to_fit();
    bytes = std::move(packed);
    front = 0;
    int64_t step = 1;
    for (size_t i = shape.size(); i-- > 0; step *= shape[i]) stride[i] = step;
  }
  void copy_strides(int64_t* to) const {
    for (size_t i = 0; i < stride.size(); ++i) to[i] = stride[i];
  }
};

int64_t size_of(Type type) {
  int64_t size = 0;
  with_type(type, [&](auto* typed) { size = sizeof *typed; });
  return size;
}

Type accumulate(Type type) { return type == Type::f64 ? Type::f64 : Type::f32; }

Type any_float(Random& random) { return Type(random.between(0, 3)); }

double number(Type type, const void* from, int64_t index) {
  double x = 0;
  with_type(type, [&](auto* typed) {
    x = double(widen(static_cast<decltype(typed)>(const_cast<void*>(from))[index]));
  });
  return x;
}

// Normal numbers; with ties and with what is not finite where the caller wants them.
Array numbers(Random& random, Type type, Shape shape, bool scattered, double spread, bool odd) {
  Array x(random, size_of(type), std::move(shape), scattered);
  const bool is_coarse = odd && random.one_in(3), has_more = odd && random.one_in(3);
  x.each([&](int64_t offset) {
    double value = spread * random.normal();
    if (is_coarse) value = double(int64_t(value));
    if (has_more && random.one_in(30)) value = random.one_in(3) ? NAN : INFINITY;
    if (odd && random.one_in(20)) value = -INFINITY;
    with_type(type, [&](auto* typed) {
      using T = std::remove_pointer_t<decltype(typed)>;
      if constexpr (sizeof(T) == 1)
        x.as<T>()[offset].bits = uint8_t(random.between(0, 0x3f) | (random.one_in(2) ? 0x80 : 0));
      else
        narrow(Accumulate<T>(value), x.as<T>() + offset);
    });
  });
  return x;
}

template <class T>
Array integers(Random& random, Shape shape, bool scattered, int64_t least, int64_t most) {
  Array x(random, sizeof(T), std::move(shape), scattered);
  x.each([&](int64_t offset) { x.as<T>()[offset] = T(random.between(least, most)); });
  return x;
}

using Bytes = std::vector<char>;

// A result: its pointer in the arguments, and how instruction sets may differ.
struct Output {
  std::function<void(void*)> put;
  int64_t count, element;
  enum { exact, rounded, left_to_caller } comparison;
  Type type;      // of rounded ones
  Bytes initial;  // empty: not read
};

template <class T>
Output exact(T*& result, int64_t count) {
  return {[&](void* p) { result = static_cast<T*>(p); }, count, sizeof(T), Output::exact, {}, {}};
}

Output rounded(void*& result, Type type, int64_t count) {
  return {[&](void* p) { result = p; }, count, size_of(type), Output::rounded, type, {}};
}

Output numbers_of(float*& result, int64_t count) {
  Output output = exact(result, count);
  output.comparison = Output::rounded;
  output.type = Type::f32;
  return output;
}

// What the operation changes and leaves elsewhere as it is.
template <class T>
Output in_place(T*& result, const Array& x) {
  const int64_t front = x.front * x.element, size = int64_t(x.bytes.size());
  const auto put = [&result, front](void* p) {
    result = reinterpret_cast<T*>(static_cast<char*>(p) + front);
  };
  return {put, size, 1, Output::exact, {}, x.bytes};
}

template <class Condition, class... Values>
void require(Condition holds, const char* what, Values... values) {
  if (holds) return;
  std::printf("seed %llu: ", static_cast<unsigned long long>(current_seed));
  if constexpr (sizeof...(values) == 0)
    std::puts(what);
  else
    std::printf(what, values...), std::puts("");
  std::exit(1);
}

bool is_near(Type type, double x, double y) {
  if (x == y || (x != x && y != y)) return true;
  const double unit = type == Type::f64   ? 1e-10
                      : type == Type::f32 ? 1e-4
                      : type == Type::f16 ? 4e-3
                                          : 3e-2;
  return std::fabs(x - y) <= unit * (1 + std::fabs(y));  // false with NaN and infinities
}

const std::vector<const Kernels*>& instruction_sets() {
  static const std::vector<const Kernels*> all = [] {
    std::vector<const Kernels*> found = {&lvspec::portable_kernels()};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    if (has_avx2) found.push_back(&lvspec::avx2_kernels());
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      found.push_back(&lvspec::avx512_kernels());
#endif
    return found;
  }();
  return all;
}

void all_at_once(int64_t count, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  body(0, count, context);
}

void one_by_one(int64_t count, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  while (count-- > 0) body(count, count + 1, context);
}

// Runs one operation everywhere; returns the bytes of every result by instruction set. `bind` gives
// it the arrays of `scattered`, which are contiguous the second time.
template <class Arguments>
std::vector<std::vector<Bytes>> run(const char* name,
                                    void (*Kernels::*operation)(const Arguments&), Arguments& a,
                                    const std::vector<Output>& outputs,
                                    const std::vector<Array*>& scattered,
                                    const std::function<void()>& bind) {
  std::vector<std::vector<Bytes>> runs[2];
  for (int time = 0; time < 2; ++time) {
    if (time == 1)
      for (Array* array : scattered) array->pack();
    bind();
    a.parallel_for = time == 0 ? all_at_once : one_by_one;
    for (const Kernels* kernels : instruction_sets()) {
      std::vector<Bytes> results;
      for (const Output& output : outputs) {
        const Bytes poison(size_t(output.count * output.element), time == 0 ? 0x55 : 0x2a);
        results.push_back(output.initial.empty() ? poison : output.initial);
      }
      for (size_t i = 0; i < outputs.size(); ++i) outputs[i].put(results[i].data());
      (kernels->*operation)(a);
      runs[time].push_back(std::move(results));
    }
  }
  for (size_t set = 0; set < runs[0].size(); ++set)
    for (size_t i = 0; i < outputs.size(); ++i) {
      const Output& output = outputs[i];
      const char* set_name = instruction_sets()[set]->name;
      const Bytes &portable = runs[0][0][i], &here = runs[0][set][i];
      require(here == runs[1][set][i],
              "%s, %s: result %d is not written, or depends on strides or the division of the work",
              name, set_name, int(i));
      if (output.comparison == Output::exact)
        require(portable == here, "%s: result %d of portable and %s differ", name, int(i),
                set_name);
      if (output.comparison != Output::rounded) continue;
      for (int64_t j = 0; j < output.count; ++j) {
        const double x = number(output.type, portable.data(), j);
        const double y = number(output.type, here.data(), j);
        require(is_near(output.type, x, y), "%s: result %d at %d: portable %g, %s %g", name, int(i),
                int(j), x, set_name, y);
      }
    }
  return runs[0];
}

}  // namespace

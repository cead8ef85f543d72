// What elementwise and row-wise kernels share: loops over vectors that load any activation type,
// compute in F32 (F64 for F64) and round once when they store; and the choice of a template by
// dtype. An element's result never depends on its place in a vector or on where a task begins.
//
// Only for files compiled once per instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

#include "backends/cpu/isa.h"
#include "backends/cpu/vec.h"
#include "engine/dtype.h"

namespace nibble::cpu::NIBBLE_ISA {

inline constexpr Isa kIsa = static_cast<Isa>(NIBBLE_ISA_LEVEL);
static_assert(static_cast<int>(Isa::Avx2) == 1 && static_cast<int>(Isa::Avx512) == 2);

// The type that values stored as T are computed in, and its vector.
template <class T>
using Arith = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class T>
using Vec = typename Simd<Arith<T>>::Vec;
template <class T>
inline constexpr int kLanes = Simd<Arith<T>>::lanes;

// How many lanes of a vector lie inside the array: all of them, or the first few at its end.
struct AllLanes {};

template <class T>
[[gnu::always_inline]] inline Vec<T> load(const T* p, AllLanes) {
  return load(p);
}
template <class T>
[[gnu::always_inline]] inline Vec<T> load(const T* p, int lanes) {
  T buffer[kLanes<T>] = {};
  for (int i = 0; i < lanes; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
[[gnu::always_inline]] inline void store(T* p, Vec<T> v, AllLanes) {
  store(p, v);
}
template <class T>
[[gnu::always_inline]] inline void store(T* p, Vec<T> v, int lanes) {
  T buffer[kLanes<T>];
  store(buffer, v);
  for (int i = 0; i < lanes; ++i) p[i] = buffer[i];
}

// body(i, lanes) for i = 0, L, 2L, ... below count, with AllLanes or the number left at the end.
// Lanes outside the array read as zero.
template <class T, class Body>
[[gnu::always_inline]] inline void for_vectors(std::int64_t count, Body&& body) {
  std::int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) body(i, AllLanes{});
  if (i < count) body(i, static_cast<int>(count - i));
}

// Elements per task of an elementwise kernel: enough to outweigh handing out the task.
inline constexpr std::int64_t kTaskElements = 16384;

inline constexpr std::int64_t task_count(std::int64_t items, std::int64_t per_task) {
  return (items + per_task - 1) / per_task;
}
[[gnu::always_inline]] inline std::int64_t task_size(std::int64_t task, std::int64_t items,
                                                     std::int64_t per_task) {
  const std::int64_t left = items - task * per_task;
  return left < per_task ? left : per_task;
}

[[gnu::always_inline]] inline float square_root(float x) { return __builtin_sqrtf(x); }
[[gnu::always_inline]] inline double square_root(double x) { return __builtin_sqrt(x); }
[[gnu::always_inline]] inline VecF32 square_root(VecF32 x) {
#if NIBBLE_ISA_LEVEL == 2
  return _mm512_maskz_sqrt_ps(0xffff, x);  // g++ 12 warns inside the unmasked form
#elif NIBBLE_ISA_LEVEL == 1
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < kFloatLanes; ++i) x[i] = square_root(static_cast<float>(x[i]));
  return x;
#endif
}
[[gnu::always_inline]] inline VecF64 square_root(VecF64 x) {
  for (int i = 0; i < kDoubleLanes; ++i) x[i] = square_root(static_cast<double>(x[i]));
  return x;
}

// The types that activations and statistics have.
[[gnu::always_inline]] inline bool is_computable(DType d) {
  return d == DType::F64 || d == DType::F32 || d == DType::BF16;
}

// Calls f with a value of the C++ type that stores `dtype`, one of the three above.
template <class F>
[[gnu::always_inline]] inline void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::F64:
      return f(double{});
    case DType::F32:
      return f(float{});
    default:
      return f(bf16{});
  }
}

}  // namespace nibble::cpu::NIBBLE_ISA

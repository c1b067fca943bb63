// Vectors of the widest kind that the processor has.

#pragma once

#include <cstdint>

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;  // 32 registers
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;  // 16
#else
constexpr int kVectorBytes = 16;  // 16 (SSE) or 32 (NEON)
#endif

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Lanes<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename Lanes<T>::type;
template <class T>
constexpr int64_t kLanes = kVectorBytes / sizeof(T);

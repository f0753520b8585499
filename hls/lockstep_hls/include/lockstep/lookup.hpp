// Many lookups in one table: what gathers from memory do slowly, permutations of registers do fast.
#pragma once

#include <cstddef>

#include "lockstep/table.hpp"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace lockstep {

constexpr std::size_t kLookups = 16;  // lookups at a time: arrays have room for a multiple of it

// y[i] = c0[index[i]] + d[i] * (c1[index[i]] + d[i] * c2[index[i]]); of an index its lowest bits count, 7 in a table of
// 128 entries, 5 in one of 32. y may be d.
#if defined(__AVX512F__)

template <int entries>
inline __m512 lookup(const float* column, __m512i index) {
  const auto pair = [=](int first) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(column + first), index, _mm512_loadu_ps(column + first + 16));
  };
  if constexpr (entries == 32) {
    return pair(0);
  } else {
    static_assert(entries == 128);
    const __mmask16 odd = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
    const __mmask16 high = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
    return _mm512_mask_blend_ps(high, _mm512_mask_blend_ps(odd, pair(0), pair(32)),
                                _mm512_mask_blend_ps(odd, pair(64), pair(96)));
  }
}

template <int entries>
inline void segments(const Table& table, std::size_t n, const std::int32_t* index, const float* d, float* y) {
  for (std::size_t i = 0; i < n; i += kLookups) {
    const __m512i at = _mm512_loadu_si512(index + i);
    const __m512 step = _mm512_loadu_ps(d + i);
    const __m512 inner = _mm512_add_ps(lookup<entries>(table.c1, at), _mm512_mul_ps(step, lookup<entries>(table.c2, at)));
    _mm512_storeu_ps(y + i, _mm512_add_ps(lookup<entries>(table.c0, at), _mm512_mul_ps(step, inner)));
  }
}

#else

template <int entries>
inline void segments(const Table& table, std::size_t n, const std::int32_t* index, const float* d, float* y) {
  for (std::size_t i = 0; i < n; ++i) y[i] = segment(table, index[i] & (entries - 1), d[i]);
}

#endif

}  // namespace lockstep

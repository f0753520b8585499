// Operations on rows of float32: elementwise functions, reductions, requantisation. No allocation: the caller owns
// every buffer, and an output overlaps no input.
#pragma once

#include <cstddef>

#include "lockstep/lookup.hpp"

namespace lockstep {

constexpr std::size_t kPartialSums = 64;

// The sum of value(0) .. value(n - 1) as 64 strided partial sums and a tree; never -0.
template <class Value>
inline float rowsum(std::size_t n, Value value) {
  float sum[kPartialSums] = {};
  std::size_t i = 0;
  for (; i + kPartialSums <= n; i += kPartialSums)
    for (std::size_t j = 0; j < kPartialSums; ++j) sum[j] += value(i + j);
  for (std::size_t j = 0; i + j < n; ++j) sum[j] += value(i + j);
  for (std::size_t half = kPartialSums / 2; half > 0; half /= 2)
    for (std::size_t j = 0; j < half; ++j) sum[j] += sum[j + half];
  return sum[0] + 0.0f;
}

// The greatest magnitude among value(0) .. value(n - 1); NaN exceeds infinity; +0 for n = 0.
template <class Value>
inline float absmax(std::size_t n, Value value) {
  std::uint32_t greatest = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t magnitude = magnitude_bits(value(i));
    greatest = magnitude > greatest ? magnitude : greatest;
  }
  return canonical_magnitude(greatest);
}

// out[i] = low 8 bits of RNE(value(i) / s), which is returned: s = absmax * step, step = 1/127 or 1/255 in fp32.
// A zero or non-finite row gives zeros and keeps its s.
template <class Value>
inline float requantise(const Table& recip_table, std::size_t n, float step, Value value,
                        std::uint8_t* __restrict out) {
  const float s = absmax(n, value) * step;
  const float inverse = recip(recip_table, s);
  for (std::size_t i = 0; i < n; ++i) out[i] = round_to_int8bits(value(i) * inverse);
  return s;
}

// Loops over tables stay functions of their own: inlined, g++ forgets that outputs do not overlap the table, and
// does not vectorise them.
template <Kind kind>
[[gnu::noinline]] void apply_kind(const Table& table, std::size_t n, const float* __restrict x, float* __restrict y) {
  const float limit = limit_of(table);
  if constexpr (kind == Kind::kExp2 || kind == Kind::kRecip || kind == Kind::kRsqrt) {
    for (std::size_t i = 0; i < n; ++i) y[i] = evaluate<kind>(table, x[i], limit);
  } else {
    constexpr std::size_t kPiece = 8 * kLookups;
    alignas(64) std::int32_t index[kPiece] = {};
    alignas(64) float d[kPiece] = {};
    for (std::size_t begin = 0; begin < n; begin += kPiece) {
      const std::size_t count = n - begin < kPiece ? n - begin : kPiece;
      for (std::size_t i = 0; i < count; ++i) {
        const float magnitude = float_of(magnitude_bits(x[begin + i]));
        const Address at = address(table, limit < magnitude ? limit : magnitude);
        index[i] = at.integer - table.base;
        d[i] = at.d;
      }
      segments<kMaxEntries>(table, count, index, d, d);
      for (std::size_t i = 0; i < count; ++i) y[begin + i] = finish<kind>(x[begin + i], d[i]);
    }
  }
}

// y[i] = f(x[i]) for the function that the table stands for.
inline void apply(const Table& table, std::size_t n, const float* __restrict x, float* __restrict y) {
  switch (table.kind) {
    case Kind::kExp2: return apply_kind<Kind::kExp2>(table, n, x, y);
    case Kind::kRecip: return apply_kind<Kind::kRecip>(table, n, x, y);
    case Kind::kRsqrt: return apply_kind<Kind::kRsqrt>(table, n, x, y);
    case Kind::kReluMinus: return apply_kind<Kind::kReluMinus>(table, n, x, y);
    case Kind::kOdd: return apply_kind<Kind::kOdd>(table, n, x, y);
    case Kind::kSigmoid: return apply_kind<Kind::kSigmoid>(table, n, x, y);
  }
}

// y = (x - mean) / sqrt(variance + eps) * gamma + beta, in two passes; share = fl(1/n).
inline void layer_norm(const Table& rsqrt_table, std::size_t n, const float* __restrict x,
                       const float* __restrict gamma, const float* __restrict beta, float share, float eps,
                       float* __restrict y) {
  const float negative_mean = rowsum(n, [x](std::size_t i) { return x[i]; }) * -share;
  for (std::size_t i = 0; i < n; ++i) y[i] = x[i] + negative_mean;
  const float variance = rowsum(n, [y](std::size_t i) { return y[i] * y[i]; }) * share;
  const float rstd = rsqrt(rsqrt_table, variance + eps);
  for (std::size_t i = 0; i < n; ++i) y[i] = (y[i] * rstd) * gamma[i] + beta[i];
}

// y = x / sqrt(mean of squares + eps) * gamma; share = fl(1/n).
inline void rms_norm(const Table& rsqrt_table, std::size_t n, const float* __restrict x, const float* __restrict gamma,
                     float share, float eps, float* __restrict y) {
  const float square = rowsum(n, [x](std::size_t i) { return x[i] * x[i]; }) * share;
  const float r = rsqrt(rsqrt_table, square + eps);
  for (std::size_t i = 0; i < n; ++i) y[i] = (x[i] * r) * gamma[i];
}

// y = one head x of d features with its first 2 * pairs ones rotated: feature i with i + pairs, or 2i with 2i + 1.
template <bool interleaved>
inline void rotary(std::size_t d, std::size_t pairs, const float* __restrict x, const float* __restrict cosine,
                   const float* __restrict sine, float* __restrict y) {
  for (std::size_t i = 0; i < pairs; ++i) {
    const std::size_t low = interleaved ? 2 * i : i, high = interleaved ? 2 * i + 1 : i + pairs;
    y[low] = x[low] * cosine[i] + x[high] * -sine[i];
    y[high] = x[high] * cosine[i] + x[low] * sine[i];
  }
  for (std::size_t i = 2 * pairs; i < d; ++i) y[i] = x[i];
}

}  // namespace lockstep

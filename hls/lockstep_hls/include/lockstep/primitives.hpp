// The primitives of the numeric contract in plain C++17.
//
// Additions and multiplications are the language's own: the caller sets flush-to-zero (flush_to_zero.hpp; hardware has
// it built in) and compiles with -ffp-contract=off and never with -ffast-math. Everything is free of branches, so
// that loops over it vectorise.
#pragma once

#include <cstdint>
#include <cstring>

namespace lockstep {

constexpr std::uint32_t kSign = 0x80000000u;
constexpr std::uint32_t kInfinity = 0x7F800000u;
constexpr std::uint32_t kNaN = 0x7FC00000u;
constexpr std::uint32_t kFraction = 0x007FFFFFu;
constexpr std::uint32_t kOne = 0x3F800000u;
constexpr std::int32_t kMaskedExponent = -32000;
constexpr float kScoreLimit = 32000.0f;

inline std::uint32_t bits_of(float x) {
  std::uint32_t b;
  std::memcpy(&b, &x, sizeof b);
  return b;
}

inline float float_of(std::uint32_t b) {
  float x;
  std::memcpy(&x, &b, sizeof x);
  return x;
}

// m * 2^n on the exponent field: underflow gives a signed zero, overflow infinity; zero, infinity and NaN stay.
inline float scale2(float m, std::int32_t n) {
  const std::uint32_t b = bits_of(m);
  const std::uint32_t sign = b & kSign;
  const std::int32_t field = static_cast<std::int32_t>((b & kInfinity) >> 23);
  const std::int32_t low = n < -512 ? -512 : n;
  const std::int32_t scaled = field + (low > 512 ? 512 : low);
  std::uint32_t result = (b & ~kInfinity) | (static_cast<std::uint32_t>(scaled) << 23);
  result = scaled <= 0 ? sign : result;
  result = scaled >= 255 ? sign | kInfinity : result;
  result = field == 0 ? sign : result;
  result = field == 255 ? b : result;
  return float_of(result);
}

// scale2 for m between 0.5 and 2, or NaN, and n <= 0.
inline float scale_down(float m, std::int32_t n) {
  const std::uint32_t b = bits_of(m);
  const std::int32_t field = static_cast<std::int32_t>((b & kInfinity) >> 23);
  std::uint32_t result = b + (static_cast<std::uint32_t>(n) << 23);
  result = field + n <= 0 ? 0u : result;
  return float_of(field == 255 ? b : result);
}

// Without its sign, a float's pattern is an integer that orders like the magnitude; NaN patterns come last.
inline std::uint32_t magnitude_bits(float x) { return bits_of(x) & ~kSign; }

// A magnitude with subnormals read as +0 and every NaN as the same one.
inline float canonical_magnitude(std::uint32_t magnitude) {
  magnitude = magnitude <= kFraction ? 0u : magnitude;
  return float_of(magnitude > kInfinity ? kNaN : magnitude);
}

// RNE(x) where |x| < 2^22, elsewhere (and for NaN) 0.
inline std::int32_t round_to_int(float x) {
  const std::uint32_t low = bits_of(x + 12582912.0f) - bits_of(12582912.0f);  // 1.5 * 2^23
  const bool inside = magnitude_bits(x) < bits_of(4194304.0f);                 // 2^22
  return inside ? static_cast<std::int32_t>(low) : 0;
}

inline std::uint8_t round_to_int8bits(float x) { return static_cast<std::uint8_t>(round_to_int(x)); }

// x held inside +-32000; NaN passes.
inline float clamp_score(float z) {
  const float low = z < -kScoreLimit ? -kScoreLimit : z;
  return low > kScoreLimit ? kScoreLimit : low;
}

// max(x, +0): -0 gives +0, NaN passes.
inline float relu(float x) { return x <= 0.0f ? 0.0f : x; }

}  // namespace lockstep

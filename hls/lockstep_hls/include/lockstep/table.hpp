// Programmable function tables: quadratic segments of width 2^-k, addressed by adding 1.5 * 2^(23-k).
#pragma once

#include "lockstep/primitives.hpp"

namespace lockstep {

constexpr int kMaxEntries = 128;

// How a table becomes a function; the numbers are part of the binary layout of Table.
enum class Kind : std::int32_t {
  kExp2 = 0,       // 2^x, x held inside +-32000
  kRecip = 1,      // 1 / x, +0 for infinity and NaN
  kRsqrt = 2,      // 1 / sqrt(x), +0 unless x is finite and positive
  kReluMinus = 3,  // relu(x) - g(|x|)
  kOdd = 4,        // sign(x) * g(|x|)
  kSigmoid = 5,    // g(x), or 1 - g(-x)
};

// One function: 16 bytes of header and three columns of coefficients.
struct Table {
  Kind kind;
  std::int32_t k;
  std::int32_t base;     // the value of RNE(u * 2^k) that addresses entry 0
  std::int32_t entries;  // 1..128; 32 for exp2
  float c0[kMaxEntries];
  float c1[kMaxEntries];
  float c2[kMaxEntries];
};

struct Address {
  std::int32_t integer;  // RNE(u * 2^k), 0 for NaN
  float d;               // u - integer * 2^-k, exact
};

inline Address address(const Table& table, float u) {
  const float magic = float_of((static_cast<std::uint32_t>(150 - table.k) << 23) | 0x00400000u);
  const float t = u + magic;
  const std::int32_t integer = static_cast<std::int32_t>(bits_of(t) - bits_of(magic));
  return {u == u ? integer : 0, u - (t - magic)};
}

inline float segment(const Table& table, std::int32_t index, float d) {
  return table.c0[index] + d * (table.c1[index] + d * table.c2[index]);
}

// c0 + d * (c1 + d * c2) at u inside the table. The mask only keeps a wrong u from reading elsewhere.
inline float interpolate(const Table& table, float u) {
  const Address at = address(table, u);
  return segment(table, (at.integer - table.base) & (kMaxEntries - 1), at.d);
}

struct Exp2Parts {
  float m;
  std::int32_t n;
};

// 2^z = m * 2^n for z inside +-32000; NaN gives m = NaN, n = 0.
inline Exp2Parts exp2_parts(const Table& exp2, float z) {
  const Address at = address(exp2, z);
  return {segment(exp2, at.integer & 31, at.d), at.integer >> 5};
}

inline float exp2(const Table& exp2_table, float x) {
  const Exp2Parts parts = exp2_parts(exp2_table, clamp_score(x));
  return scale2(parts.m, parts.n);
}

inline float recip(const Table& table, float x) {
  const std::uint32_t b = bits_of(x);
  const std::int32_t field = static_cast<std::int32_t>((b & kInfinity) >> 23);
  const float y = scale2(interpolate(table, float_of((b & kFraction) | kOne)), 127 - field);
  std::uint32_t result = bits_of(y) | (b & kSign);
  result = field == 0 ? b & kSign : result;
  return float_of(field == 255 ? 0u : result);
}

inline float rsqrt(const Table& table, float x) {
  const std::uint32_t b = bits_of(x);
  const std::int32_t field = static_cast<std::int32_t>((b & kInfinity) >> 23);
  const std::int32_t exponent = field - 127;
  const float u = float_of((b & kFraction) | (static_cast<std::uint32_t>(127 + (exponent & 1)) << 23));
  const float y = scale2(interpolate(table, u), -(exponent >> 1));
  const bool valid = (b & kSign) == 0 && field != 0 && field != 255;
  return valid ? y : 0.0f;
}

inline float limit_of(const Table& table) {
  return scale2(static_cast<float>(table.base + table.entries - 1), -table.k);
}

// The table at min(|x|, limit); NaN gives any value or NaN.
inline float half_range(const Table& table, float magnitude, float limit) {
  return interpolate(table, limit < magnitude ? limit : magnitude);
}

// A half-range function of x from g, the table at |x|.
template <Kind kind>
inline float finish(float x, float g) {
  if constexpr (kind == Kind::kReluMinus) return relu(x) - g;
  if constexpr (kind == Kind::kOdd) return float_of((bits_of(g) & ~kSign) | (bits_of(x) & kSign));
  return x < 0.0f ? 1.0f - g : g;
}

template <Kind kind>
inline float evaluate(const Table& table, float x, float limit) {
  if constexpr (kind == Kind::kExp2) return exp2(table, x);
  if constexpr (kind == Kind::kRecip) return recip(table, x);
  if constexpr (kind == Kind::kRsqrt) return rsqrt(table, x);
  return finish<kind>(x, half_range(table, float_of(magnitude_bits(x)), limit));
}

}  // namespace lockstep

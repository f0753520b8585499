// Sixteen sums of products of four bytes: the step of every matrix product, by the widest instructions there are.
// Integer sums are exact modulo 2^32, so all variants give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lockstep {

constexpr std::size_t kVectorColumns = 16;  // columns of one vector of sums
constexpr std::size_t kGroup = 4;           // bytes of depth that one step takes

// `Packed` is the type of the packed side, std::uint8_t or std::int8_t; the broadcast side has the other sign.
template <class Packed>
using Opposite = std::conditional_t<std::is_signed_v<Packed>, std::uint8_t, std::int8_t>;

#if defined(__AVX512VNNI__)

using Sums = __m512i;
constexpr std::size_t kSumsInRegisters = 16;  // beside a vector of each side

template <class Packed>
struct Dot {
  using Left = __m512i;
  using Right = __m512i;
  static Sums zero() { return _mm512_setzero_si512(); }
  static Sums all(std::int32_t value) { return _mm512_set1_epi32(value); }
  static void store(std::int32_t* out, Sums sums) { _mm512_storeu_si512(out, sums); }
  static Left load(const Packed* packed) { return _mm512_loadu_si512(packed); }
  static Right broadcast(const Opposite<Packed>* four) {
    std::int32_t bytes;
    std::memcpy(&bytes, four, sizeof bytes);
    return _mm512_set1_epi32(bytes);
  }
  // _mm512_dpbusd_epi32 as assembly: g++ copies the accumulators of the intrinsic about, which halves the speed.
  static Sums add(Sums sums, Left left, Right right) {
    if constexpr (std::is_signed_v<Packed>) {
      asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(right), "v"(left));
    } else {
      asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(left), "v"(right));
    }
    return sums;
  }
};

#elif defined(__AVX2__)

// Without the dot-product instruction: 16-bit pairs of the even and of the odd bytes, which cannot saturate.
struct Halves {
  __m256i low, high;
};
using Sums = Halves;
constexpr std::size_t kSumsInRegisters = 4;

template <class Packed>
struct Dot {
  struct Left {
    Halves even, odd;
  };
  struct Right {
    __m256i even, odd;
  };
  static Sums zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Sums all(std::int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
  static void store(std::int32_t* out, Sums sums) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), sums.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), sums.high);
  }
  static __m256i even(__m256i x) {
    if constexpr (std::is_signed_v<Packed>) return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
    return _mm256_and_si256(x, _mm256_set1_epi16(0xFF));
  }
  static __m256i odd(__m256i x) {
    if constexpr (std::is_signed_v<Packed>) return _mm256_srai_epi16(x, 8);
    return _mm256_srli_epi16(x, 8);
  }
  static Left load(const Packed* packed) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + 32));
    return {{even(low), even(high)}, {odd(low), odd(high)}};
  }
  static Right broadcast(const Opposite<Packed>* four) {
    const auto pair = [](int a, int b) {
      return _mm256_set1_epi32(static_cast<std::int32_t>((a & 0xFFFF) | static_cast<std::uint32_t>(b) << 16));
    };
    return {pair(four[0], four[2]), pair(four[1], four[3])};
  }
  static __m256i step(__m256i sums, __m256i even, __m256i odd, Right right) {
    return _mm256_add_epi32(sums, _mm256_add_epi32(_mm256_madd_epi16(even, right.even),
                                                   _mm256_madd_epi16(odd, right.odd)));
  }
  static Sums add(Sums sums, Left left, Right right) {
    return {step(sums.low, left.even.low, left.odd.low, right), step(sums.high, left.even.high, left.odd.high, right)};
  }
};

#else

struct Sums {
  std::int32_t lane[kVectorColumns];
};
constexpr std::size_t kSumsInRegisters = 1;

template <class Packed>
struct Dot {
  using Left = const Packed*;
  using Right = const Opposite<Packed>*;
  static Sums zero() { return {}; }
  static Sums all(std::int32_t value) {
    Sums sums;
    for (std::int32_t& lane : sums.lane) lane = value;
    return sums;
  }
  static void store(std::int32_t* out, const Sums& sums) { std::memcpy(out, sums.lane, sizeof sums.lane); }
  static Left load(const Packed* packed) { return packed; }
  static Right broadcast(const Opposite<Packed>* four) { return four; }
  static Sums add(Sums sums, Left left, Right right) {
    for (std::size_t c = 0; c < kVectorColumns; ++c)
      for (std::size_t i = 0; i < kGroup; ++i) sums.lane[c] += left[c * kGroup + i] * right[i];
    return sums;
  }
};

#endif

}  // namespace lockstep

// The C functions of kernels.cpp, for the host and for plans. Arrays are row-major; what each computes stands there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lockstep/attention.hpp"

extern "C" {

void lockstep_set_threads(std::size_t threads);
std::size_t lockstep_threads();
void lockstep_apply(const lockstep::Table* table, std::size_t n, const float* x, float* y);
void lockstep_relu(std::size_t n, const float* x, float* y);
void lockstep_add(std::size_t rows, std::size_t n, const float* a, std::size_t a_stride, const float* b,
                  std::size_t b_stride, float* y);
void lockstep_multiply(std::size_t rows, std::size_t n, const float* a, std::size_t a_stride, const float* b,
                       std::size_t b_stride, float* y);
void lockstep_quantise_rows(const lockstep::Table* recip_table, std::size_t rows, std::size_t n, const float* x,
                            const float* prescale, std::uint8_t* q, float* s);
std::size_t lockstep_packed_bytes(std::size_t columns, std::size_t k);
void lockstep_pack(std::size_t columns, std::size_t k, const std::int8_t* w, std::uint8_t* packed);
void lockstep_linear(std::size_t rows, std::size_t columns, std::size_t k, const std::int8_t* q, const float* s,
                     const std::uint8_t* packed, const float* sw, const float* bias, float* y);
void lockstep_layer_norm(const lockstep::Table* rsqrt_table, std::size_t rows, std::size_t n, const float* x,
                         const float* gamma, const float* beta, float share, float eps, float* y);
void lockstep_rms_norm(const lockstep::Table* rsqrt_table, std::size_t rows, std::size_t n, const float* x,
                       const float* gamma, float share, float eps, float* y);
void lockstep_rotary(std::size_t rows, std::size_t heads, std::size_t d, std::size_t pairs, int interleaved,
                     const float* x, const float* cosine, const float* sine, float* y);
void lockstep_attention(const lockstep::Table* exp2_table, const lockstep::Table* recip_table, std::size_t rows,
                        std::size_t keys, std::size_t heads, std::size_t kv_heads, std::size_t d, std::size_t tile,
                        float factor, int causal, std::int64_t window, const std::int64_t* positions, const float* q,
                        const std::int8_t* k, const float* sk, const std::int8_t* v, const float* sv,
                        const lockstep::CacheLayout* layout, const float* bias, const std::uint8_t* mask, float* out);
void lockstep_keep(const lockstep::Table* recip_table, std::size_t rows, std::size_t heads, std::size_t d,
                   const float* x, const lockstep::CacheLayout* layout, std::uint8_t* q, float* s);
}

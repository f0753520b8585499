// Loops over single primitives, so that a test can compare each with the golden one.
#include "lockstep/flush_to_zero.hpp"
#include "lockstep/vector_ops.hpp"

using namespace lockstep;
using std::size_t;

extern "C" {

void probe_mul(size_t n, const float* __restrict a, const float* __restrict b, float* __restrict y) {
  const FlushToZero mode;
  for (size_t i = 0; i < n; ++i) y[i] = a[i] * b[i];
}

void probe_sub(size_t n, const float* __restrict a, const float* __restrict b, float* __restrict y) {
  const FlushToZero mode;
  for (size_t i = 0; i < n; ++i) y[i] = a[i] - b[i];
}

void probe_scale2(size_t n, const float* __restrict m, const std::int32_t* __restrict by, float* __restrict y) {
  const FlushToZero mode;
  for (size_t i = 0; i < n; ++i) y[i] = scale2(m[i], by[i]);
}

void probe_scale_down(size_t n, const float* __restrict m, const std::int32_t* __restrict by, float* __restrict y) {
  const FlushToZero mode;
  for (size_t i = 0; i < n; ++i) y[i] = scale_down(m[i], by[i]);
}

void probe_round(size_t n, const float* __restrict x, std::uint8_t* __restrict y) {
  const FlushToZero mode;
  for (size_t i = 0; i < n; ++i) y[i] = round_to_int8bits(x[i]);
}

void probe_int_to_float(size_t n, const std::int32_t* __restrict x, float* __restrict y) {
  const FlushToZero mode;
  for (size_t i = 0; i < n; ++i) y[i] = static_cast<float>(x[i]);
}

void probe_relu(size_t n, const float* __restrict x, float* __restrict y) {
  const FlushToZero mode;
  for (size_t i = 0; i < n; ++i) y[i] = relu(x[i]) + 0.0f;
}

void probe_exp2_parts(size_t n, const Table* table, const float* __restrict z, float* __restrict m,
                      std::int32_t* __restrict by) {
  const FlushToZero mode;
  for (size_t i = 0; i < n; ++i) {
    const Exp2Parts parts = exp2_parts(*table, clamp_score(z[i]));
    m[i] = parts.m;
    by[i] = parts.n;
  }
}

void probe_rowsum(size_t rows, size_t n, const float* x, float* y) {
  const FlushToZero mode;
  for (size_t r = 0; r < rows; ++r) y[r] = rowsum(n, [=](size_t i) { return x[r * n + i]; });
}

void probe_absmax(size_t rows, size_t n, const float* x, float* y) {
  const FlushToZero mode;
  for (size_t r = 0; r < rows; ++r) y[r] = absmax(n, [=](size_t i) { return x[r * n + i]; });
}
}

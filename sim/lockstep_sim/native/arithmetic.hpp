// The additions and multiplications of a pass that come before the function, in one loop as in the hardware's pipeline.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "instructions.hpp"  // generated
#include "lockstep/primitives.hpp"

namespace lockstep {

// What the steps of one row tile read, from its first column on. Every array may be read up to kVector values too far.
struct Arithmetic {
    static constexpr size_t kVector = 16;  // values at a time

    const isa::Vector& i;
    const float *lane0, *lane1;      // [R]
    const float *column0, *column1;  // [columns]
    const float* y;                  // [columns][R]

    // out[columns][R] from float or int32 values x; out may be written kVector values too far. `first`: the number of
    // the first column.
    template <class Value>
    void run(size_t first, size_t columns, const Value* x, float* out) const {
        const size_t start = first * isa::kRows, count = columns * isa::kRows;
        size_t n = 0;
        for (; n + kBlock * kVector <= count; n += kBlock * kVector) block<kBlock>(start + n, x + n, out + n);
        for (; n < count; n += kVector) block<1>(start + n, x + n, out + n);
    }

  private:
    typedef float Floats __attribute__((vector_size(64)));
    typedef int32_t Integers __attribute__((vector_size(64)));
    template <class Value>
    using Vector = std::conditional_t<std::is_same_v<Value, float>, Floats, Integers>;

    static constexpr size_t kBlock = 8;  // vectors between two looks at the instruction

    template <class Value>
    static Vector<Value> load(const Value* from) {
        Vector<Value> v;
        std::memcpy(&v, from, sizeof v);
        return v;
    }

    // `Count` vectors from value `at` on.
    template <size_t Count, class Value>
    void block(size_t at, const Value* x, float* out) const {
        Floats v[Count];
        const auto each = [&](auto step) {
#pragma GCC unroll 8
            for (size_t n = 0; n < Count; n++) step(v[n], at + n * kVector);
        };
        each([&](Floats& v, size_t n) { v = __builtin_convertvector(load<Value>(x + (n - at)), Floats); });
        switch (i.add1) {
            case isa::FirstAdd::kNone: break;
            case isa::FirstAdd::kLane0: each([&](Floats& v, size_t n) { v += lanes(lane0, n); }); break;
            case isa::FirstAdd::kY: each([&](Floats& v, size_t n) { v += load<float>(y + n); }); break;
        }
        switch (i.mul1) {
            case isa::FirstMultiply::kNone: break;
            case isa::FirstMultiply::kLane1: each([&](Floats& v, size_t n) { v *= lanes(lane1, n); }); break;
            case isa::FirstMultiply::kColumn0: each([&](Floats& v, size_t n) { v *= columns_of(column0, n); }); break;
            case isa::FirstMultiply::kSelf: each([&](Floats& v, size_t) { v *= v; }); break;
            case isa::FirstMultiply::kImmediate0: each([&](Floats& v, size_t) { v *= float_of(i.immediate0); }); break;
        }
        switch (i.mul2) {
            case isa::SecondMultiply::kNone: break;
            case isa::SecondMultiply::kLane0: each([&](Floats& v, size_t n) { v *= lanes(lane0, n); }); break;
            case isa::SecondMultiply::kColumn0: each([&](Floats& v, size_t n) { v *= columns_of(column0, n); }); break;
        }
        switch (i.add2) {
            case isa::SecondAdd::kNone: break;
            case isa::SecondAdd::kColumn1: each([&](Floats& v, size_t n) { v += columns_of(column1, n); }); break;
            case isa::SecondAdd::kImmediate1: each([&](Floats& v, size_t) { v += float_of(i.immediate1); }); break;
            case isa::SecondAdd::kY: each([&](Floats& v, size_t n) { v += load<float>(y + n); }); break;
        }
        each([&](Floats& v, size_t n) { std::memcpy(out + (n - at), &v, sizeof v); });
    }

    // The lane's value, or the column's, of the elements from `at` on.
    static Floats lanes(const float* lane, size_t at) {
        if constexpr (isa::kRows >= kVector) return load<float>(lane + at % isa::kRows);
        Floats v;
        for (size_t e = 0; e < kVector; e++) v[e] = lane[e % isa::kRows];
        return v;
    }
    static auto columns_of(const float* column, size_t at) {
        if constexpr (isa::kRows >= kVector) {
            return column[at / isa::kRows];
        } else {
            Floats v;
            for (size_t e = 0; e < kVector; e++) v[e] = column[(at + e) / isa::kRows];
            return v;
        }
    }
};

}  // namespace lockstep

// The maxima of one row tile: of the whole row, or one for each section of its columns.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "instructions.hpp"  // generated
#include "lockstep/fused_pass.hpp"

namespace lockstep {

class RowMaxima {
  public:
    static uint32_t count(const isa::Vector& i) {
        return i.max_columns ? (i.columns + i.max_columns - 1) / i.max_columns : 1;
    }

    // From nothing, or where it continues from the words at `from`.
    void begin(const isa::Vector& i, const float* from) {
        const bool exponents = i.maximum == isa::Maximum::kExponent;
        peaks_.assign(size_t(count(i)) * kRows, exponents ? INT32_MIN : 0);
        if (!i.max_continue) return;
        std::memcpy(peaks_.data(), from, peaks_.size() * sizeof peaks_[0]);
        // A NaN that an addition made may carry any sign here; in the core it is the positive one.
        if (!exponents)
            for (int32_t& peak : peaks_)
                if ((uint32_t(peak) & ~kSign) > kInfinity) peak = int32_t(kNaN);
    }

    // x[columns][kRows] becomes what SCORE makes of it; its exponents count where they are what the maximum is of.
    void score(const isa::Vector& i, float* x) {
        int32_t unused[kRows] = {};
        if (i.maximum != isa::Maximum::kExponent) return Pass::score(i.columns, x, unused);
        each_section(i, [x](uint32_t first, uint32_t columns, int32_t* peak) {
            Pass::score(columns, x + size_t(first) * kRows, peak);
        });
    }

    void absolute(const isa::Vector& i, const float* x) {
        each_section(i, [x](uint32_t first, uint32_t columns, int32_t* peak) {
            Pass::absolute_maximum(columns, x + size_t(first) * kRows, peak);
        });
    }

    void end(float* to) const { std::memcpy(to, peaks_.data(), peaks_.size() * sizeof peaks_[0]); }

  private:
    static constexpr int kRows = isa::kRows;
    using Pass = FusedPass<kRows>;

    // `find` with first column, columns, and maxima of each section.
    template <class Find>
    void each_section(const isa::Vector& i, Find find) {
        const uint32_t size = i.max_columns ? i.max_columns : i.columns;
        for (uint32_t first = 0, n = 0; first < i.columns; first += size, n++)
            find(first, std::min(size, i.columns - first), &peaks_[size_t(n) * kRows]);
    }

    std::vector<int32_t> peaks_;
};

}  // namespace lockstep

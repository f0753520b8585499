// The index memory: lists of columns that VECTOR selects and by which LOAD gathers rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "instructions.hpp"  // generated
#include "lockstep/fused_pass.hpp"

namespace lockstep {

class IndexMemory {
  public:
    // Entries of a LOAD that gathers, and columns and list of a VECTOR that selects, are inside.
    static bool in_bounds(const isa::Load& i) { return !i.gather || i.gather_from + i.rows <= isa::kIndexEntries; }
    static bool in_bounds(const isa::Vector& i) {
        return !i.select || (i.columns <= isa::kIndexEntries && i.select_to + i.select <= isa::kIndexEntries);
    }

    // The row of device memory that is row `row` of a LOAD.
    uint32_t row(const isa::Load& i, uint32_t row) const { return i.gather ? entries_[i.gather_from + row] : row; }

    // The rows of device memory of a LOAD that gathers, in order.
    void append_rows(const isa::Load& i, std::vector<uint32_t>& rows) const {
        if (in_bounds(i)) rows.insert(rows.end(), entries_ + i.gather_from, entries_ + i.gather_from + i.rows);
    }

    // List the greatest columns of x[columns][kRows]; of equal ones the first.
    void select(const isa::Vector& i, const float* x) {
        const uint32_t end = std::min<uint32_t>(isa::kRows, i.select_lane + i.select_more_lanes + 1);
        ranks_.clear();
        for (uint32_t j = 0; j < i.columns; j++, x += isa::kRows) {
            uint64_t value = 0;
            for (uint32_t r = i.select_lane; r < end; r++) value = std::max<uint64_t>(value, order(bits_of(x[r])));
            if (j < i.select_first || j + i.select_last >= i.columns) value = kForced;
            ranks_.push_back((kForced - value) << 16 | j);
        }
        const auto listed = ranks_.begin() + std::ptrdiff_t(std::min(i.select, i.columns));
        std::nth_element(ranks_.begin(), listed, ranks_.end());
        std::transform(ranks_.begin(), listed, ranks_.begin(), [](uint64_t rank) { return rank & 0xFFFF; });
        std::sort(ranks_.begin(), listed);
        std::transform(ranks_.begin(), listed, &entries_[i.select_to], [](uint64_t j) { return uint16_t(j); });
    }

  private:
    static constexpr uint64_t kForced = uint64_t(1) << 32;

    static uint32_t order(uint32_t bits) {
        if ((bits & ~kSign) > kInfinity) return 0;
        return bits & kSign ? ~bits : bits | kSign;
    }

    uint16_t entries_[isa::kIndexEntries] = {};
    std::vector<uint64_t> ranks_;  // of a selection: how far below the greatest value there is, and column
};

}  // namespace lockstep

// When the finder of chunks knows what stands behind a chunk: rtl/lockstep_rtl/matrix/chunk_finder.py.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "instructions.hpp"  // generated
#include "prediction.hpp"
#include "zero_words.hpp"

namespace lockstep {

class ChunkSearch {
  public:
    using Time = int64_t;
    static constexpr size_t kNone = SIZE_MAX;

    // Keep the jumps of all tiles of an instruction, and count them; returns where they begin, kNone where there are none.
    size_t add(const std::vector<Jump>& jumps, Prediction& result) {
        if (jumps.empty()) return kNone;
        const size_t first = jumps_.size();
        jumps_.insert(jumps_.end(), jumps.begin(), jumps.end());
        uint64_t zeros = 0;
        for (const Jump& jump : jumps) zeros += jump.zeros;
        result.skipped_chunks += zeros, result.mac_cycles -= zeros * isa::kRows;
        return first;
    }

    // An instruction begins whose second chunk can be asked for at `first`.
    void begin(Time first) { asked_ = first - 1, found_ = false, items_ = 0, taken_.clear(); }

    // Cycles of a tile that begins at `begin` and whose next jump is `jump`: its chunks, and `rest` steps behind them. The
    // last step of a chunk waits until it is known what follows.
    Time period(Time begin, size_t& jump, uint32_t rest) {
        Time now = begin;
        for (bool end = false; !end; jump++) {
            const Time known = find(jumps_[jump].zeros);
            now = std::max(now + isa::kRows, known + 2);
            taken_.push_back(now - 2);
            end = jumps_[jump].end;
        }
        return now + rest - begin;
    }

  private:
    static constexpr Time kAnswer = 2;  // from its question

    // When it can be taken that so many chunks are passed over: one more is asked for, or the tile's end.
    Time find(uint32_t zeros) {
        for (uint32_t n = 0; n <= zeros; n++) {
            // What was found in the cycle before is not in the queue yet: one place is left for it.
            const bool at_once = room(items_ - found_) <= asked_ + 1;
            asked_ = at_once ? asked_ + 1 : std::max(asked_ + 2, room(items_));
            found_ = n == zeros;
        }
        items_++;
        return asked_ + kAnswer;
    }

    // From when on there is room beside all but the oldest of so many.
    Time room(size_t items) const {
        constexpr size_t beside = isa::kChunksAhead - 2;
        return items <= beside ? 0 : taken_[items - beside - 1] + 1;
    }

    std::vector<Jump> jumps_;   // of all instructions
    Time asked_ = 0;            // the last question, and whether its answer was a chunk that is multiplied, or an end
    bool found_ = false;
    size_t items_ = 0;          // such answers so far
    std::vector<Time> taken_;   // when MATRIX took them
};

}  // namespace lockstep

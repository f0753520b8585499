// From a LOAD or STORE to bursts on the bus: when each is cut off and when its address is shown, as bursts.py does it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "bus.hpp"
#include "instructions.hpp"  // generated
#include "latencies.hpp"

namespace lockstep {

class Requests : Latencies {
  public:
    using Latencies::Time;

    // A block of `rows` rows of `beats` beats, accepted at `start`; `gathered` names them, where they do not lie one
    // behind the other.
    void begin(Time start, uint32_t address, uint32_t stride, uint32_t rows, uint32_t beats,
               std::vector<uint32_t> gathered = {}) {
        address_ = address, stride_ = stride, rows_ = rows, row_ = 0, beats_ = beats;
        gathered_ = std::move(gathered);
        last_cut_ = start - 1;
        begin_row();
    }

    // All bursts of the last block are cut off: in cycle `cut()`, and another may be accepted two cycles later.
    bool all_cut() const { return !rows_; }
    Time cut() const { return last_cut_; }

    // Cut off what the two stages in front of the bus have room for, as far as times are known.
    void cut_on() {
        while (!all_cut() && cut_.size() < 2) {
            const size_t number = asked_ + cut_.size();
            last_cut_ = std::max(last_cut_ + 1, number > 1 ? times_[number % 2] : 0);
            const uint32_t length = std::min(left_, kBurstBeats - beat_ % kBurstBeats);
            beat_ += length, left_ -= length;
            if (!left_) rows_--, row_++, begin_row();
            cut_.push_back({last_cut_, length, all_cut()});
        }
    }

    // Whether a burst is cut that has not been asked for, and when that may be.
    bool any() const { return !cut_.empty(); }
    Time wanted() const { return std::max(cut_.front().when + 2, asked_ ? times_[(asked_ - 1) % 2] + 1 : 0); }

    // Ask for it in cycle `when`; its first beat may come `latency` later.
    Bus::Burst ask(Time when, Time latency) {
        const Cut next = cut_.front();
        cut_.pop_front();
        times_[asked_++ % 2] = when;
        return {when, when + latency, next.length, false, next.last};
    }

    // How many have been asked for.
    size_t asked() const { return asked_; }

  private:
    struct Cut {
        Time when;
        uint32_t length;
        bool last;
    };

    void begin_row() {
        const uint32_t number = row_ < gathered_.size() ? gathered_[row_] : row_;
        beat_ = (address_ + number * stride_) / isa::kBusBytes, left_ = beats_;
    }

    std::vector<uint32_t> gathered_;
    uint32_t address_ = 0, stride_ = 0, rows_ = 0, row_ = 0, beats_ = 0, beat_ = 0, left_ = 0;
    std::deque<Cut> cut_;
    Time last_cut_ = 0, times_[2] = {};  // of the last two that were asked for
    size_t asked_ = 0;
};

}  // namespace lockstep

// What the timing model tells a recording: spans of units, bursts and result tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "recording.hpp"

namespace lockstep {

// Does nothing where there is no recording.
class TimingRecorder {
  public:
    using Time = int64_t;

    explicit TimingRecorder(Recording* recording) : recording_(recording) {}

    bool on() const { return recording_; }

    void instruction(int unit, Time accepted, Time end) {
        if (!recording_) return;
        recording_->add(uint64_t(accepted), kAccept, unsigned(unit));
        recording_->add(uint64_t(end), kEnd, unsigned(unit));
    }

    // A unit is in a state from `begin` on and until `end`; neighbours become one span.
    void span(int unit, UnitState state, Time begin, Time end) {
        if (!recording_ || begin >= end) return;
        Span& last = spans_[unit];
        if (last.state != state || last.end != begin) {
            tell(unit);
            last = {begin, end, state};
        }
        last.end = end;
    }

    void burst(int source, Time asked, Time first, Time end, uint64_t beats) {
        if (!recording_) return;
        recording_->add(uint64_t(std::max<Time>(asked, 0)), kAsk, unsigned(source), beats);
        recording_->add(uint64_t(first), kFirst, unsigned(source));
        recording_->add(uint64_t(end), kLast, unsigned(source));
    }

    // At the end: spans that are still open, and tiles by the times at which they were complete and discarded.
    void finish(int matrix, const std::vector<Time>& complete, const std::vector<Time>& discarded) {
        if (!recording_) return;
        for (int unit = 0; unit < 4; unit++) tell(unit);
        size_t in = 0, out = 0;
        while (in < complete.size() || out < discarded.size()) {
            const bool leaves = out < discarded.size() && (in == complete.size() || discarded[out] <= complete[in]);
            const Time now = leaves ? discarded[out++] : complete[in++];
            recording_->add(uint64_t(now), kTiles, unsigned(matrix), in - out);
        }
    }

  private:
    struct Span {
        Time begin = 0, end = 0;
        UnitState state = kIdle;
    };

    void tell(int unit) {
        const Span& s = spans_[unit];
        if (s.begin < s.end) recording_->add(uint64_t(s.begin), kSpan, unsigned(unit), uint64_t(s.end - s.begin), s.state);
    }

    Recording* recording_;
    Span spans_[4];
};

}  // namespace lockstep

// What the timing model tells a recording: spans of units, bursts and result tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bus.hpp"
#include "instructions.hpp"  // generated
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

    // `beats`: the cycles in which they were sent.
    void burst(int source, Time asked, const std::vector<Cycles>& beats) {
        if (!recording_) return;
        uint64_t count = 0;
        for (const auto [begin, end] : beats) count += uint64_t(end - begin);
        recording_->add(uint64_t(std::max<Time>(asked, 0)), kAsk, unsigned(source), count);
        recording_->add(uint64_t(beats.front().begin), kFirst, unsigned(source));
        recording_->add(uint64_t(beats.back().end), kLast, unsigned(source));
    }

    // LOAD's oldest instruction is busy in the cycles of its beats, and waits for data in the others.
    void begin_load(Time begin) { told_ = begin; }
    void load(Time asked, const std::vector<Cycles>& beats) {
        burst(kLoadUnit, asked, beats);
        for (const auto [begin, end] : beats) {
            span(kLoadUnit, kWaitData, told_, begin);
            span(kLoadUnit, kBusy, std::max(told_, begin), end);
            told_ = std::max(told_, end);
        }
    }
    void end_load(Time end) { span(kLoadUnit, kWaitData, told_, end); }

    // STORE too, but its beats may be sent while an earlier instruction is the oldest one: they are told at the end.
    void store(Time asked, const std::vector<Cycles>& beats) {
        burst(kStoreUnit, asked, beats);
        store_beats_.insert(store_beats_.end(), beats.begin(), beats.end());
    }
    void store_ran(Cycles run) {
        if (recording_) store_runs_.push_back(run);
    }

    // At the end: spans that are still open, and tiles by the times at which they were complete and discarded.
    void finish(const std::vector<Time>& complete, const std::vector<Time>& discarded) {
        if (!recording_) return;
        tell_stores();
        for (int unit = 0; unit < 4; unit++) tell(unit);
        size_t in = 0, out = 0;
        while (in < complete.size() || out < discarded.size()) {
            const bool leaves = out < discarded.size() && (in == complete.size() || discarded[out] <= complete[in]);
            const Time now = leaves ? discarded[out++] : complete[in++];
            recording_->add(uint64_t(now), kTiles, unsigned(isa::Unit::kMatrix), in - out);
        }
    }

  private:
    static constexpr int kLoadUnit = int(isa::Unit::kLoad), kStoreUnit = int(isa::Unit::kStore);

    struct Span {
        Time begin = 0, end = 0;
        UnitState state = kIdle;
    };

    void tell(int unit) {
        const Span& s = spans_[unit];
        if (s.begin < s.end) recording_->add(uint64_t(s.begin), kSpan, unsigned(unit), uint64_t(s.end - s.begin), s.state);
    }

    void tell_stores() {
        size_t n = 0;
        for (const Cycles& run : store_runs_) {
            Time told = run.begin;
            for (; n < store_beats_.size() && store_beats_[n].begin < run.end; n++) {
                const Cycles& sent = store_beats_[n];
                span(kStoreUnit, kWaitData, told, sent.begin);
                span(kStoreUnit, kBusy, std::max(told, sent.begin), std::min(sent.end, run.end));
                told = std::max(told, sent.end);
                if (sent.end > run.end) break;
            }
            span(kStoreUnit, kWaitData, told, run.end - 1);
            span(kStoreUnit, kBusy, std::max(told, run.end - 1), run.end);
        }
    }

    Recording* recording_;
    Span spans_[4];
    Time told_ = 0;  // until when LOAD's states are
    std::vector<Cycles> store_beats_, store_runs_;
};

}  // namespace lockstep

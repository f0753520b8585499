// Events of the Verilated core: what its units and its bus do, cycle by cycle. Without a recording none of this runs.
#pragma once

#include "Vlockstep_core___024root.h"
#include "recording.hpp"

namespace lockstep {

// What the bus does in one cycle.
struct Handshakes {
    bool ar, r, aw, w;
    uint8_t reader;        // who asks for a read: LOAD or kFetch
    uint32_t ar_beats, aw_beats;
    uint8_t receiver;      // whose beat this is
    bool r_last, w_last;
    uint32_t w_address;
};

class RtlRecorder {
  public:
    Recording recording;

    void start() {
        *this = RtlRecorder();
        recording.on = true;
    }

    // Look at a cycle in which a program is under way. Its time is what the counter CYCLES has before it.
    void sample(const Vlockstep_core___024root& core, const Handshakes& bus) {
#define LOCKSTEP_UNIT(number, name)                                                                         \
    sample_unit(number, core.lockstep_core__DOT__machine__DOT__queue_##name##__DOT__taken,                  \
                core.lockstep_core__DOT__machine__DOT__queue_##name##__DOT__retires,                        \
                core.lockstep_core__DOT__supervisor__DOT__running_##name,                                   \
                core.lockstep_core__DOT__supervisor__DOT__stalled_##name,                                   \
                core.lockstep_core__DOT__supervisor__DOT__waiting_##name)
        LOCKSTEP_UNIT(kLoad, load);
        LOCKSTEP_UNIT(1, matrix);
        LOCKSTEP_UNIT(2, vector);
        LOCKSTEP_UNIT(kStore, store);
#undef LOCKSTEP_UNIT
        const uint32_t complete = core.lockstep_core__DOT__machine__DOT__matrix__DOT__accumulators__DOT__complete;
        if (complete != tiles_) recording.add(now_, kTiles, 1, tiles_ = complete);
        if (bus.ar) recording.add(now_, kAsk, bus.reader, bus.ar_beats);
        if (bus.aw) recording.add(now_, kAsk, kStore, bus.aw_beats);
        if (bus.r) beat(bus.receiver, bus.r_last);
        if (bus.w) {
            beat(kStore, bus.w_last);
            recording.add(now_, kWrite, kStore, bus.w_address);
        }
        now_++;
    }

    // Close what is still open, and give the events.
    const std::vector<Event>& events() {
        for (unsigned unit = 0; unit < 4; unit++) change(unit, kIdle);
        return recording.events;
    }

  private:
    static constexpr unsigned kLoad = 0, kStore = 3;

    // An instruction is at work from the cycle behind its acceptance until it retires, that cycle included.
    void sample_unit(unsigned unit, bool taken, bool retires, bool running, bool stalled, bool waiting) {
        const UnitState state = running ? (stalled ? kWaitData : kBusy) : waiting ? kWaitToken : kIdle;
        if (state != state_[unit]) change(unit, state);
        if (taken) recording.add(now_ + 1, kAccept, unit);
        if (retires) recording.add(now_ + 1, kEnd, unit);
    }

    void change(unsigned unit, UnitState state) {
        if (state_[unit] != kIdle)
            recording.add(since_[unit], kSpan, unit, now_ - since_[unit], state_[unit]);
        state_[unit] = state, since_[unit] = now_;
    }

    void beat(uint8_t source, bool last) {
        if (!inside_[source]) recording.add(now_, kFirst, source);
        if (last) recording.add(now_ + 1, kLast, source);
        inside_[source] = !last;
    }

    uint64_t now_ = 0, since_[4] = {};
    UnitState state_[4] = {kIdle, kIdle, kIdle, kIdle};
    uint32_t tiles_ = 0;
    bool inside_[5] = {};
};

}  // namespace lockstep

// The data bus of device memory in time, as memory_model.hpp runs it: a beat a cycle but for refresh; reads in the order
// of their addresses, writes in theirs, and turns where both want the bus.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <utility>
#include <vector>

namespace lockstep {

struct BusTiming {
    uint32_t latency, refresh_interval, refresh_cycles;
};

// Cycles `begin` to `end` - 1.
struct Cycles {
    int64_t begin, end;
};

class Bus {
  public:
    using Time = int64_t;
    enum Side { kRead, kWrite };

    struct Burst {
        Time asked, ready;  // when its address is taken, and when its first beat may come
        uint64_t beats, left;
        bool fetch, last;  // brings instructions; the last of a LOAD or STORE
        Burst(Time asked, Time ready, uint64_t beats, bool fetch, bool last)
            : asked(asked), ready(ready), beats(beats), left(beats), fetch(fetch), last(last) {}
    };

    Bus(BusTiming timing, bool tell)
        : interval_(timing.refresh_interval ? timing.refresh_interval : 1),
          rest_(timing.refresh_interval ? timing.refresh_cycles : 0),
          tell_(tell) {}

    // Sends beats of the oldest burst of each side until one has ended, and returns whose. A null one has nothing to
    // send before the other ends.
    Side carry(Burst* read, Burst* write) {
        Burst* const bursts[] = {read, write};
        for (const Side side : {kRead, kWrite})
            if (bursts[side] && bursts[side]->ready > ends_[side])
                next_[side] = std::max(next_[side], slot(bursts[side]->ready));
        if (read && write) {
            const Slot gap = next_[kWrite] - next_[kRead];
            const Side first = gap ? gap > 0 ? kRead : kWrite : wrote_last_ ? kRead : kWrite;
            if (gap) {
                if (send(first, *bursts[first], std::min<uint64_t>(bursts[first]->left, uint64_t(std::abs(gap))), 1))
                    return first;
                return carry(read, write);
            }
            return take_turns(first, *bursts[first], *bursts[1 - first]);
        }
        const Side side = read ? kRead : kWrite;
        send(side, *bursts[side], bursts[side]->left, 1);
        return side;
    }

    // A burst that goes next ends here at the earliest.
    Time earliest_end(Side side, const Burst& burst) const {
        return std::max(burst.ready, ends_[side]) + Time(burst.left);
    }

    // The cycle behind the last beat of a side.
    Time end(Side side) const { return ends_[side]; }

    // The side rests for so many cycles.
    void delay(Side side, Time cycles) {
        if (cycles) next_[side] = slot(ends_[side] += cycles);
    }

    // Where it is told: the cycles of the beats that a side has sent since this was taken.
    std::vector<Cycles> take_told(Side side) { return std::exchange(told_[side], {}); }

  private:
    using Slot = int64_t;  // the number of a cycle among those without refresh

    // The first one that begins in cycle `now` or later.
    Slot slot(Time now) const {
        if (!rest_) return now;
        return now / interval_ * (interval_ - rest_) + std::max<Time>(0, now % interval_ - rest_);
    }
    Time cycle(Slot slot) const {
        if (!rest_) return slot;
        const Time useful = interval_ - rest_;
        return slot / useful * interval_ + rest_ + slot % useful;
    }

    // `count` beats, one in every `step` slots; whether the burst has ended.
    bool send(Side side, Burst& burst, uint64_t count, Slot step) {
        if (tell_) tell(side, count, step);
        next_[side] += Slot(count - 1) * step + 1;
        ends_[side] = cycle(next_[side] - 1) + 1;
        burst.left -= count;
        wrote_last_ = side == kWrite;
        return !burst.left;
    }

    // Both want the next slot, and `first` has it.
    Side take_turns(Side first, Burst& one, Burst& other) {
        const Side second = Side(1 - first);
        next_[second]++;
        if (one.left <= other.left) {
            if (one.left > 1) send(second, other, one.left - 1, 2);
            send(first, one, one.left, 2);
            next_[second] = next_[first];
            return first;
        }
        const uint64_t count = other.left;
        send(first, one, count, 2);
        send(second, other, count, 2);
        next_[first] = next_[second];
        return second;
    }

    void tell(Side side, uint64_t count, Slot step) {
        std::vector<Cycles>& told = told_[side];
        for (uint64_t n = 0; n < count; n++) {
            const Time at = cycle(next_[side] + Slot(n) * step);
            if (!told.empty() && told.back().end == at) told.back().end++;
            else told.push_back({at, at + 1});
        }
    }

    Time interval_, rest_;
    bool tell_, wrote_last_ = false;
    Slot next_[2] = {};  // from which each side may send
    Time ends_[2] = {};  // of what each side has sent
    std::vector<Cycles> told_[2];
};

}  // namespace lockstep

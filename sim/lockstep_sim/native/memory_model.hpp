// Device memory behind AXI: one data bus of one beat a cycle, a latency, and the pauses of DRAM refresh.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

namespace lockstep {

struct MemoryTiming {
    uint32_t latency;           // cycles from an address to its first beat
    uint32_t refresh_interval;  // cycles from one refresh to the next, 0 for none
    uint32_t refresh_cycles;    // cycles in which the data bus rests
};

// Reads are answered in the order of their addresses, writes in the order of theirs. Reads and writes share the data
// bus and take turns when both want it.
class MemoryModel {
  public:
    MemoryModel(uint64_t bytes, uint32_t bus_bytes, MemoryTiming timing)
        : memory(bytes), bus_bytes_(bus_bytes), timing_(timing) {}

    std::vector<uint8_t> memory;

    // What the model shows in a cycle.
    bool ar_ready() const { return reads_.size() < kQueue; }
    bool aw_ready() const { return writes_.size() < kQueue; }
    bool r_valid() const { return r_valid_; }
    const uint8_t* r_data() const { return r_beat_; }
    uint32_t r_id() const { return reads_.front().id; }
    bool r_last() const { return reads_.front().beat == reads_.front().len; }
    uint32_t r_resp() const { return r_error_ ? 2 : 0; }
    bool w_ready() const { return w_ready_; }
    bool b_valid() const { return !answers_.empty() && answers_.front().when <= now_; }
    // Where the next beat will be written; there is one where w_ready().
    uint64_t write_address() const { return writes_.front().addr + uint64_t(writes_.front().beat) * bus_bytes_; }
    uint32_t b_resp() const { return answers_.front().error ? 2 : 0; }

    // Decide what to show in this cycle. `w_waits`: the core shows write data.
    void prepare(bool w_waits) {
        const bool rest = timing_.refresh_interval && now_ % timing_.refresh_interval < timing_.refresh_cycles;
        const bool can_read = !reads_.empty() && reads_.front().when <= now_ && !rest;
        const bool can_write = !writes_.empty() && w_waits && !rest;
        // AXI: a beat once shown stays until it is taken, so a waiting read keeps the bus.
        w_ready_ = can_write && !(r_valid_ || (can_read && write_had_it_));
        r_valid_ = r_valid_ || (can_read && !w_ready_);
        if (w_ready_ || r_valid_) write_had_it_ = w_ready_;
        if (r_valid_) {
            const Burst& burst = reads_.front();
            const uint64_t at = burst.addr + uint64_t(burst.beat) * bus_bytes_;
            r_error_ = at + bus_bytes_ > memory.size();
            r_beat_ = r_error_ ? zeros_ : memory.data() + at;
        }
    }

    // Take the handshakes of this cycle and go to the next.
    void accept_read(uint64_t addr, uint32_t len, uint32_t id) {
        reads_.push_back({addr, len, id, 0, now_ + timing_.latency, false});
    }
    void accept_write(uint64_t addr, uint32_t len) { writes_.push_back({addr, len, 0, 0, now_, false}); }
    void beat_read() {
        r_valid_ = false;
        if (reads_.front().beat++ == reads_.front().len) reads_.pop_front();
    }
    // `strobe` has one bit for each byte of `data`, lowest first.
    void beat_written(const uint8_t* data, const uint8_t* strobe) {
        Burst& burst = writes_.front();
        const uint64_t at = burst.addr + uint64_t(burst.beat) * bus_bytes_;
        if (at + bus_bytes_ > memory.size()) {
            burst.error = true;
        } else {
            for (uint32_t i = 0; i < bus_bytes_; i++)
                if (strobe[i / 8] >> i % 8 & 1) memory[at + i] = data[i];
        }
        if (burst.beat++ == burst.len) {
            answers_.push_back({now_ + timing_.latency, burst.error});
            writes_.pop_front();
        }
    }
    void write_answered() { answers_.pop_front(); }
    void next_cycle() { now_++; }

  private:
    static constexpr size_t kQueue = 8;
    struct Burst {
        uint64_t addr;
        uint32_t len, id, beat;
        uint64_t when;
        bool error;
    };
    struct Answer {
        uint64_t when;
        bool error;
    };
    uint32_t bus_bytes_;
    MemoryTiming timing_;
    uint64_t now_ = 0;
    std::deque<Burst> reads_, writes_;
    std::deque<Answer> answers_;
    bool r_valid_ = false, w_ready_ = false, r_error_ = false, write_had_it_ = false;
    const uint8_t* r_beat_ = nullptr;
    uint8_t zeros_[256] = {};
};

}  // namespace lockstep

// The Verilated core and its memory behind a C interface, run in batches of cycles.
#include <verilated.h>
#ifdef LOCKSTEP_TRACE
#include <verilated_fst_c.h>
#endif

#include <memory>
#include <string>

#include "Vlockstep_core.h"
#include "memory_model.hpp"
#include "rtl_recorder.hpp"

namespace {

using lockstep::Handshakes;
using lockstep::MemoryModel;
using lockstep::MemoryTiming;

constexpr uint32_t kBusBytes = LOCKSTEP_BUS_BYTES;
constexpr int kRegisterTimeout = 1000;  // cycles; the register file answers in two

struct RtlCore {
    RtlCore(uint64_t bytes, MemoryTiming timing) : model(bytes, kBusBytes, timing) {
        context = std::make_unique<VerilatedContext>();
#ifdef LOCKSTEP_TRACE
        context->traceEverOn(true);
#endif
        top = std::make_unique<Vlockstep_core>(context.get());
        top->rst = 1;
        for (int i = 0; i < 4; i++) step();
        top->rst = 0;
    }

    ~RtlCore() {
        trace_close();
        top->final();
    }

    void step() {
        model.prepare(top->memory_write_w_valid);
        top->memory_read_ar_ready = model.ar_ready();
        top->memory_read_r_valid = model.r_valid();
        if (model.r_valid()) {
            std::memcpy(&top->memory_read_r_data, model.r_data(), kBusBytes);
            top->memory_read_r_id = model.r_id();
            top->memory_read_r_last = model.r_last();
            top->memory_read_r_resp = model.r_resp();
        }
        top->memory_write_aw_ready = model.aw_ready();
        top->memory_write_w_ready = model.w_ready();
        top->memory_write_b_valid = model.b_valid();
        if (model.b_valid()) top->memory_write_b_resp = model.b_resp();
        top->clk = 0;
        top->eval();

        // The cycle's handshakes, taken before the edge.
        const bool ar = top->memory_read_ar_valid && top->memory_read_ar_ready;
        const bool r = top->memory_read_r_valid && top->memory_read_r_ready;
        const bool aw = top->memory_write_aw_valid && top->memory_write_aw_ready;
        const bool w = top->memory_write_w_valid && top->memory_write_w_ready;
        const bool b = top->memory_write_b_valid && top->memory_write_b_ready;
        if (recorder.recording.on && !top->irq) record({ar, r, aw, w});
        if (r) model.beat_read();
        if (b) model.write_answered();
        if (ar) model.accept_read(top->memory_read_ar_addr, top->memory_read_ar_len, top->memory_read_ar_id);
        if (aw) model.accept_write(top->memory_write_aw_addr, top->memory_write_aw_len);
        if (w) {
            uint8_t data[kBusBytes], strobe[(kBusBytes + 7) / 8];
            std::memcpy(data, &top->memory_write_w_data, sizeof data);
            std::memcpy(strobe, &top->memory_write_w_strb, sizeof strobe);
            model.beat_written(data, strobe);
        }
        model.next_cycle();
#ifdef LOCKSTEP_TRACE
        const bool counts = !top->irq;
        if (counts && wave_cycles && busy_cycles == wave_first) trace_open(wave_path.c_str());
        // A part of a run has the time of the counter CYCLES.
        const uint64_t time = 2 * (wave_cycles ? busy_cycles : cycles);
        const bool shown = trace && (counts || !wave_cycles);
        if (shown) trace->dump(time);
#endif
        top->clk = 1;
        top->eval();
#ifdef LOCKSTEP_TRACE
        if (shown) trace->dump(time + 1);
        busy_cycles += counts;
        if (wave_cycles && busy_cycles == wave_first + wave_cycles) trace_close();
#endif
        cycles++;
    }

    int write_register(uint32_t address, uint32_t value) {
        top->registers_aw_valid = top->registers_w_valid = top->registers_b_ready = 1;
        top->registers_aw_addr = address;
        top->registers_w_data = value;
        for (int i = 0; i < kRegisterTimeout; i++) {
            // Ready is combinational and depends on nothing of this cycle's memory traffic.
            top->eval();
            const bool taken = top->registers_aw_valid && top->registers_aw_ready;
            const bool answered = top->registers_b_valid;
            const int error = top->registers_b_resp;
            step();
            if (taken) top->registers_aw_valid = top->registers_w_valid = 0;
            if (answered) {
                top->registers_b_ready = 0;
                return error ? -2 : 0;
            }
        }
        return -1;
    }

    int read_register(uint32_t address, uint32_t* value) {
        top->registers_ar_valid = top->registers_r_ready = 1;
        top->registers_ar_addr = address;
        for (int i = 0; i < kRegisterTimeout; i++) {
            top->eval();
            const bool taken = top->registers_ar_valid && top->registers_ar_ready;
            const bool answered = top->registers_r_valid;
            const int error = top->registers_r_resp;
            *value = top->registers_r_data;
            step();
            if (taken) top->registers_ar_valid = 0;
            if (answered) {
                top->registers_r_ready = 0;
                return error ? -2 : 0;
            }
        }
        return -1;
    }

    void record(Handshakes bus) {
        constexpr uint8_t kLoad = 0;
        bus.reader = top->memory_read_ar_id ? lockstep::kFetch : kLoad;
        bus.receiver = top->memory_read_r_id ? lockstep::kFetch : kLoad;
        bus.ar_beats = top->memory_read_ar_len + 1u, bus.aw_beats = top->memory_write_aw_len + 1u;
        bus.r_last = top->memory_read_r_last, bus.w_last = top->memory_write_w_last;
        bus.w_address = bus.w ? uint32_t(model.write_address()) : 0;
        recorder.sample(*top->rootp, bus);
    }

#ifdef LOCKSTEP_TRACE
    void trace_open(const char* path) {
        trace_close();
        trace = std::make_unique<VerilatedFstC>();
        top->trace(trace.get(), 99);
        trace->open(path);
    }
#endif

    void trace_close() {
#ifdef LOCKSTEP_TRACE
        if (trace) trace->close();
        trace.reset();
#endif
    }

    std::unique_ptr<VerilatedContext> context;
    std::unique_ptr<Vlockstep_core> top;
    MemoryModel model;
    lockstep::RtlRecorder recorder;
    uint64_t cycles = 0;
#ifdef LOCKSTEP_TRACE
    std::unique_ptr<VerilatedFstC> trace;
    std::string wave_path;
    uint64_t wave_first = 0, wave_cycles = 0, busy_cycles = 0;
#endif
};

}  // namespace

extern "C" {

void* lockstep_rtl_create(uint64_t bytes, uint32_t latency, uint32_t refresh_interval, uint32_t refresh_cycles) {
    return new RtlCore(bytes, {latency, refresh_interval, refresh_cycles});
}

void lockstep_rtl_destroy(void* core) { delete static_cast<RtlCore*>(core); }

uint8_t* lockstep_rtl_memory(void* core) { return static_cast<RtlCore*>(core)->model.memory.data(); }

// 0, -1 where the register file did not answer, -2 where it refused.
int lockstep_rtl_write_register(void* core, uint32_t address, uint32_t value) {
    return static_cast<RtlCore*>(core)->write_register(address, value);
}

int lockstep_rtl_read_register(void* core, uint32_t address, uint32_t* value) {
    return static_cast<RtlCore*>(core)->read_register(address, value);
}

// Run until the interrupt is high, at most `cycles`; returns the cycles run.
uint64_t lockstep_rtl_run(void* core, uint64_t cycles) {
    RtlCore& c = *static_cast<RtlCore*>(core);
    const uint64_t start = c.cycles;
    while (c.cycles - start < cycles && !c.top->irq) c.step();
    return c.cycles - start;
}

// Forget what was recorded, and record from now on or not.
void lockstep_rtl_record(void* core, int on) {
    lockstep::RtlRecorder& recorder = static_cast<RtlCore*>(core)->recorder;
    recorder.start();
    recorder.recording.on = on;
}

const lockstep::Event* lockstep_rtl_events(void* core, uint64_t* count) {
    const auto& events = static_cast<RtlCore*>(core)->recorder.events();
    *count = events.size();
    return events.data();
}

// Begin a waveform: now where `cycles` is 0, else in the cycle `first` of the counter CYCLES, for so many cycles.
// 0, or -1 where this build has none.
int lockstep_rtl_trace_open(void* core, const char* path, uint64_t first, uint64_t cycles) {
#ifdef LOCKSTEP_TRACE
    RtlCore& c = *static_cast<RtlCore*>(core);
    c.wave_path = path, c.wave_first = first, c.wave_cycles = cycles;
    if (!cycles) c.trace_open(path);
    return 0;
#else
    (void)core, (void)path, (void)first, (void)cycles;
    return -1;
#endif
}

void lockstep_rtl_trace_close(void* core) { static_cast<RtlCore*>(core)->trace_close(); }
}

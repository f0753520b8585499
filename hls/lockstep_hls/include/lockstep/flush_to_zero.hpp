// The floating-point mode of the contract, for x86.
#pragma once

#if !defined(__SSE2__)
#error "the kernels need an x86 CPU: others detect tininess before rounding, and their products differ"
#endif

namespace lockstep {

// Results and operands under 2^-126 are zeros while an object of this class lives (MXCSR: FTZ and DAZ), rounding is
// to nearest even and nothing traps. The caller's mode returns afterwards. MXCSR belongs to a thread.
class FlushToZero {
 public:
  FlushToZero() {
    asm volatile("stmxcsr %0" : "=m"(saved_) : : "memory");
    const unsigned wanted = 0x9FC0;  // FTZ 0x8000, DAZ 0x0040, all six exceptions masked 0x1F80
    asm volatile("ldmxcsr %0" : : "m"(wanted) : "memory");
  }
  ~FlushToZero() { asm volatile("ldmxcsr %0" : : "m"(saved_) : "memory"); }
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
  unsigned saved_ = 0;
};

}  // namespace lockstep

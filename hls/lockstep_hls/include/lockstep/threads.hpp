// Work that is dealt out to the cores. Every index is computed by one thread in the same way, so that results do not
// depend on how many threads there are.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "lockstep/flush_to_zero.hpp"

namespace lockstep {

// Threads that wait for jobs. The caller works too and never waits for a thread that has not begun: one that comes late
// (or is gone, after a fork) costs nothing but its help.
class Pool {
 public:
  explicit Pool(std::size_t threads) {
    for (std::size_t i = 1; i < threads; ++i) helpers_.emplace_back([this] { serve(); });
  }
  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      ++generation_;
    }
    wake_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  std::size_t threads() const { return helpers_.size() + 1; }

  // work(i) for every i < count, in any order, in the contract's floating-point mode.
  template <class Work>
  void run(std::size_t count, const Work& work) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (count < 2 || helpers_.empty() || !turn.owns_lock()) {  // another caller has the helpers
      const FlushToZero mode;
      for (std::size_t i = 0; i < count; ++i) work(i);
      return;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      call_ = [](const void* context, std::size_t i) { (*static_cast<const Work*>(context))(i); };
      context_ = &work;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      open_ = true;
      ++generation_;
    }
    if (asleep_.load() > 0) wake_.notify_all();
    take();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      open_ = false;
    }
    spin_while([this] { return working_.load(std::memory_order_acquire) != 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return working_ == 0; });
  }

 private:
  static constexpr std::chrono::microseconds kSpin{60};  // about the time between two products of a small model

  // To sleep and be woken takes longer than most waits last. Whoever else wants the core may have it.
  template <class Condition>
  static void spin_while(Condition condition) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    while (condition() && std::chrono::steady_clock::now() < until) {
      for (int i = 0; i < 32 && condition(); ++i) asm volatile("pause");
      if (condition()) std::this_thread::yield();
    }
  }

  void take() {
    const FlushToZero mode;
    for (std::size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) call_(context_, i);
  }

  void serve() {
    std::uint64_t seen = 0;
    while (true) {
      spin_while([&] { return generation_.load(std::memory_order_acquire) == seen; });
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ++asleep_;
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        --asleep_;
        seen = generation_.load();
        if (stopping_) return;
        if (!open_) continue;
        ++working_;
      }
      take();
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        --working_;
      }
      done_.notify_one();
    }
  }

  std::vector<std::thread> helpers_;
  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<std::size_t> next_{0}, asleep_{0}, working_{0};
  std::size_t count_ = 0;
  void (*call_)(const void*, std::size_t) = nullptr;
  const void* context_ = nullptr;
  bool open_ = false, stopping_ = false;
};

}  // namespace lockstep

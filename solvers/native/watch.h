// Lets a signal, such as that of Ctrl-C, end a long computation.
//
// Python's handlers run in its main thread, and only where that thread asks for them while it holds
// the interpreter's lock. So the thread that was called gives the lock back for the time of the
// computation, takes it for a moment every tenth of a second, and asks. All threads stop where a
// handler has raised; the caller, ctypes.PyDLL, then raises the handler's exception.

#pragma once

#include <omp.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

// Functions of Python's C interface, as solvers/native/library.py passes them.
struct Python {
  void* (*save)();          // PyEval_SaveThread
  void (*restore)(void*);   // PyEval_RestoreThread
  int (*check)();           // PyErr_CheckSignals
};
inline Python python = {nullptr, nullptr, nullptr};

// One computation, made by the thread that was called.
class Watch {
 public:
  Watch() : state_(python.save()), next_(Clock::now() + kPeriod) {}
  ~Watch() { python.restore(state_); }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

  // For the thread that was called, which is the first of its team.
  void look() {
    if (stopped() || Clock::now() < next_) return;
    python.restore(state_);
    if (python.check() != 0) stopped_ = true;
    state_ = python.save();
    next_ = Clock::now() + kPeriod;
  }

  // For every thread of a team at the end of its share: the first one looks on till all are here.
  void finish() {
    arrived_.fetch_add(1);
    if (omp_get_thread_num() != 0) return;
    const Clock::time_point start = Clock::now();
    while (arrived_.load() % omp_get_num_threads() != 0) {
      if (Clock::now() - start < kSpin) {
        std::this_thread::yield();
      } else {
        std::this_thread::sleep_for(kNap);
        look();
      }
    }
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kPeriod{100}, kSpin{2};
  static constexpr std::chrono::microseconds kNap{100};

  void* state_;
  Clock::time_point next_;
  std::atomic<bool> stopped_{false};
  std::atomic<int> arrived_{0};
};

// What one thread does for a computation: the clock is read once in a few million operations.
class Meter {
 public:
  explicit Meter(Watch& watch) : watch_(watch), first_(omp_get_thread_num() == 0) {}

  // Notes some multiplications; returns whether to stop.
  bool spend(int64_t work) {
    work_ += work;
    if (work_ >= kWork) {
      work_ = 0;
      if (first_) watch_.look();
    }
    return watch_.stopped();
  }
  bool stopped() const { return watch_.stopped(); }

 private:
  static constexpr int64_t kWork = 1 << 22;

  Watch& watch_;
  const bool first_;
  int64_t work_ = 0;
};

// A pool of threads that go through a program together. The caller is one of them.
//
// Between two steps the others sleep; between two phases of a step all meet at a barrier. Whoever waits spins for a
// moment and then sleeps, so that a busy machine is not made busier.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace octavo {

class Pool {
 public:
  explicit Pool(int size) : size_(size) {
    for (int i = 1; i < size; i++) threads_.emplace_back([this, i] { serve(i); });
  }

  ~Pool() {
    stop_ = true;
    round_.fetch_add(1);
    wake(round_);
    for (auto& thread : threads_) thread.join();
  }

  int size() const { return size_; }

  // Calls work(thread) on every thread, on the caller's as thread 0; returns when all are done.
  void run(const std::function<void(int)>& work) {
    work_ = &work;
    if (size_ > 1) {
      round_.fetch_add(1);
      if (sleeping_.load()) wake(round_);
    }
    work(0);
    barrier();
  }

  // All threads wait here for one another.
  void barrier() {
    if (size_ == 1) return;
    const uint32_t now = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(now + 1);
      if (sleeping_.load()) wake(phase_);
    } else {
      wait_while(phase_, now, 4000);
    }
  }

 private:
  void serve(int index) {
    uint32_t seen = 0;
    for (;;) {
      wait_while(round_, seen, 2000);
      seen = round_.load();
      if (stop_) return;
      (*work_)(index);
      barrier();
    }
  }

  void wait_while(std::atomic<uint32_t>& word, uint32_t value, int spins) {
    for (int i = 0; i < spins; i++) {
      if (word.load(std::memory_order_acquire) != value) return;
#if defined(__x86_64__)
      _mm_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
    sleeping_.fetch_add(1);
    while (word.load() == value) {
#if defined(__linux__)
      syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
      std::this_thread::yield();
#endif
    }
    sleeping_.fetch_sub(1);
  }

  static void wake(std::atomic<uint32_t>& word) {
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
#else
    (void)word;
#endif
  }

  const int size_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> sleeping_{0};
};

}  // namespace octavo

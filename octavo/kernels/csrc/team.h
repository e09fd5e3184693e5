// What a kernel knows of the threads that run it with others: its own number, how to share out work, when to wait.
#pragma once

#include <algorithm>

#include "threads.h"

namespace octavo {

// Counters from which threads draw their next piece of work, one for each phase between two barriers.
struct Counters {
  struct alignas(64) Line { std::atomic<int64_t> next{0}; };
  Line lines[4];
};

class Team {
 public:
  Team(Pool& pool, Counters& counters, int thread) : thread(thread), pool_(pool), counters_(counters) {}

  int size() const { return pool_.size(); }

  // Ends a phase: what every thread wrote in it can be read by all.
  void barrier() {
    pool_.barrier();
    phase_++;
    // Everybody has left the phase before this one, so its counter is idle until it comes round again.
    if (thread == 0) counters_.lines[(phase_ + 2) % 4].next.store(0, std::memory_order_relaxed);
  }

  // The next piece of work of this phase, each number once over all threads. Who gets which changes no result.
  int64_t next() { return counters_.lines[phase_ % 4].next.fetch_add(1, std::memory_order_relaxed); }

  // This thread's share of `count` equal pieces: [first, last).
  std::pair<int64_t, int64_t> share(int64_t count) const {
    return {count * thread / size(), count * (thread + 1) / size()};
  }

  // The same in whole blocks of 16: what is known of a block is written by one thread.
  std::pair<int64_t, int64_t> share_blocks(int64_t count) const {
    const auto [begin, end] = share((count + 15) / 16);
    return {begin * 16, std::min(end * 16, count)};
  }

  const int thread;

 private:
  Pool& pool_;
  Counters& counters_;
  int64_t phase_ = 0;
};

}  // namespace octavo

// What the threads of a pool share: the job that there is, and whose parts of it are left.
//
// Each thread has a slot with a run of parts, takes these first, and then what is left of the slots
// that follow its own. What a job costs must not grow faster than the number of threads does, so:
//
// * one cache line says what the job is, and all workers watch that line: the caller writes nothing
//   else. A slot whose word is of an older job is as good as full: nobody has to fill it;
// * a thread looks at kReach slots besides its own, however many there are. Only a caller that has
//   waited for longer than a part should take looks at all of them.
//
// Parts are claimed by compare-and-swap of the slot's word, the job's number above the next part. A
// worker that comes late finds another number or nothing left, and nobody waits for it.
//
// `Atomic` is std::atomic; bench/pool_cost.cpp has one that counts the lines which move.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace precast {

// Parts that a job is cut into for each thread: few enough that weights are read in long runs, enough
// that threads that started late or were interrupted leave the rest to the others. A thread's own
// follow each other in memory.
constexpr int kPartsPerThread = 4;

// Slots that a thread helps, behind its own: all of them in pools of up to eight.
constexpr int kReach = 7;

template <template <typename> typename Atomic>
class Board {
 public:
  using Job = void (*)(void* context, int part, int parts);

  // Where a thread is in its way through a job.
  struct Turn {
    int self;
    uint32_t job;
    int reach = kReach;
    int offset = 0;  // of the slot that it takes from, behind its own
  };

  explicit Board(int threads) : slots_(threads), reports_(threads) {}

  int threads() const { return static_cast<int>(slots_.size()); }
  int parts() const { return threads() * kPartsPerThread; }

  // The caller's: posts a job once all parts of the one before are done. Nobody reads what is written
  // here before they have seen the number, and nobody has a part of this job before.
  uint32_t post(Job fn, void* context) {
    fn_ = fn;
    context_ = context;
    const uint32_t job = number_.load(std::memory_order_relaxed) + 1;
    number_.store(job);  // sequentially consistent with the count of sleepers
    return job;
  }

  // The number of the job that there is.
  uint32_t number(std::memory_order order = std::memory_order_acquire) const {
    return number_.load(order);
  }

  // The next part for a thread, or -1: nothing is left within its reach.
  int take(Turn& turn) {
    const int threads = this->threads();
    for (; turn.offset <= turn.reach && turn.offset < threads; ++turn.offset) {
      const int slot = turn.self + turn.offset;
      const int part = claim(slot < threads ? slot : slot - threads, turn.job);
      if (part >= 0) return part;
    }
    return -1;
  }

  // Runs what a thread can take of the job; returns how many parts.
  int work_on(Turn turn) {
    int done = 0;
    for (int part; (part = take(turn)) >= 0; ++done) fn_(context_, part, parts());
    return done;
  }

  // A worker has run so many parts. Whoever sees that sees what they wrote.
  void report(int self, int done) {
    if (done > 0) reports_[self].parts.fetch_add(done, std::memory_order_release);
  }

  // Parts of all jobs that workers have run.
  uint64_t reported() const {
    uint64_t total = 0;
    for (const Report& report : reports_) total += report.parts.load(std::memory_order_acquire);
    return total;
  }

 private:
  struct alignas(64) Slot {
    Atomic<uint64_t> word{0};
  };
  struct alignas(64) Report {
    Atomic<uint64_t> parts{0};
  };

  // The next part of a slot in this job, or -1.
  int claim(int slot, uint32_t job) {
    const uint64_t begin = static_cast<uint64_t>(slot) * kPartsPerThread;
    Atomic<uint64_t>& shared = slots_[slot].word;
    uint64_t word = shared.load(std::memory_order_acquire);
    while (true) {
      const auto age = static_cast<int32_t>(job - static_cast<uint32_t>(word >> 32));
      const uint64_t next = age > 0 ? begin : word & 0xffffffff;
      if (age < 0 || next == begin + kPartsPerThread) return -1;
      if (shared.compare_exchange_weak(word, static_cast<uint64_t>(job) << 32 | (next + 1),
                                       std::memory_order_acq_rel, std::memory_order_acquire)) {
        return static_cast<int>(next);
      }
    }
  }

  alignas(64) Atomic<uint32_t> number_{0};
  // Read by those who have claimed a part of the job, which ends after they are done with it.
  Job fn_ = nullptr;
  void* context_ = nullptr;
  std::vector<Slot> slots_;
  std::vector<Report> reports_;
};

}  // namespace precast

#include "pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <thread>

namespace precast {
namespace {

// How long a worker spins for the next job before it sleeps: about 100 us, which bridges the gaps
// between the operators of a step but not an idle engine.
constexpr int kSpins = 4000;

// Parts that a job is cut into for each thread: few enough that weights are read in long runs, enough
// that threads that started late or were interrupted leave the rest to the others. A thread's own
// follow each other in memory.
constexpr int kPartsPerThread = 4;

// What a thread fetches ahead, at the most: half of a second cache of 1 MB, which the jobs before it
// use too.
constexpr int64_t kMostAhead = 512 << 10;
// Lines that it asks for before it pauses and looks for a job again. Requests above what a core keeps
// open (24) are dropped: 12 to a pause came at 28 GB/s, all of them; of 16 half were lost.
constexpr int64_t kLinesAtOnce = 12;

// More linears than a model has: 48 layers of 128 experts.
constexpr size_t kMostLinears = 1 << 16;

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr,
          nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr,
          nullptr, 0);
}

// What one of the threads fetches of a stretch that is read next.
Prefetch share_of(Stretch next, int thread, int threads) {
  const Range mine = share(next.bytes, thread, threads);
  return {static_cast<const char*>(next.at) + mine.begin, std::min(mine.end - mine.begin, kMostAhead)};
}

void pin(int64_t core) {
  if (core < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<int>(core), &set);
  sched_setaffinity(0, sizeof(set), &set);  // best effort: a container may forbid the core
}

}  // namespace

Stretch ReadOrder::follow(Stretch now) {
  if (after_.size() > kMostLinears) after_.clear();
  if (previous_ != nullptr) after_[previous_] = now;
  previous_ = now.at;
  const auto next = after_.find(now.at);
  return next == after_.end() ? Stretch{} : next->second;
}

// Each thread has a slot with a run of parts, and takes from the others' once its own is done. A slot's
// word is the job's number above the next part, and parts are claimed by compare-and-swap: a worker
// that comes late finds another number or nothing left, and nobody waits for it. That word is also what a
// worker waits on, in the cache line that says what to run, so that a job costs it one line's way from
// the caller, and the caller one line's way back.
struct ThreadPool::State {
  struct alignas(64) Slot {
    std::atomic<uint64_t> word{0};
    void (*fn)(void*, int, int) = nullptr;  // read by those who have claimed a part
    void* context = nullptr;
  };
  struct alignas(64) Finished {
    std::atomic<uint64_t> parts{0};  // of all jobs, by this worker
  };

  explicit State(int threads) : slots(threads), finished(threads) {}

  // The next part of a slot in this job, or -1.
  int claim(int slot, uint32_t job) {
    const uint64_t end = static_cast<uint64_t>(slot + 1) * kPartsPerThread;
    std::atomic<uint64_t>& shared = slots[slot].word;
    uint64_t word = shared.load(std::memory_order_acquire);
    while (word >> 32 == job && (word & 0xffffffff) < end) {
      if (shared.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel,
                                       std::memory_order_acquire)) {
        return static_cast<int>(word & 0xffffffff);
      }
    }
    return -1;
  }

  // Runs what is left of a job, `self`'s own parts first; returns how many parts.
  int work_on(int self, uint32_t job) {
    const int threads = static_cast<int>(slots.size());
    int done = 0;
    for (int i = 0; i < threads; ++i) {
      const int slot = self + i < threads ? self + i : self + i - threads;
      for (int part; (part = claim(slot, job)) >= 0; ++done) {
        slots[slot].fn(slots[slot].context, part, threads * kPartsPerThread);
      }
    }
    return done;
  }

  uint64_t finished_by_workers() const {
    uint64_t total = 0;
    for (const Finished& f : finished) total += f.parts.load(std::memory_order_acquire);
    return total;
  }

  // A worker's share of what is read next, if that was published after `seen`.
  void look_ahead(int self, uint32_t& seen, Prefetch& ahead) const {
    const uint32_t now = next_published.load(std::memory_order_acquire);
    if (now == seen) return;
    seen = now;
    // Both may be of a later call already, or of two: that fetches something else, no harm done.
    const Stretch next{next_at.load(std::memory_order_relaxed),
                       next_bytes.load(std::memory_order_relaxed)};
    ahead = share_of(next, self, static_cast<int>(slots.size()));
  }

  std::vector<Slot> slots;
  std::vector<Finished> finished;
  uint32_t job = 0;       // the caller's
  uint64_t expected = 0;  // parts that workers have claimed in all jobs; the caller's
  alignas(64) std::atomic<uint32_t> next_published{0};
  std::atomic<const char*> next_at{nullptr};
  std::atomic<int64_t> next_bytes{0};
  alignas(64) std::atomic<uint32_t> wakeups{0};  // what sleeping workers wait on
  std::atomic<int> sleepers{0};
  std::atomic<bool> stopping{false};
  std::vector<std::thread> workers;
};

ThreadPool& ThreadPool::instance() {
  // Never destroyed: workers may still be asleep in it while the process exits.
  static ThreadPool* pool = new ThreadPool();
  return *pool;
}

void ThreadPool::start(const std::vector<int64_t>& cores) {
  stop();
  size_ = cores.empty() ? 1 : static_cast<int>(cores.size());
  if (!cores.empty()) pin(cores[0]);
  if (size_ == 1) return;
  state_ = new State(size_);
  for (int i = 1; i < size_; ++i) {
    state_->workers.emplace_back(&ThreadPool::work, this, i, cores[i]);
  }
}

void ThreadPool::stop() {
  if (state_ == nullptr) return;
  state_->stopping.store(true);
  publish(nullptr, nullptr);
  for (auto& worker : state_->workers) worker.join();
  delete state_;
  state_ = nullptr;
  size_ = 1;
}

void ThreadPool::work(int self, int64_t core) {
  pin(core);
  State& s = *state_;
  const std::atomic<uint64_t>& word = s.slots[self].word;
  uint32_t seen = 0, seen_ahead = 0;
  Prefetch ahead;
  while (true) {
    int spins = 0;
    while (word.load(std::memory_order_acquire) >> 32 == seen) {
      if (ahead.lines > 0) {
        ahead.ask(kLinesAtOnce);
        _mm_pause();
        continue;
      }
      if (++spins < kSpins) {
        _mm_pause();
        continue;
      }
      // Sequentially consistent with publish(): either it sees the sleeper, or we see the job.
      s.sleepers.fetch_add(1);
      const uint32_t wakeups = s.wakeups.load();
      if (word.load() >> 32 == seen) futex_wait(s.wakeups, wakeups);
      s.sleepers.fetch_sub(1);
    }
    if (s.stopping.load()) return;
    seen = static_cast<uint32_t>(word.load(std::memory_order_acquire) >> 32);
    if (const int done = s.work_on(self, seen); done > 0) {
      s.finished[self].parts.fetch_add(done, std::memory_order_release);
    }
    s.look_ahead(self, seen_ahead, ahead);
  }
}

// Nobody has a part of the job before, so nobody reads what is written here.
void ThreadPool::publish(void (*fn)(void*, int, int), void* context) {
  State& s = *state_;
  const uint64_t job = ++s.job;
  for (int slot = size_ - 1; slot >= 0; --slot) {  // the caller's last: it needs no telling
    s.slots[slot].fn = fn;
    s.slots[slot].context = context;
    s.slots[slot].word.store(job << 32 | static_cast<uint64_t>(slot) * kPartsPerThread,
                             slot > 0 ? std::memory_order_seq_cst : std::memory_order_release);
  }
  if (s.sleepers.load() == 0) return;
  s.wakeups.fetch_add(1);
  futex_wake_all(s.wakeups);
}

void ThreadPool::will_read(Stretch now) {
  const Stretch next = order_.follow(now);
  ahead_ = share_of(next, 0, size_);
  if (size_ == 1) return;
  State& s = *state_;
  s.next_at.store(static_cast<const char*>(next.at), std::memory_order_relaxed);
  s.next_bytes.store(next.bytes, std::memory_order_relaxed);
  s.next_published.fetch_add(1, std::memory_order_release);
}

void ThreadPool::fetch_ahead() { ahead_.ask(kLinesAtOnce); }

void ThreadPool::run(void (*fn)(void*, int, int), void* context) {
  if (size_ == 1) {
    fn(context, 0, 1);
    return;
  }
  publish(fn, context);
  State& s = *state_;
  s.expected += size_ * kPartsPerThread - s.work_on(0, s.job);
  int spins = 0;
  while (s.finished_by_workers() != s.expected) {
    if (++spins < kSpins) {
      _mm_pause();
    } else {
      sched_yield();  // a worker lost its core within a part
    }
  }
}

}  // namespace precast

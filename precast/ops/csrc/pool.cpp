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

#include "pool_board.h"

namespace precast {
namespace {

// How long a worker spins for the next job before it sleeps: about 100 us, which bridges the gaps
// between the operators of a step but not an idle engine.
constexpr int kSpins = 4000;

// How long a caller waits for the workers before it looks for parts that nobody near can take: longer
// than a thread needs that is only a little behind, shorter than one stays away that lost its core.
constexpr int kPatience = 400;

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

struct ThreadPool::State {
  explicit State(int threads) : board(threads) {}

  // A worker's share of what is read next, if that was published after `seen`.
  void look_ahead(int self, uint32_t& seen, Prefetch& ahead) const {
    const uint32_t now = next_published.load(std::memory_order_acquire);
    if (now == seen) return;
    seen = now;
    // Both may be of a later call already, or of two: that fetches something else, no harm done.
    const Stretch next{next_at.load(std::memory_order_relaxed),
                       next_bytes.load(std::memory_order_relaxed)};
    ahead = share_of(next, self, board.threads());
  }

  Board<std::atomic> board;
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
  uint32_t seen = 0, seen_ahead = 0;
  Prefetch ahead;
  while (true) {
    int spins = 0;
    while (s.board.number() == seen) {
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
      if (s.board.number(std::memory_order_seq_cst) == seen) futex_wait(s.wakeups, wakeups);
      s.sleepers.fetch_sub(1);
    }
    if (s.stopping.load()) return;
    seen = s.board.number();
    s.board.report(self, s.board.work_on({self, seen}));
    s.look_ahead(self, seen_ahead, ahead);
  }
}

uint32_t ThreadPool::publish(void (*fn)(void*, int, int), void* context) {
  State& s = *state_;
  const uint32_t job = s.board.post(fn, context);
  if (s.sleepers.load() > 0) {
    s.wakeups.fetch_add(1);
    futex_wake_all(s.wakeups);
  }
  return job;
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
  const uint32_t job = publish(fn, context);
  State& s = *state_;
  s.expected += s.board.parts() - s.board.work_on({0, job});
  int spins = 0;
  while (s.board.reported() != s.expected) {
    ++spins;
    if (spins % kPatience == 0) s.expected -= s.board.work_on({0, job, size_});
    if (spins < kSpins) {
      _mm_pause();
    } else {
      sched_yield();  // a worker lost its core within a part
    }
  }
}

}  // namespace precast

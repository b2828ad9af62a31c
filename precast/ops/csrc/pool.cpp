#include "pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <thread>

namespace precast {
namespace {

// How long a worker spins for the next job before it sleeps: about 100 us, which bridges the gaps
// between the operators of a step but not an idle engine.
constexpr int kSpins = 4000;

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr,
          nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr,
          nullptr, 0);
}

void pin(int64_t core) {
  if (core < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<int>(core), &set);
  sched_setaffinity(0, sizeof(set), &set);  // best effort: a container may forbid the core
}

}  // namespace

struct ThreadPool::State {
  alignas(64) std::atomic<uint32_t> job{0};
  alignas(64) std::atomic<int> sleepers{0};
  alignas(64) std::atomic<int> pending{0};
  void (*fn)(void*, int, int) = nullptr;
  void* context = nullptr;
  bool stopping = false;
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
  state_ = new State();
  for (int i = 1; i < size_; ++i) {
    state_->workers.emplace_back(&ThreadPool::work, this, i, static_cast<int>(cores[i]));
  }
}

void ThreadPool::stop() {
  if (state_ == nullptr) return;
  state_->stopping = true;
  state_->job.fetch_add(1);
  futex_wake_all(state_->job);
  for (auto& worker : state_->workers) worker.join();
  delete state_;
  state_ = nullptr;
  size_ = 1;
}

void ThreadPool::work(int thread, int core) {
  pin(core);
  State& s = *state_;
  uint32_t seen = 0;
  while (true) {
    int spins = 0;
    while (s.job.load(std::memory_order_acquire) == seen) {
      if (++spins < kSpins) {
        _mm_pause();
        continue;
      }
      // Sequentially consistent with run(): either run sees the sleeper, or the futex sees the job.
      s.sleepers.fetch_add(1);
      if (s.job.load() == seen) futex_wait(s.job, seen);
      s.sleepers.fetch_sub(1);
    }
    seen = s.job.load(std::memory_order_acquire);
    if (s.stopping) return;
    s.fn(s.context, thread, size_);
    s.pending.fetch_sub(1, std::memory_order_release);
  }
}

void ThreadPool::run(void (*fn)(void*, int, int), void* context) {
  if (size_ == 1) {
    fn(context, 0, 1);
    return;
  }
  State& s = *state_;
  s.fn = fn;
  s.context = context;
  s.pending.store(size_ - 1, std::memory_order_relaxed);
  s.job.fetch_add(1);
  if (s.sleepers.load() > 0) futex_wake_all(s.job);
  fn(context, 0, size_);
  int spins = 0;
  while (s.pending.load(std::memory_order_acquire) != 0) {
    if (++spins < kSpins) {
      _mm_pause();
    } else {
      sched_yield();  // a worker lost its core to another process
    }
  }
}

}  // namespace precast

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

// Parts that a job is cut into for each thread: few enough that weights are read in long runs, enough
// that threads that started late or were interrupted leave the rest to the others.
constexpr int kPartsPerThread = 4;

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

// The gate holds an epoch, the number of workers inside, and whether the job may be entered. A worker
// enters by compare-and-swap, so it can't enter a job that was closed, or another one, in between.
struct ThreadPool::State {
  static constexpr uint64_t kOpen = 1, kOne = 2, kInside = 0xfffe, kEpoch = 1 << 16;
  alignas(64) std::atomic<uint64_t> gate{0};
  alignas(64) std::atomic<uint32_t> job{0};  // counts jobs; what sleeping workers wait on
  alignas(64) std::atomic<int> sleepers{0};
  alignas(64) std::atomic<int> next{0};  // next part to be taken
  int parts = 0;
  void (*fn)(void*, int, int) = nullptr;
  void* context = nullptr;
  std::atomic<bool> stopping{false};
  std::vector<std::thread> workers;

  void take_parts() {
    for (int part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;) {
      fn(context, part, parts);
    }
  }
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
    state_->workers.emplace_back(&ThreadPool::work, this, cores[i]);
  }
}

void ThreadPool::stop() {
  if (state_ == nullptr) return;
  state_->stopping.store(true);
  state_->job.fetch_add(1);
  futex_wake_all(state_->job);
  for (auto& worker : state_->workers) worker.join();
  delete state_;
  state_ = nullptr;
  size_ = 1;
}

void ThreadPool::work(int64_t core) {
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
    if (s.stopping.load()) return;
    uint64_t gate = s.gate.load(std::memory_order_acquire);
    bool inside = false;
    while ((gate & State::kOpen) != 0 && !inside) {
      inside = s.gate.compare_exchange_weak(gate, gate + State::kOne, std::memory_order_acq_rel,
                                            std::memory_order_acquire);
    }
    if (!inside) continue;  // too late: the others have done it all
    s.take_parts();
    s.gate.fetch_sub(State::kOne, std::memory_order_release);
  }
}

void ThreadPool::run(void (*fn)(void*, int, int), void* context) {
  if (size_ == 1) {
    fn(context, 0, 1);
    return;
  }
  State& s = *state_;
  // The gate is closed and nobody is inside, so nobody reads these.
  s.fn = fn;
  s.context = context;
  s.parts = size_ * kPartsPerThread;
  s.next.store(0, std::memory_order_relaxed);
  const uint64_t epoch = (s.gate.load(std::memory_order_relaxed) & ~(State::kEpoch - 1));
  s.gate.store(epoch + State::kEpoch + State::kOpen, std::memory_order_release);
  s.job.fetch_add(1);
  if (s.sleepers.load() > 0) futex_wake_all(s.job);
  s.take_parts();
  s.gate.fetch_and(~State::kOpen, std::memory_order_acq_rel);
  int spins = 0;
  while ((s.gate.load(std::memory_order_acquire) & State::kInside) != 0) {
    if (++spins < kSpins) {
      _mm_pause();
    } else {
      sched_yield();  // a worker lost its core within a part
    }
  }
}

}  // namespace precast

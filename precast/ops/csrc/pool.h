// The compute threads of a rank process: one pool, pinned, shared by every operator.
//
// Why not OpenMP: graphs replay hundreds of small operators a step, and torch's own pool (libgomp)
// spins against ours when both are used. Here a fork/join costs about a microsecond while the
// workers spin; they sleep on a futex when no step has come for a while.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace precast {

class ThreadPool {
 public:
  static ThreadPool& instance();

  // Starts `cores.size() - 1` workers and pins the calling thread to cores[0], worker i to cores[i].
  // Core ids below zero leave a thread unpinned. Replaces a pool that was started before.
  void start(const std::vector<int64_t>& cores);
  int size() const { return size_; }

  // Calls fn(thread, threads) once on each thread and returns when all are done. Not re-entrant:
  // one caller at a time, and fn must not call run.
  void run(void (*fn)(void*, int, int), void* context);

  template <typename F>
  void run(F&& body) {
    run([](void* context, int thread, int threads) { (*static_cast<F*>(context))(thread, threads); },
        &body);
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

 private:
  ThreadPool() = default;
  void stop();
  void work(int thread, int core);

  struct State;
  State* state_ = nullptr;
  int size_ = 1;
};

struct Range {
  int64_t begin, end;
};

// The share of `thread` when `count` items are dealt out in contiguous, nearly equal runs.
inline Range share(int64_t count, int thread, int threads) {
  const int64_t base = count / threads, rest = count % threads;
  const int64_t begin = base * thread + (thread < rest ? thread : rest);
  return {begin, begin + base + (thread < rest ? 1 : 0)};
}

}  // namespace precast

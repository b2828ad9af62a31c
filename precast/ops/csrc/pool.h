// The compute threads of a rank process: one pool, pinned, shared by every operator.
//
// Why not OpenMP: graphs replay hundreds of small operators a step, and torch's own pool (libgomp)
// spins against ours when both are used. Here a fork/join costs about a microsecond while the
// workers spin; they sleep on a futex when no step has come for a while.
#pragma once

#include <cstdint>
#include <functional>
#include <unordered_map>
#include <vector>

#include "kernels.h"
#include "prefetch.h"

namespace precast {

// Learns in which order weights are read: a model's steps are all alike, but for experts, behind which
// it is often wrong.
class ReadOrder {
 public:
  // Notes that `now` is read, and returns what was read after it the last time, or nothing.
  Stretch follow(Stretch now);

 private:
  std::unordered_map<const void*, Stretch> after_;
  const void* previous_ = nullptr;
};

class ThreadPool {
 public:
  static ThreadPool& instance();

  // Starts `cores.size() - 1` workers and pins the calling thread to cores[0], worker i to cores[i].
  // Core ids below zero leave a thread unpinned. Replaces a pool that was started before.
  void start(const std::vector<int64_t>& cores);
  int size() const { return size_; }

  // Calls fn(context, part, parts) for every part in [0, parts) and returns when all have run. Each
  // thread begins with a run of parts of its own and then helps others (pool_board.h): one that has
  // lost its core to another process holds up at most the part it is in, and if it has none, nothing.
  // Not re-entrant: one caller at a time, and fn must not call run.
  void run(void (*fn)(void*, int, int), void* context);

  template <typename F>
  void run(F&& body) {
    run([](void* context, int part, int parts) { (*static_cast<F*>(context))(part, parts); },
        &body);
  }

  // What the next job reads, dealt out to its parts as share() does. The pool learns what is read after
  // it: threads fetch their shares of that into their caches while they have nothing to do.
  void will_read(Stretch now);

  // For a caller that waits for something else than a job: fetches a little of its share.
  void fetch_ahead();

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

 private:
  ThreadPool() = default;
  void stop();
  void work(int self, int64_t core);
  uint32_t publish(void (*fn)(void*, int, int), void* context);

  struct State;
  State* state_ = nullptr;
  int size_ = 1;
  ReadOrder order_;
  Prefetch ahead_;  // the caller's share
};

struct Range {
  int64_t begin, end;
};

// What `part` gets when `count` items are dealt out in contiguous, nearly equal runs. So are any number
// of neighbouring parts, those of a thread among them: 36 panels in 8 parts of 2 threads are 18 each.
inline Range share(int64_t count, int part, int parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

}  // namespace precast

// What a job costs the threads of a pool, without threads: they take turns in one, each with its own
// view of the shared lines, so that every run counts the same.
//
//     pool_cost lines|plain THREADS REACH JOBS
//
// lines: prints how many cache lines moved between cores, over all jobs: a line moves when a thread
// reads one that another has written since, or writes one that is not its alone. plain: the pool's own
// atomics, for a count of instructions.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "pool_board.h"

namespace {

int running = 0;  // the thread whose turn it is
int64_t moved = 0;
std::unordered_map<uintptr_t, std::set<int>> holders;  // threads that have a line's present contents

template <typename T>
class Counted {
 public:
  Counted(T value) : value_(value) {}

  T load(std::memory_order = std::memory_order_seq_cst) const {
    moved += holders[line()].insert(running).second;
    return value_;
  }
  void store(T value, std::memory_order = std::memory_order_seq_cst) {
    own();
    value_ = value;
  }
  T fetch_add(T by, std::memory_order = std::memory_order_seq_cst) {
    own();
    return std::exchange(value_, value_ + by);
  }
  bool compare_exchange_weak(T& expected, T desired, std::memory_order, std::memory_order) {
    own();
    if (value_ != expected) {
      expected = value_;
      return false;
    }
    value_ = desired;
    return true;
  }

 private:
  uintptr_t line() const { return reinterpret_cast<uintptr_t>(this) / 64; }
  void own() {
    std::set<int>& now = holders[line()];
    moved += !(now.size() == 1 && now.contains(running));
    now = {running};
  }
  T value_;
};

// A job in which each thread, by turns, takes one part and runs it; all start at once.
template <typename Board>
void run_job(Board& board, int reach) {
  running = 0;
  const uint32_t job = board.post([](void*, int, int) {}, nullptr);
  std::vector<typename Board::Turn> turns;
  for (int thread = 0; thread < board.threads(); ++thread) {
    running = thread;
    turns.push_back({thread, board.number(), reach});
  }
  std::vector<int> done(board.threads());
  std::vector<bool> through(board.threads());
  for (int left = board.threads(); left > 0;) {
    for (running = 0; running < board.threads(); ++running) {
      if (through[running]) continue;
      if (board.take(turns[running]) >= 0) {
        ++done[running];
      } else {
        through[running] = true;
        --left;
        if (running > 0) board.report(running, done[running]);
      }
    }
  }
  running = 0;
  board.reported();
  if (job != board.number()) std::abort();
}

template <template <typename> typename Atomic>
void run(int threads, int reach, int jobs) {
  precast::Board<Atomic> board(threads);
  for (int job = 0; job < jobs; ++job) run_job(board, reach);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 5) return 2;
  const int threads = std::atoi(arguments[2]), reach = std::atoi(arguments[3]);
  const int jobs = std::atoi(arguments[4]);
  if (std::strcmp(arguments[1], "lines") == 0) {
    run<Counted>(threads, reach, jobs);
  } else {
    run<std::atomic>(threads, reach, jobs);
  }
  std::printf("%lld\n", static_cast<long long>(moved));
}

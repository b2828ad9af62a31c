#include "comm.h"

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "comm_segment.h"
#include "kernels.h"
#include "pool.h"

namespace precast {
namespace {

constexpr int64_t kSlotBytes = 1 << 20;  // two slots a rank; longer messages go in pieces
constexpr int64_t kSlotFloats = kSlotBytes / sizeof(float);
constexpr int64_t kParallelFloats = 32768;  // from here on two fork/joins pay
constexpr int64_t kSmallBytes = 48;
constexpr int kMaxRanks = 64;
constexpr int kSpins = 2000;  // 50 us, more while weights are fetched; then the core is offered to others
constexpr int kYieldsPerLook = 32;
constexpr double kCheckEvery_s = 0.02;

enum Kind : uint64_t { kReduce = 1, kGather, kBroadcast };
constexpr const char* kKindNames[] = {"nothing", "all_reduce", "all_gather", "broadcast"};

uint64_t tag(Kind kind, int64_t bytes) { return kind << 56 | static_cast<uint64_t>(bytes); }

std::string named(uint64_t what) {
  return std::string(kKindNames[std::min<uint64_t>(what >> 56, 3)]) + " of " +
         std::to_string(what & ((1ull << 56) - 1)) + " bytes";
}

}  // namespace

// One cache line: the flag that peers poll, and small payloads, which so come in one transfer.
struct alignas(64) Communicator::Mailbox {
  std::atomic<uint64_t> sequence;  // of the newest collective whose data are in place
  uint64_t what;
  char small[kSmallBytes];
};

struct Communicator::RankState {
  Mailbox mailboxes[2];  // by the parity of the sequence number, as slots
  alignas(64) std::atomic<int32_t> size;  // of the group, as this rank knows it; 0 until it joined
  std::atomic<int32_t> pid;
  std::atomic<uint64_t> started;  // tells the process from a later one of the same pid
};

static int64_t header_bytes(int size, int64_t state_bytes) {
  return (size * state_bytes + 4095) / 4096 * 4096;
}

Communicator::RankState& Communicator::state(int rank) const {
  return reinterpret_cast<RankState*>(memory_)[rank];
}

Communicator::Mailbox& Communicator::mailbox(int rank) const {
  return state(rank).mailboxes[sequence_ % 2];
}

bool Communicator::arrived(int peer) const {
  return mailbox(peer).sequence.load(std::memory_order_acquire) >= sequence_;
}

char* Communicator::place(int rank, int64_t bytes) const {
  if (bytes <= kSmallBytes) return mailbox(rank).small;
  return memory_ + header_bytes(size_, sizeof(RankState)) + (rank * 2 + sequence_ % 2) * kSlotBytes;
}

Communicator::Communicator(const std::string& name, int rank, int size, double timeout_s)
    : rank_(rank), size_(size), timeout_s_(timeout_s) {
  if (size < 1 || size > kMaxRanks || rank < 0 || rank >= size) {
    throw std::runtime_error("rank " + std::to_string(rank) + " of " + std::to_string(size) +
                             ": a group has 1 to " + std::to_string(kMaxRanks) + " ranks");
  }
  total_bytes_ = header_bytes(size, sizeof(RankState)) + size * 2 * kSlotBytes;
  const Deadline deadline(timeout_s);
  memory_ = rank == 0 ? create_segment(name, total_bytes_)
                      : open_segment(name, total_bytes_, deadline);
  try {
    claim_rank(name);
    await_peers(name, deadline);
  } catch (...) {
    unmap_segment(memory_, total_bytes_);
    if (rank == 0) remove_segment(name);
    throw;
  }
  if (rank == 0) remove_segment(name);
}

Communicator::~Communicator() { unmap_segment(memory_, total_bytes_); }

void Communicator::claim_rank(const std::string& name) {
  const Process self = this_process();
  int32_t nobody = 0;
  if (!state(rank_).pid.compare_exchange_strong(nobody, self.pid)) {
    throw std::runtime_error("rank " + std::to_string(rank_) + " of group " + name +
                             " is taken by process " + std::to_string(nobody));
  }
  state(rank_).started.store(self.started);
  state(rank_).size.store(size_, std::memory_order_release);
}

void Communicator::await_peers(const std::string& name, const Deadline& deadline) {
  for (int peer = 0; peer < size_; ++peer) {
    const std::string who = "rank " + std::to_string(peer);
    int theirs;
    while ((theirs = state(peer).size.load(std::memory_order_acquire)) == 0) {
      if (deadline.passed()) throw std::runtime_error(who + " did not join group " + name);
      sleep_ms(1);
    }
    if (theirs != size_) {
      throw std::runtime_error(who + " joined group " + name + " as one of " +
                               std::to_string(theirs) + " ranks, not " + std::to_string(size_));
    }
  }
}

// A slot or mailbox of this parity was last read two collectives ago. A peer that publishes s - 1 has
// finished reading s - 2, and every rank waits for all of s - 1 before it begins s: so two of each are
// enough and no second barrier is needed.
void Communicator::begin(uint64_t what) {
  ++sequence_;
  mailbox(rank_).what = what;
}

void Communicator::publish_and_await() {
  // Release and acquire: plain stores and loads on x86, in program order with the data.
  mailbox(rank_).sequence.store(sequence_, std::memory_order_release);
  for (int peer = 0; peer < size_; ++peer) {
    if (peer != rank_) await(peer);
  }
}

void Communicator::await(int peer) {
  for (int spins = 0; !arrived(peer); ++spins) {
    if (spins < kSpins) {
      ThreadPool::instance().fetch_ahead();
      _mm_pause();
    } else {
      await_slowly(peer);
    }
  }
  const uint64_t theirs = mailbox(peer).what, ours = mailbox(rank_).what;
  if (theirs != ours) {
    throw std::runtime_error("ranks are out of step: " + named(ours) + " here, " + named(theirs) +
                             " on rank " + std::to_string(peer));
  }
}

// By the clock, because on a busy core one yield may take milliseconds.
void Communicator::await_slowly(int peer) {
  const Deadline deadline(timeout_s_);
  Deadline next_check(kCheckEvery_s);
  for (int yields = 1; !arrived(peer); ++yields) {
    sched_yield();
    if (yields % kYieldsPerLook != 0 || !next_check.passed()) continue;
    check_alive(peer);
    if (deadline.passed()) {
      throw std::runtime_error("rank " + std::to_string(peer) + " did not reach the collective");
    }
    next_check = Deadline(kCheckEvery_s);
  }
}

void Communicator::check_alive(int peer) const {
  const RankState& other = state(peer);
  if (!is_alive(Process{other.pid.load(), other.started.load()})) {
    throw std::runtime_error("rank " + std::to_string(peer) + " died during a collective");
  }
}

void Communicator::all_reduce(const float* x, float* out, int64_t count) {
  for (int64_t first = 0; first < count; first += kSlotFloats) {
    const int64_t n = std::min(kSlotFloats, count - first);
    begin(tag(kReduce, n * sizeof(float)));
    if (n >= kParallelFloats && ThreadPool::instance().size() > 1) {
      reduce_in_parallel(x + first, out + first, n);
    } else {
      reduce_alone(x + first, out + first, n);
    }
  }
}

// Sums floats [begin, end) of all ranks; this rank's own are read where they came from.
void Communicator::sum(const float* x, float* out, int64_t count, Range part) {
  const float* sources[kMaxRanks];
  for (int rank = 0; rank < size_; ++rank) {
    const char* from = place(rank, count * sizeof(float));
    sources[rank] = (rank == rank_ ? x : reinterpret_cast<const float*>(from)) + part.begin;
  }
  kernels().sum(sources, size_, out + part.begin, part.end - part.begin);
}

// One thread's way. Copying in pieces, prefetching either side, and a flag in every line all took as
// long: what costs is the lines' way between the cores.
void Communicator::reduce_alone(const float* x, float* out, int64_t count) {
  std::memcpy(place(rank_, count * sizeof(float)), x, count * sizeof(float));
  publish_and_await();
  sum(x, out, count, {0, count});
}

void Communicator::reduce_in_parallel(const float* x, float* out, int64_t count) {
  ThreadPool& pool = ThreadPool::instance();
  float* mine = reinterpret_cast<float*>(place(rank_, count * sizeof(float)));
  pool.run([&](int part, int parts) {
    const Range r = share(count, part, parts);
    std::memcpy(mine + r.begin, x + r.begin, (r.end - r.begin) * sizeof(float));
  });
  publish_and_await();
  pool.run([&](int part, int parts) { sum(x, out, count, share(count, part, parts)); });
}

namespace {

// Puts floats [first, first + n) of a rank's [rows, width] block in their place in the whole matrix.
void scatter(const float* from, float* out, int64_t first, int64_t n, int64_t width,
             int64_t total_width) {
  for (int64_t at = first; at < first + n;) {
    const int64_t row = at / width, column = at % width;
    const int64_t run = std::min(width - column, first + n - at);
    std::memcpy(out + row * total_width + column, from + (at - first), run * sizeof(float));
    at += run;
  }
}

}  // namespace

void Communicator::all_gather(const float* x, float* out, int64_t rows, const int64_t* widths) {
  int64_t total = 0, widest = 0;
  for (int rank = 0; rank < size_; ++rank) {
    total += widths[rank];
    widest = std::max(widest, widths[rank]);
  }
  for (int64_t first = 0; first < rows * widest; first += kSlotFloats) {
    const auto floats = [&](int rank) {
      return std::clamp<int64_t>(rows * widths[rank] - first, 0, kSlotFloats);
    };
    begin(tag(kGather, rows * total * sizeof(float)));
    // In a slot even if small: the ranks' sizes differ, the place must not.
    std::memcpy(place(rank_, kSlotBytes), x + first, floats(rank_) * sizeof(float));
    publish_and_await();
    int64_t column = 0;
    for (int rank = 0; rank < size_; ++rank) {
      const float* from = reinterpret_cast<const float*>(place(rank, kSlotBytes));
      scatter(from, out + column, first, floats(rank), widths[rank], total);
      column += widths[rank];
    }
  }
}

void Communicator::broadcast(void* data, int64_t bytes, int root) {
  for (int64_t first = 0; first < bytes; first += kSlotBytes) {
    const int64_t n = std::min(kSlotBytes, bytes - first);
    char* mine = static_cast<char*>(data) + first;
    begin(tag(kBroadcast, n));
    if (rank_ == root) std::memcpy(place(root, n), mine, n);
    publish_and_await();
    if (rank_ != root) std::memcpy(mine, place(root, n), n);
  }
}

namespace {
std::unique_ptr<Communicator>& current() {
  static auto* group = new std::unique_ptr<Communicator>();
  return *group;
}
}  // namespace

Communicator* communicator() { return current().get(); }

void join_group(const std::string& name, int rank, int size, double timeout_s) {
  current() = std::make_unique<Communicator>(name, rank, size, timeout_s);
}

}  // namespace precast

#include "comm.h"

#include <fcntl.h>
#include <immintrin.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>

#include "kernels.h"
#include "pool.h"

namespace precast {
namespace {

constexpr int64_t kSlotBytes = 1 << 20;  // two slots a rank; longer messages go in pieces
constexpr uint64_t kMagic = 0x3154534143455250;  // "PRECAST1"
constexpr int kSpinsBeforeYield = 2000;  // about 50 us
constexpr int64_t kParallelFloats = 16384;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::runtime_error failure(const std::string& what, const std::string& name, int error) {
  return std::runtime_error(what + " /dev/shm/" + name + ": " + std::strerror(error));
}

}  // namespace

struct Communicator::RankState {
  alignas(64) std::atomic<uint64_t> magic;
  std::atomic<int64_t> pid;
  // Newest collective whose input is in this rank's slot, and its size, by which ranks that have
  // fallen out of step are noticed.
  alignas(64) std::atomic<uint64_t> sequence;
  std::atomic<int64_t> bytes[2];
};

Communicator::RankState& Communicator::state(int rank) const {
  return reinterpret_cast<RankState*>(memory_)[rank];
}

float* Communicator::slot(int rank, uint64_t sequence) const {
  const int64_t header = (size_ * sizeof(RankState) + 4095) / 4096 * 4096;
  return reinterpret_cast<float*>(memory_ + header + (rank * 2 + sequence % 2) * kSlotBytes);
}

Communicator::Communicator(const std::string& name, int rank, int size, double timeout_s)
    : rank_(rank), size_(size), timeout_s_(timeout_s) {
  const std::string path = "/" + name;
  total_bytes_ = (size * sizeof(RankState) + 4095) / 4096 * 4096 + size * 2 * kSlotBytes;
  const auto start = Clock::now();
  int fd = -1;
  if (rank == 0) {
    fd = shm_open(path.c_str(), O_CREAT | O_EXCL | O_RDWR, 0600);
    if (fd < 0) throw failure("can't create", name, errno);
    // fallocate, not ftruncate: a full /dev/shm is an error here instead of a SIGBUS later.
    if (const int error = posix_fallocate(fd, 0, total_bytes_); error != 0) {
      shm_unlink(path.c_str());
      close(fd);
      throw failure("/dev/shm is too small: need " + std::to_string(total_bytes_) + " bytes for",
                    name, error);
    }
  } else {
    while ((fd = shm_open(path.c_str(), O_RDWR, 0600)) < 0 ||
           lseek(fd, 0, SEEK_END) < total_bytes_) {
      if (fd >= 0) close(fd);
      if (seconds_since(start) > timeout_s) throw failure("rank 0 never made", name, ETIMEDOUT);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  void* memory = mmap(nullptr, total_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (memory == MAP_FAILED) throw failure("can't map", name, errno);
  memory_ = static_cast<char*>(memory);
  state(rank).pid.store(getpid());
  state(rank).magic.store(kMagic, std::memory_order_release);
  for (int peer = 0; peer < size; ++peer) {
    while (state(peer).magic.load(std::memory_order_acquire) != kMagic) {
      if (seconds_since(start) > timeout_s) {
        if (rank == 0) shm_unlink(path.c_str());
        throw std::runtime_error("rank " + std::to_string(peer) + " did not join group " + name);
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  if (rank == 0) shm_unlink(path.c_str());
}

Communicator::~Communicator() {
  if (memory_ != nullptr) munmap(memory_, total_bytes_);
}

// A dead process that its parent has not collected yet still takes signals, so its state decides.
void Communicator::check_peer(int peer) const {
  const std::string path = "/proc/" + std::to_string(state(peer).pid.load()) + "/stat";
  char text[512] = {};
  if (const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC); fd >= 0) {
    const ssize_t size = read(fd, text, sizeof(text) - 1);
    close(fd);
    // "pid (name) state ...", and a name may hold anything, so the last parenthesis counts.
    const char* name_end = size > 0 ? std::strrchr(text, ')') : nullptr;
    if (name_end != nullptr && name_end[1] == ' ' && name_end[2] != 'Z' && name_end[2] != 'X') return;
  }
  throw std::runtime_error("rank " + std::to_string(peer) + " died during a collective");
}

void Communicator::wait_for(int peer, uint64_t sequence, int64_t bytes) {
  RankState& other = state(peer);
  int spins = 0;
  Clock::time_point start;
  while (other.sequence.load(std::memory_order_acquire) < sequence) {
    ++spins;
    if (spins < kSpinsBeforeYield) {
      _mm_pause();
      continue;
    }
    if (spins == kSpinsBeforeYield) start = Clock::now();
    sched_yield();
    if (spins % 1024 == 0) {
      check_peer(peer);
      if (seconds_since(start) > timeout_s_) {
        throw std::runtime_error("rank " + std::to_string(peer) + " did not reach the collective");
      }
    }
  }
  if (const int64_t theirs = other.bytes[sequence % 2].load(std::memory_order_relaxed);
      theirs >= 0 && bytes >= 0 && theirs != bytes) {
    throw std::runtime_error("ranks disagree on a collective's size: " + std::to_string(bytes) +
                             " and " + std::to_string(theirs) + " bytes");
  }
}

// A slot of this parity was last read two steps ago. A peer that publishes step s - 1 has finished
// reading step s - 2, and every rank waits for all of step s - 1 before it writes step s: so two
// slots are enough and no second barrier is needed.
void Communicator::publish_and_wait(int64_t bytes) {
  const uint64_t sequence = ++sequence_;
  RankState& mine = state(rank_);
  mine.bytes[sequence % 2].store(bytes, std::memory_order_relaxed);
  mine.sequence.store(sequence, std::memory_order_release);
  for (int peer = 0; peer < size_; ++peer) {
    if (peer != rank_) wait_for(peer, sequence, bytes);
  }
}

void Communicator::all_reduce(const float* x, float* out, int64_t count) {
  constexpr int64_t piece = kSlotBytes / sizeof(float);
  std::vector<const float*> slots(size_);
  for (int64_t first = 0; first < count; first += piece) {
    const int64_t n = std::min(piece, count - first);
    std::memcpy(slot(rank_, begin()), x + first, n * sizeof(float));
    publish_and_wait(n * sizeof(float));
    for (int peer = 0; peer < size_; ++peer) slots[peer] = slot(peer, sequence_);
    if (n < kParallelFloats) {
      kernels().sum(slots.data(), size_, out + first, n);
      continue;
    }
    ThreadPool::instance().run([&](int part, int parts) {
      const Range r = share(n, part, parts);
      std::vector<const float*> sources(size_);
      for (int peer = 0; peer < size_; ++peer) sources[peer] = slots[peer] + r.begin;
      kernels().sum(sources.data(), size_, out + first + r.begin, r.end - r.begin);
    });
  }
}

void Communicator::all_gather(const float* x, float* out, int64_t rows,
                              const std::vector<int64_t>& widths) {
  int64_t total = 0, widest = 1;
  for (const int64_t w : widths) {
    total += w;
    widest = std::max(widest, w);
  }
  const int64_t slot_floats = kSlotBytes / sizeof(float);
  if (widest > slot_floats) throw std::runtime_error("all_gather: a row exceeds the slot");
  const int64_t rows_a_piece = slot_floats / widest;
  for (int64_t first = 0; first < rows; first += rows_a_piece) {
    const int64_t n = std::min(rows_a_piece, rows - first);
    std::memcpy(slot(rank_, begin()), x + first * widths[rank_],
                n * widths[rank_] * sizeof(float));
    publish_and_wait(-1);  // sizes differ between ranks
    int64_t column = 0;
    for (int peer = 0; peer < size_; ++peer) {
      const float* source = slot(peer, sequence_);
      for (int64_t r = 0; r < n; ++r) {
        std::memcpy(out + (first + r) * total + column, source + r * widths[peer],
                    widths[peer] * sizeof(float));
      }
      column += widths[peer];
    }
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

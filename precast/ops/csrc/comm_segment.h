// What a group of ranks needs of the operating system: a segment, and to know who lives.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace precast {

class Deadline {
 public:
  explicit Deadline(double seconds)
      : end_(Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                std::chrono::duration<double>(seconds))) {}
  bool passed() const { return Clock::now() > end_; }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point end_;
};

void sleep_ms(int milliseconds);

// Maps a new, zeroed segment whose memory is reserved; throws std::runtime_error if the name exists
// or /dev/shm has no room.
char* create_segment(const std::string& name, int64_t bytes);
// Maps the segment once its maker has made it; throws std::runtime_error at the deadline.
char* open_segment(const std::string& name, int64_t bytes, const Deadline& deadline);
void unmap_segment(char* memory, int64_t bytes);
void remove_segment(const std::string& name);

struct Process {
  int32_t pid;
  uint64_t started;  // clock ticks after boot
};

Process this_process();
// False for a process that is gone, that waits to be collected, or whose pid is another's now.
bool is_alive(const Process& process);

}  // namespace precast

#include "comm_segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>

namespace precast {
namespace {

std::string path_of(const std::string& name) { return "/" + name; }

std::runtime_error failure(const std::string& what, const std::string& name, int error) {
  return std::runtime_error(what + " /dev/shm/" + name + ": " + std::strerror(error));
}

char* map(int fd, const std::string& name, int64_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  const int error = errno;
  close(fd);
  if (memory == MAP_FAILED) throw failure("can't map", name, error);
  return static_cast<char*>(memory);
}

struct Stat {
  char state = 'X';  // as if dead, where there is nothing to read
  uint64_t started = 0;
};

Stat stat_of(int32_t pid) {
  const std::string path = "/proc/" + std::to_string(pid) + "/stat";
  char text[1024] = {};
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return {};
  const ssize_t size = read(fd, text, sizeof(text) - 1);
  close(fd);
  // "pid (name) state ...", and a name may hold anything, so the last parenthesis counts.
  const char* at = size > 0 ? std::strrchr(text, ')') : nullptr;
  if (at == nullptr || at[1] != ' ') return {};
  Stat stat{at[2], 0};
  at += 2;  // field 3; the start time is field 22
  for (int field = 3; field < 22 && at != nullptr; ++field) {
    at = std::strchr(at, ' ');
    if (at != nullptr) ++at;
  }
  if (at != nullptr) stat.started = std::strtoull(at, nullptr, 10);
  return stat;
}

}  // namespace

void sleep_ms(int milliseconds) {
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
}

char* create_segment(const std::string& name, int64_t bytes) {
  const int fd = shm_open(path_of(name).c_str(), O_CREAT | O_EXCL | O_RDWR, 0600);
  if (fd < 0) throw failure("can't create", name, errno);
  // fallocate, not ftruncate: a full /dev/shm is an error here instead of a SIGBUS later.
  if (const int error = posix_fallocate(fd, 0, bytes); error != 0) {
    remove_segment(name);
    close(fd);
    throw failure("/dev/shm is too small: need " + std::to_string(bytes) + " bytes for", name,
                  error);
  }
  return map(fd, name, bytes);
}

char* open_segment(const std::string& name, int64_t bytes, const Deadline& deadline) {
  while (true) {
    const int fd = shm_open(path_of(name).c_str(), O_RDWR, 0600);
    if (fd >= 0 && lseek(fd, 0, SEEK_END) >= bytes) return map(fd, name, bytes);
    if (fd >= 0) close(fd);
    if (deadline.passed()) throw failure("rank 0 never made", name, ETIMEDOUT);
    sleep_ms(1);
  }
}

void unmap_segment(char* memory, int64_t bytes) { munmap(memory, bytes); }

void remove_segment(const std::string& name) { shm_unlink(path_of(name).c_str()); }

Process this_process() {
  const int32_t pid = getpid();
  return {pid, stat_of(pid).started};
}

// A dead process that its parent has not collected yet still takes signals, so its state decides.
bool is_alive(const Process& process) {
  const Stat stat = stat_of(process.pid);
  return stat.state != 'Z' && stat.state != 'X' && stat.started == process.started;
}

}  // namespace precast

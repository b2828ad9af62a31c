// Collectives among the rank processes of one host, through a shared-memory segment.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace precast {

class Communicator {
 public:
  // Joins the group `name` (a file in /dev/shm): rank 0 makes the segment, the others wait for it.
  // Once every rank is in, the name is unlinked, so nothing is left behind however a rank ends.
  // Throws std::runtime_error when /dev/shm is too small or a peer does not come within the timeout.
  Communicator(const std::string& name, int rank, int size, double timeout_s);
  ~Communicator();

  int rank() const { return rank_; }
  int size() const { return size_; }

  // out[i] = sum over ranks of x[i], added in rank order, so every rank has the same bits.
  void all_reduce(const float* x, float* out, int64_t count);
  // Ranks hold columns of a [rows, sum(widths)] matrix; every rank gets the whole.
  void all_gather(const float* x, float* out, int64_t rows, const std::vector<int64_t>& widths);

  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

 private:
  struct RankState;
  float* slot(int rank, uint64_t sequence) const;
  RankState& state(int rank) const;
  // Publishes this rank's slot and waits until every rank has published the same step.
  uint64_t begin() const { return sequence_ + 1; }
  void publish_and_wait(int64_t bytes);
  void wait_for(int peer, uint64_t sequence, int64_t bytes);
  void check_peer(int peer) const;

  int rank_, size_;
  double timeout_s_;
  uint64_t sequence_ = 0;
  char* memory_ = nullptr;
  int64_t total_bytes_ = 0;
};

// The group of this process; null until one was joined.
Communicator* communicator();
void join_group(const std::string& name, int rank, int size, double timeout_s);

}  // namespace precast

// Collectives among the rank processes of one host, through a shared-memory segment.
#pragma once

#include <cstdint>
#include <string>

#include "comm_segment.h"
#include "pool.h"

namespace precast {

class Communicator {
 public:
  // Joins the group `name` (a file in /dev/shm): rank 0 makes the segment, the others wait for it.
  // Once every rank is in, the name is unlinked, so nothing is left behind however a rank ends.
  // Throws std::runtime_error when /dev/shm is too small, the rank is taken, ranks disagree on the
  // group's size, or a peer does not come within the timeout.
  Communicator(const std::string& name, int rank, int size, double timeout_s);
  ~Communicator();

  int rank() const { return rank_; }
  int size() const { return size_; }

  // Every rank calls the same collectives in the same order, of any kind and size. All throw
  // std::runtime_error when a peer has died (noticed within a fraction of a second), does not come
  // within the timeout, or is in another collective.

  // out[i] = sum over ranks of x[i], added in rank order, so every rank has the same bits.
  void all_reduce(const float* x, float* out, int64_t count);
  // Ranks hold columns of a [rows, sum of widths] matrix; every rank gets the whole. `widths` has
  // one entry for each rank.
  void all_gather(const float* x, float* out, int64_t rows, const int64_t* widths);
  // Every rank gets the root's bytes; on the root, `data` is only read.
  void broadcast(void* data, int64_t bytes, int root);

  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

 private:
  struct Mailbox;
  struct RankState;
  RankState& state(int rank) const;
  Mailbox& mailbox(int rank) const;
  // Where `rank` puts this collective's `bytes`: beside its flag if they are few.
  char* place(int rank, int64_t bytes) const;

  void claim_rank(const std::string& name);
  void await_peers(const std::string& name, const Deadline& deadline);

  // Starts the next collective. `what` is its kind and size, by which ranks that have fallen out of
  // step are noticed.
  void begin(uint64_t what);
  // Says that this rank's data are in place, and waits until every peer's are.
  void publish_and_await();
  void await(int peer);
  void await_slowly(int peer);
  bool arrived(int peer) const;
  void check_alive(int peer) const;

  void reduce_alone(const float* x, float* out, int64_t count);
  void reduce_in_parallel(const float* x, float* out, int64_t count);
  void sum(const float* x, float* out, int64_t count, Range part);

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

// Where coded chunks go, and what a thread keeps of those whose place is not known yet. Free of torch.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "rans_encoder.h"

namespace gaugekit::rans {

// Where chunks begin: known of a chunk once all before it are coded.
class Places {
 public:
  Places(uint64_t first, uint64_t chunks) : begins_(chunks + 1) { begins_[0] = first; }

  // Chunk i takes `length` > 0 bytes.
  void add(uint64_t i, uint64_t length) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (begins_[i + 1] = length; known_ + 1 < begins_.size() && begins_[known_ + 1]; ++known_)
      begins_[known_ + 1] += begins_[known_];
    changed_.notify_all();
  }
  bool knows(uint64_t i) {
    std::lock_guard<std::mutex> lock(mutex_);
    return i <= known_;
  }
  // Waits until it is known.
  uint64_t of(uint64_t i) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return i <= known_; });
    return begins_[i];
  }
  // About where chunk i will begin: chunks are about as long as those before them.
  uint64_t guess(uint64_t i) {
    std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t length = known_ ? (begins_[known_] - begins_[0]) / known_ : 0;
    return i <= known_ ? begins_[i] : begins_[known_] + (i - known_) * length;
  }
  uint64_t end() const { return begins_.back(); }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<uint64_t> begins_;  // of chunks not yet known the length of the one before, or 0
  uint64_t known_ = 0;
};

// What one thread coded at its turns, one or two chunks at each, that have no place yet, the oldest first,
// and memory for the next turn. While another thread is held up with an early chunk, this one goes on with
// later ones.
class Kept {
 public:
  struct Turn {
    uint64_t index;
    std::unique_ptr<EncoderScratch[]> coded;
  };

  // One of `threads`, for turns of `together` chunks of up to `symbols` elements. std::bad_alloc where there
  // is no memory for one.
  Kept(uint64_t symbols, int width, uint64_t threads, uint64_t together)
      : symbols_(symbols),
        width_(width),
        together_(together),
        most_(std::max<uint64_t>(1, kMostBytes / (threads * together * symbols * width))) {
    free_.reserve(most_ + 1);
    free_.push_back(fresh());
  }

  bool empty() const { return turns_.empty(); }
  const Turn& oldest() const { return turns_.front(); }
  EncoderScratch* next() { return free_.back().get(); }

  // What is in next() is of turn i; then there is no next() before make_room() or drop_oldest().
  void keep(uint64_t i) {
    turns_.push_back({i, std::move(free_.back())});
    free_.pop_back();
  }
  // False where there is no memory for a next one before the oldest is dropped; no error, since others may
  // wait for this thread's chunks.
  bool make_room() {
    if (free_.empty() && turns_.size() <= most_) try {
        free_.push_back(fresh());
      } catch (const std::bad_alloc&) {
      }
    return !free_.empty();
  }
  void drop_oldest() {
    free_.push_back(std::move(turns_.front().coded));
    turns_.pop_front();
  }

 private:
  static constexpr uint64_t kMostBytes = uint64_t(16)
                                         << 20;  // of all threads' elements: of two, six milliseconds' work

  std::unique_ptr<EncoderScratch[]> fresh() const {
    std::unique_ptr<EncoderScratch[]> scratch(new EncoderScratch[together_]);
    for (uint64_t k = 0; k < together_; ++k) scratch[k].reserve(symbols_, width_);
    return scratch;
  }

  uint64_t symbols_;
  int width_;
  uint64_t together_, most_;
  std::vector<std::unique_ptr<EncoderScratch[]>> free_;
  std::deque<Turn> turns_;
};

}  // namespace gaugekit::rans

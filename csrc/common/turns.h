// Threads of our own, which take the items of one piece of work in turns. Free of torch.
//
// Torch's own threads meet at the end of each piece of work, and spin until the last has come. Beside a busy
// process that costs a time slice of the scheduler each time, and in a forked child, where the others are
// missing, it never ends. Here a thread that has not come yet is not waited for, a thread that is held up
// delays the item it holds and no other, whoever waits sleeps, and a forked child gets threads of its own.
#pragma once

#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace gaugekit {

inline int64_t nanoseconds(clockid_t clock) {
  timespec t{};
  clock_gettime(clock, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

// One piece of work: items 0 to count - 1, each to one thread.
class Work {
 public:
  // One thread's turns.
  class Turns {
   public:
    Turns(Work& work, bool helper) : work_(work), helper_(helper), wall_(wall()), busy_(busy()) {}

    // The next item, numbers ascending; count where there is none, or none worth a helper's turn: were it
    // held up, the others would wait for longer than they need for the rest.
    int64_t operator()() {
      const int64_t wall_now = wall(), busy_now = busy();
      const double took = double(wall_now - wall_), waited = took - double(busy_now - busy_);
      took_ += took, waited_squared_ += waited * waited;
      wall_ = wall_now, busy_ = busy_now;
      if (helper_ && (work_.count_ - work_.next_) * work_.item_ns_ < work_.hold_up_ns_) return work_.count_;
      return std::min(work_.count_, work_.next_++);
    }

   private:
    friend class Helpers;
    static int64_t wall() { return nanoseconds(CLOCK_MONOTONIC); }
    static int64_t busy() { return nanoseconds(CLOCK_THREAD_CPUTIME_ID); }

    Work& work_;
    bool helper_;
    int64_t wall_, busy_;
    double took_ = 0, waited_squared_ = 0;  // of items, in nanoseconds
  };

  Work(int64_t count, double item_ns, std::function<void(Turns&)> body)
      : count_(count), item_ns_(item_ns), body_(std::move(body)) {}

 private:
  friend class Helpers;

  const int64_t count_;
  const double item_ns_;
  const std::function<void(Turns&)> body_;
  double hold_up_ns_ = 0;
  std::atomic<int64_t> next_{0};
  // Guarded by the mutex of Helpers: helpers still wanted, helpers at work, what the first of them threw.
  int64_t wanted_ = 0, inside_ = 0;
  std::exception_ptr error_;
};

// The process's helping threads, as many as any piece of work wanted; they sleep while there is none.
class Helpers {
 public:
  // Does the work on the calling thread and up to `helpers` others.
  void run(Work& work, int64_t helpers) {
    std::unique_lock<std::mutex> lock(mutex_);
    work.hold_up_ns_ = hold_up_ns();
    if (work.count_ * work.item_ns_ >= std::max(kWorthWaking, work.hold_up_ns_)) {
      work.wanted_ = hire(std::min(helpers, work.count_ - 1));
      if (work.wanted_) open_.push_back(&work);
    }
    const int64_t wanted = work.wanted_;
    lock.unlock();
    for (int64_t i = 0; i < wanted; ++i) called_.notify_one();
    join(work, lock, false);
    open_.erase(std::remove(open_.begin(), open_.end(), &work), open_.end());
    finished_.wait(lock, [&] { return work.inside_ == 0; });
    if (work.error_) std::rethrow_exception(work.error_);
  }

 private:
  // A sleeping thread needs some 50 microseconds to come.
  static constexpr double kWorthWaking = 200000, kHalfLife = 200000000;

  // The body; comes back with the mutex locked.
  void join(Work& work, std::unique_lock<std::mutex>& lock, bool helper) {
    Work::Turns turns(work, helper);
    std::exception_ptr error;
    try {
      work.body_(turns);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error && !work.error_) work.error_ = error;
    const double now = double(nanoseconds(CLOCK_MONOTONIC)), kept = std::exp2((noted_ - now) / kHalfLife);
    noted_ = now;
    took_ = kept * took_ + turns.took_;
    waited_squared_ = kept * waited_squared_ + turns.waited_squared_;
  }

  // How much work there must be for a helper not to be in the way: twice the time for which a thread with an
  // item, looked at when the others have none left, still waits for a processor. Waits of lengths w within a
  // time t give a mean of (sum of w^2) / 2t; those of the last few hundred milliseconds count.
  double hold_up_ns() const { return took_ > 0 ? waited_squared_ / took_ : 0; }

  // So many threads, or as many as the system lets us have.
  int64_t hire(int64_t helpers) {
    try {
      for (; hired_ < helpers; ++hired_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
    }
    return std::min(helpers, hired_);
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      called_.wait(lock, [this] { return !open_.empty(); });
      Work& work = *open_.back();
      if (--work.wanted_ == 0) open_.pop_back();
      ++work.inside_;
      lock.unlock();
      join(work, lock, true);
      if (--work.inside_ == 0) finished_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable called_, finished_;
  std::vector<Work*> open_;  // work that wants more helpers
  int64_t hired_ = 0;
  double noted_ = 0, took_ = 0, waited_squared_ = 0;  // in nanoseconds
};

// Never destroyed, since its threads are never joined. A forked child has none of them, and a mutex may be
// locked for ever: it begins anew, and leaves its parent's behind.
inline Helpers* helpers = [] {
  pthread_atfork(nullptr, nullptr, [] { helpers = new Helpers; });
  return new Helpers;
}();

// Calls body(next) on this thread and on up to threads - 1 others; next() gives the numbers below count in
// ascending order, each to one thread, and then count. An item takes about `item_ns` nanoseconds: helpers are
// called where that is worth it.
template <class Body>
void take_turns(int64_t count, int64_t threads, double item_ns, const Body& body) {
  if (count == 0) return;
  Work work(count, item_ns, [&body](Work::Turns& next) { body(next); });
  helpers->run(work, std::max<int64_t>(0, threads - 1));
}

// Calls body(begin, end) for ranges of `step` of the numbers below count; each takes about `step_ns`.
template <class Body>
void take_ranges(int64_t count, int64_t step, int64_t threads, double step_ns, const Body& body) {
  const int64_t ranges = (count + step - 1) / step;
  take_turns(ranges, threads, step_ns, [&](auto& next) {
    for (int64_t i; (i = next()) < ranges;) body(i * step, std::min(count, (i + 1) * step));
  });
}

}  // namespace gaugekit

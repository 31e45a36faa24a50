// Threads that compute one job together: they wait awake for a moment, since the next job or step often comes at once, and
// then asleep.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>

// std::atomic, without a header that takes longer to compile than all the rest.
template <typename T>
class Atomic {
 public:
  constexpr explicit Atomic(T value) : value_(value) {}
  T load() const { return __atomic_load_n(&value_, __ATOMIC_SEQ_CST); }
  T load_acquire() const { return __atomic_load_n(&value_, __ATOMIC_ACQUIRE); }
  void store(T value) { __atomic_store_n(&value_, value, __ATOMIC_SEQ_CST); }
  T exchange(T value) { return __atomic_exchange_n(&value_, value, __ATOMIC_SEQ_CST); }
  // Whether the value was *expected, which it is set to otherwise.
  bool compare_exchange(T* expected, T value) {
    return __atomic_compare_exchange_n(&value_, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  }
  T fetch_add(T more) { return __atomic_fetch_add(&value_, more, __ATOMIC_SEQ_CST); }

 private:
  T value_;
};

// Counts turns; threads wait until a turn is over.
class Signal {
 public:
  bool create() {
    if (pthread_mutex_init(&mutex_, nullptr) != 0) return false;
    if (pthread_cond_init(&ended_, nullptr) == 0) return true;
    pthread_mutex_destroy(&mutex_);
    return false;
  }

  void destroy() {
    pthread_cond_destroy(&ended_);
    pthread_mutex_destroy(&mutex_);
  }

  unsigned turn() const { return turn_.load_acquire(); }

  void next() {
    turn_.fetch_add(1);
    if (sleepers_.load() == 0) return;  // who falls asleep now counts itself first and then looks at the turn again
    pthread_mutex_lock(&mutex_);
    pthread_cond_broadcast(&ended_);
    pthread_mutex_unlock(&mutex_);
  }

  void wait(unsigned seen) {
    if (ends_soon(seen)) return;
    pthread_mutex_lock(&mutex_);
    sleepers_.fetch_add(1);
    while (turn_.load() == seen) pthread_cond_wait(&ended_, &mutex_);
    sleepers_.fetch_add(-1);
    pthread_mutex_unlock(&mutex_);
  }

 private:
  static constexpr long AWAKE_NS = 50000;

  bool ends_soon(unsigned seen) const {
    for (long start = 0;;) {
      for (int i = 0; i < 64; ++i) {
        if (turn() != seen) return true;
        pause();
      }
      const long now = nanoseconds();
      if (start == 0) start = now;
      if (now - start > AWAKE_NS) return false;
      sched_yield();  // whoever we wait for may want this core
    }
  }

  static long nanoseconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
  }

  alignas(64) Atomic<unsigned> turn_{0};
  Atomic<int> sleepers_{0};
  pthread_mutex_t mutex_;
  pthread_cond_t ended_;
};

class Pool {
 public:
  using Work = void (*)(void* context, int worker);

  explicit Pool(int threads) : threads_(threads) {}

  // False when the system gives no memory or no more threads; then there is nothing to destroy.
  bool create() {
    if (!start_.create()) return false;
    if (!met_.create()) {
      start_.destroy();
      return false;
    }
    members_ = static_cast<Member*>(malloc(sizeof(Member) * static_cast<size_t>(threads_)));
    sigset_t all, before;  // signals are for the program's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (members_ != nullptr && started_ + 1 < threads_) {
      Member& member = members_[started_];
      member.pool = this;
      member.number = started_ + 1;
      if (pthread_create(&member.thread, nullptr, live, &member) != 0) break;
      ++started_;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (members_ != nullptr && started_ + 1 == threads_) return true;
    destroy();
    return false;
  }

  void destroy() {
    stop_ = true;
    start_.next();
    for (int i = 0; i < started_; ++i) pthread_join(members_[i].thread, nullptr);
    free(members_);
    start_.destroy();
    met_.destroy();
  }

  int threads() const { return threads_; }

  // Calls work(context, worker) on every thread, the caller's being worker 0, and waits until all have returned.
  void run(Work work, void* context) {
    work_ = work;
    context_ = context;
    start_.next();
    work(context, 0);
    meet();
  }

  // Waits until every thread of the job has come here.
  void meet() {
    if (threads_ == 1) return;
    const unsigned turn = met_.turn();
    if (arrived_.fetch_add(1) + 1 < threads_) {
      met_.wait(turn);
    } else {
      arrived_.store(0);
      met_.next();
    }
  }

 private:
  struct Member {
    Pool* pool;
    int number;
    pthread_t thread;
  };

  static void* live(void* argument) {
    Member& member = *static_cast<Member*>(argument);
    Pool& pool = *member.pool;
    for (unsigned turn = 0;; ++turn) {
      pool.start_.wait(turn);
      if (pool.stop_) return nullptr;
      pool.work_(pool.context_, member.number);
      pool.meet();
    }
  }

  const int threads_;
  int started_ = 0;
  Member* members_ = nullptr;
  Work work_ = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;
  Signal start_, met_;
  alignas(64) Atomic<int> arrived_{0};
};

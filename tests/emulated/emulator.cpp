#include "emulator.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#ifdef FASTRL_WATCHED
#include <sanitizer/tsan_interface.h>
#endif

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#undef threadIdx
#undef blockIdx
#undef gridDim
#undef blockDim

namespace emulator {
namespace {

constexpr size_t kStack = 64 << 10;
constexpr int kLanes = 32;
// Rounds of a block in which no thread gets further.
#ifdef FASTRL_PATIENCE
constexpr long kWaits = FASTRL_PATIENCE;
#else
constexpr long kWaits = 1 << 21;
#endif

#if defined(__x86_64__)
using Context = void*;
extern "C" void emulator_switch(Context* from, Context to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
void change(Context& from, Context& to) { emulator_switch(&from, to); }
void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 2;
  top[0] = reinterpret_cast<void*>(entry);
  top[1] = nullptr;
  context = top - 6;
}
#else
using Context = ucontext_t;
void change(Context& from, Context& to) { swapcontext(&from, &to); }
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

// What ThreadSanitizer is told, where the device code is compiled for it: a fiber is a thread to it,
// which nothing orders but __syncthreads and __syncwarp. A shuffle orders no memory.
#ifdef FASTRL_WATCHED
constexpr bool kWatched = true;
void* watched_now() { return __tsan_get_current_fiber(); }
void* watch() { return __tsan_create_fiber(0); }
void unwatch(void* fiber) { __tsan_destroy_fiber(fiber); }
void watched_goes_to(void* fiber) {
  __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
}
void arrives_at(char* meeting) { __tsan_release(meeting); }
void leaves(char* meeting) { __tsan_acquire(meeting); }
#else
constexpr bool kWatched = false;
void* watched_now() { return nullptr; }
void* watch() { return nullptr; }
void unwatch(void*) {}
void watched_goes_to(void*) {}
void arrives_at(char*) {}
void leaves(char*) {}
#endif

struct Launch {
  unsigned blocks, threads;
  const std::function<void()>* kernel;
  std::vector<unsigned> order;
  std::atomic<unsigned> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string error;
  char end;

  void fail(const std::string& what) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!failed.exchange(true)) error = what;
  }
};

enum class State { ready, at_warp, at_block, done };

struct Fiber {
  Context context;
  void* watched;
  State state;
  int kind, line;
  unsigned exchanges, meetings;  // so far: of each, two take turns
  size_t size;
};

struct Warp {
  char bytes[2][kLanes * kMost];
  char meetings[2];
};

// One thread of the system, and the block that it runs.
struct Worker {
  Launch* launch;
  unsigned block, current;
  Context scheduler;
  void* watched;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  char meetings[2];
  char* stacks;
  bool moved;  // a thread has done more than to look whether it may go on
  std::minstd_rand random;
  sigjmp_buf on_fault;
};
thread_local Worker* worker = nullptr;

void yield(State state) {
  Fiber& fiber = worker->fibers[worker->current];
  fiber.state = state;
  watched_goes_to(worker->watched);
  change(fiber.context, worker->scheduler);
}

void run_thread() {
  (*worker->launch->kernel)();
  worker->moved = true;
  arrives_at(&worker->launch->end);
  yield(State::done);
}

// Lets the fibers from..to go on if all of them wait alike.
bool release(unsigned from, unsigned to, State state, const char* where) {
  auto& fibers = worker->fibers;
  const Fiber& first = fibers[from];
  unsigned there = 0, gone = 0;
  for (unsigned i = from; i < to; ++i) {
    there += fibers[i].state == state;
    gone += fibers[i].state == State::done;
  }
  if (there == 0 || there + gone < to - from) return false;
  bool alike = gone == 0;
  for (unsigned i = from; i < to; ++i) {
    alike &= fibers[i].line == first.line && fibers[i].kind == first.kind &&
             fibers[i].size == first.size;
  }
  if (!alike) {
    worker->launch->fail(std::string("threads of one ") + where + " have parted, at lines " +
                         std::to_string(first.line) + " and others");
    return false;
  }
  for (unsigned i = from; i < to; ++i) fibers[i].state = State::ready;
  return true;
}

void run_block() {
  Worker& w = *worker;
  const unsigned threads = w.launch->threads;
  for (unsigned i = 0; i < threads; ++i) {
    w.fibers[i].state = State::ready;
    w.fibers[i].exchanges = w.fibers[i].meetings = 0;
    w.fibers[i].watched = watch();
    prepare(w.fibers[i].context, w.stacks + i * kStack, run_thread);
  }
  for (long waited = 0; !w.launch->failed; ++waited) {
    w.moved = false;
    bool done = true;
    // Warps take turns in any order and go any way: what wants a barrier shows without it.
    const unsigned warps = (threads + kLanes - 1) / kLanes;
    const unsigned start = w.random() % warps, step = w.random() % 2 ? 1 : warps - 1;
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned first = (start + i * step) % warps * kLanes;
      const unsigned end = std::min(first + kLanes, threads);
      do {
        for (unsigned i = first; i < end; ++i) {
          if (w.fibers[i].state != State::ready) continue;
          w.current = i;
          watched_goes_to(w.fibers[i].watched);
          change(w.scheduler, w.fibers[i].context);
        }
      } while (!w.launch->failed && release(first, end, State::at_warp, "warp") &&
               w.random() % 8 != 0);
      for (unsigned i = first; i < end; ++i) done &= w.fibers[i].state == State::done;
    }
    if (done) return;
    if (release(0, threads, State::at_block, "block")) w.moved = true;
    if (w.moved) {
      waited = 0;
    } else {
      std::this_thread::yield();
    }
    if (waited > kWaits) w.launch->fail("threads wait for ever");
  }
}

void on_signal(int signal) {
  if (!worker) {
    ::signal(signal, SIG_DFL);
    raise(signal);
    return;
  }
  worker->launch->fail(signal == SIGILL ? "misaligned access, or undefined arithmetic"
                                        : "access to memory that is not there");
  siglongjmp(worker->on_fault, 1);
}

void work(Launch* launch, unsigned seed) {
  auto own = std::make_unique<Worker>();
  own->launch = launch;
  own->fibers.resize(launch->threads);
  own->warps.resize((launch->threads + kLanes - 1) / kLanes);
  own->stacks = static_cast<char*>(mmap(nullptr, kStack * launch->threads, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  std::vector<char> signal_stack(64 << 10);
  stack_t stack{}, before{};
  stack.ss_sp = signal_stack.data();
  stack.ss_size = signal_stack.size();
  sigaltstack(&stack, &before);
  worker = own.get();
  own->watched = watched_now();
  own->random.seed(seed + 1);
  if (sigsetjmp(own->on_fault, 1) == 0) {
    for (unsigned i; !launch->failed && (i = launch->next++) < launch->blocks;) {
      for (unsigned n = own->random() % 4; n > 0; --n) std::this_thread::yield();
      own->block = launch->order[i];
      run_block();
      for (Fiber& fiber : own->fibers) unwatch(fiber.watched);
      if (kWatched) break;
    }
  }
  worker = nullptr;
  sigaltstack(&before, nullptr);
  munmap(own->stacks, kStack * launch->threads);
}

size_t pages(size_t bytes) {
  const size_t page = sysconf(_SC_PAGESIZE);
  return (bytes + page - 1) / page * page;
}

}  // namespace

Index thread_index() { return {worker->current}; }
Index block_index() { return {worker->block}; }
Index grid() { return {worker->launch->blocks}; }
Index block() { return {worker->launch->threads}; }

void meet_block(int line) {
  Fiber& fiber = worker->fibers[worker->current];
  fiber.kind = -1;
  fiber.line = line;
  fiber.size = 0;
  worker->moved = true;
  char* meeting = worker->meetings + fiber.meetings++ % 2;
  arrives_at(meeting);
  yield(State::at_block);
  leaves(meeting);
}

void sleep() { yield(State::ready); }

const char* exchange(const void* bytes, size_t size, int kind, int line) {
  Fiber& fiber = worker->fibers[worker->current];
  Warp& warp = worker->warps[worker->current / kLanes];
  const unsigned turn = fiber.exchanges++ % 2;
  char *all = warp.bytes[turn], *meeting = warp.meetings + turn;
  const bool orders_memory = size == 0;
  if (orders_memory) arrives_at(meeting);
  char* own = all + worker->current % kLanes * kMost;
  for (size_t i = 0; i < size; ++i) own[i] = static_cast<const char*>(bytes)[i];  // unwatched
  fiber.kind = kind;
  fiber.line = line;
  fiber.size = size;
  worker->moved = true;
  yield(State::at_warp);
  if (orders_memory) leaves(meeting);
  return all;
}

std::string launch(unsigned blocks, unsigned threads, int workers, unsigned seed,
                   const std::function<void()>& kernel) {
  Launch launch;
  launch.blocks = blocks;
  launch.threads = threads;
  launch.kernel = &kernel;
  launch.order.resize(blocks);
  std::iota(launch.order.begin(), launch.order.end(), 0u);
  std::shuffle(launch.order.begin(), launch.order.end(), std::mt19937(seed));
  struct sigaction action = {}, before[3];
  action.sa_handler = on_signal;
  action.sa_flags = SA_ONSTACK;
  const int signals[] = {SIGSEGV, SIGBUS, SIGILL};
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &action, &before[i]);
  std::vector<std::thread> threads_of_system;
  const auto run = [&launch](unsigned seed) {
    if (!kWatched) return work(&launch, seed);
    // No block has memory that was another's: or they would seem to meet there.
    while (!launch.failed && launch.next < launch.blocks) std::thread(work, &launch, seed++).join();
  };
  for (int i = 0; i < workers; ++i) threads_of_system.emplace_back(run, seed + i);
  for (auto& thread : threads_of_system) thread.join();
  leaves(&launch.end);
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &before[i], nullptr);
  return launch.error;
}

void* guarded(size_t bytes, bool at_end) {
  const size_t page = pages(1), size = pages(bytes);
  char* all = static_cast<char*>(mmap(nullptr, size + 2 * page, PROT_NONE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  mprotect(all + page, size, PROT_READ | PROT_WRITE);
  std::memset(all + page, 0xff, size);
  return all + page + (at_end ? size - bytes : 0);
}

void free_guarded(void* memory, size_t bytes, bool at_end) {
  const size_t page = pages(1), size = pages(bytes);
  char* begin = static_cast<char*>(memory) - (at_end ? size - bytes : 0);
  munmap(begin - page, size + 2 * page);
}

}  // namespace emulator

#ifdef FASTRL_WATCHED
// volatile is to a GPU what relaxed atomics are to C++: never part of a race.
#define EXPORTED extern "C" __attribute__((visibility("default")))
#define VOLATILE(bytes)                                  \
  EXPORTED void __tsan_volatile_read##bytes(void*) {}    \
  EXPORTED void __tsan_volatile_write##bytes(void*) {}
VOLATILE(1)
VOLATILE(2)
VOLATILE(4)
VOLATILE(8)
#endif

// SPDX-License-Identifier: Apache-2.0
// Runs the threads of a block as fibers: each until it waits for others. All is deterministic.
#include <sys/mman.h>

#include <array>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "gpu.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace opmux::gpu::simt {
namespace {

constexpr size_t kStack = 64 * 1024;

#if defined(__x86_64__)

// Saves the registers that a call preserves, and the stack pointer; then loads the other's.
// ucontext does the same with two system calls for the signal mask.
extern "C" void opmux_simt_switch(void** save, void* load);
asm(R"(
.text
.hidden opmux_simt_switch
.globl opmux_simt_switch
.type opmux_simt_switch, @function
opmux_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size opmux_simt_switch, .-opmux_simt_switch
)");

struct Fiber {
  void* stack_pointer = nullptr;
  void start(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStack) - 2;  // as after a call: 8 below 16
    *top = reinterpret_cast<void*>(entry);
    stack_pointer = top - 6;
  }
};
void transfer(Fiber& from, Fiber& to) { opmux_simt_switch(&from.stack_pointer, to.stack_pointer); }

#else

struct Fiber {
  ucontext_t context;
  void start(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};
void transfer(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

enum class State { kReady, kAtBarrier, kAtExchange, kDone };

struct Thread {
  Fiber fiber;
  State state = State::kReady;
  bool waited = false;
  int parity = 0;                         // of its next exchange
  std::array<unsigned char, 16> slot[2];  // what it handed to its warp
};

struct Warp {
  int arrived = 0;
  int syncs = 0;
};

struct Machine {
  std::mutex mutex;
  char* stacks = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> ready;  // taken from the back
  int running = 0;
  int at_barrier = 0;
  int done = 0;
  int64_t phase = 0;   // barriers passed, over all blocks
  uint64_t block = 0;  // blocks run, over all launches
  Fiber scheduler;
  const std::function<void()>* kernel = nullptr;
  std::string error;

  int count() const { return static_cast<int>(threads.size()); }
  int warp() const { return running / kWarp; }
  // The last warp may have fewer lanes.
  int lanes(int warp) const { return std::min(kWarp, count() - warp * kWarp); }

  void make_ready(int first, int end) {
    for (int i = first; i < end; ++i) {
      threads[static_cast<size_t>(i)].state = State::kReady;
      ready.push_back(i);
    }
  }
  void yield(State state) {
    threads[static_cast<size_t>(running)].state = state;
    transfer(threads[static_cast<size_t>(running)].fiber, scheduler);
  }
};

Machine& machine() {
  static Machine* only = new Machine;
  return *only;
}

void set_running(int thread) {
  machine().running = thread;
  threadIdx.x = static_cast<unsigned>(thread);
}

void thread_main() {
  Machine& m = machine();
  try {
    (*m.kernel)();
    if (!m.threads[static_cast<size_t>(m.running)].waited) {
      fail("a thread ended without wait_for_previous()");
    }
  } catch (const std::exception& e) {
    if (m.error.empty()) {
      m.error = std::string(e.what()) + " (block " + std::to_string(blockIdx.x) + ", thread " +
                std::to_string(m.running) + ")";
    }
  }
  ++m.done;
  m.yield(State::kDone);
}

void run_block(unsigned threads) {
  Machine& m = machine();
  ++m.block;
  ++m.phase;
  m.threads.assign(threads, Thread{});
  m.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  m.ready.clear();
  m.at_barrier = m.done = 0;
  for (unsigned i = 0; i < threads; ++i) {
    m.threads[i].fiber.start(m.stacks + i * kStack, thread_main);
  }
  m.make_ready(0, m.count());
  while (!m.ready.empty()) {
    set_running(m.ready.back());
    m.ready.pop_back();
    transfer(m.scheduler, m.threads[static_cast<size_t>(m.running)].fiber);
    if (!m.error.empty()) return;
  }
  if (m.done < m.count()) {
    m.error = "a barrier or a warp operation that only some threads reach (block " +
              std::to_string(blockIdx.x) + ", " + std::to_string(m.done) + " of " +
              std::to_string(m.count()) + " threads had ended)";
  }
}

}  // namespace

void fail(const char* what) { throw std::runtime_error(what); }

void barrier() {
  Machine& m = machine();
  const int self = m.running;
  if (++m.at_barrier < m.count()) {
    m.yield(State::kAtBarrier);
  } else {
    m.at_barrier = 0;
    ++m.phase;
    for (int i = 0; i < m.count(); ++i) {
      if (i != self) m.make_ready(i, i + 1);
    }
  }
  set_running(self);
}

void exchange(const void* in, void* out, int bytes, int lane) {
  Machine& m = machine();
  const int self = m.running, warp = m.warp(), first = warp * kWarp, lanes = m.lanes(warp);
  Thread& me = m.threads[static_cast<size_t>(self)];
  const int parity = me.parity;  // a fast lane may be at its next exchange before a slow one read
  me.parity ^= 1;
  memcpy(me.slot[parity].data(), in, static_cast<size_t>(bytes));
  if (++m.warps[static_cast<size_t>(warp)].arrived < lanes) {
    m.yield(State::kAtExchange);
  } else {
    m.warps[static_cast<size_t>(warp)].arrived = 0;
    for (int i = first; i < first + lanes; ++i) {
      if (i != self) m.make_ready(i, i + 1);
    }
  }
  set_running(self);
  if (lane < 0 || lane >= lanes) fail("a shuffle from a lane that the warp does not have");
  memcpy(out, m.threads[static_cast<size_t>(first + lane)].slot[parity].data(),
         static_cast<size_t>(bytes));
}

void sync_warp() {
  char none = 0, out = 0;
  Machine& m = machine();
  const size_t warp = static_cast<size_t>(m.warp());
  const int before = m.warps[warp].syncs;
  exchange(&none, &out, 1, 0);
  m.warps[warp].syncs = before + 1;
}

void waited_for_previous() {
  Machine& m = machine();
  m.threads[static_cast<size_t>(m.running)].waited = true;
}

void note_read(Shadow& at) {
  Machine& m = machine();
  if (at.block != m.block) fail("shared memory read before it was written");
  const int warp = m.warp(), syncs = m.warps[static_cast<size_t>(warp)].syncs;
  const bool same_phase = at.write_phase == m.phase && at.writer != m.running;
  if (same_phase && !(at.writer / kWarp == warp && at.write_sync < syncs)) {
    fail("race: shared memory read without a barrier after another thread's write");
  }
  if (at.read_phase != m.phase) {
    at.reader = m.running;
    at.reader_warp = warp;
  } else {
    if (at.reader != m.running) at.reader = -2;
    if (at.reader_warp != warp) at.reader_warp = -2;
  }
  at.read_phase = m.phase;
  at.read_sync = syncs;
}

void note_write(Shadow& at, bool atomic) {
  Machine& m = machine();
  if (atomic && at.block != m.block) fail("an atomic operation before the element was set");
  const int warp = m.warp(), syncs = m.warps[static_cast<size_t>(warp)].syncs;
  const bool here = at.block == m.block;
  const bool read = here && at.read_phase == m.phase && at.reader != m.running &&
                    !(at.reader_warp == warp && at.read_sync < syncs);
  const bool written = here && at.write_phase == m.phase && at.writer != m.running &&
                       !(at.writer / kWarp == warp && at.write_sync < syncs) &&
                       !(at.atomic && atomic);
  if (read || written) {
    fail("race: shared memory written without a barrier after another thread's access");
  }
  at.block = m.block;
  at.write_phase = m.phase;
  at.writer = m.running;
  at.write_sync = syncs;
  at.atomic = atomic;
}

const char* run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  static std::string error;
  if (threads == 0 || threads > kMaxThreads || threads % kBlockUnit != 0) {
    return "a block must have a multiple of 128 threads, at most 1024";
  }
  if (m.stacks == nullptr) {
    void* memory = mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return "no memory for the threads' stacks";
    m.stacks = static_cast<char*>(memory);
  }
  m.kernel = &kernel;
  m.error.clear();
  blockDim.x = threads;
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks && m.error.empty(); ++blockIdx.x) run_block(threads);
  error = m.error;
  return error.empty() ? nullptr : error.c_str();
}

}  // namespace opmux::gpu::simt

// Runs CUDA kernels as C++ on the CPU, for tests only: a CUDA thread is a fiber, and the blocks run one after another on the calling thread.
//
// A fiber runs until a barrier or a warp collective and then pauses, so lanes do not run in step: the weakest schedule that GPUs
// allow. The schedule is the order of blocks, warps and lanes: 0 first to last, 1 last to first, above 1 a seeded shuffle.
// It finds barriers that only a part of the block reaches, warp collectives whose masks disagree, dead-locks, and shared memory that is
// read before it is written (it contains NaN); with -fsanitize=address accesses outside buffers and shared objects; with
// -fsanitize=thread data races between threads. An error ends the launch with FAILED and a text (control.cpp).
// It does not show speed, effects of missing memory fences, or the rounding of the GPU's own exp2 and reciprocals.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <exception>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulation/sanitizers.h"
#include "emulation/types.h"

#if !defined(__x86_64__)
#error "the emulator switches stacks on x86-64 only"
#endif

namespace emulation {

constexpr int FAILED = 999;  // cudaErrorUnknown
constexpr size_t STACK_BYTES = 64 << 10, GUARD_BYTES = 4096, SHARED_BYTES = 227 << 10;
constexpr int WARP_LANES = 32, MOST_THREADS = 1024;
constexpr unsigned MOST_BLOCKS_YZ = 65535;

enum class State : uint8_t { READY, AT_BARRIER, AT_COLLECTIVE, DONE };
enum class Collective : uint8_t { NONE, SHUFFLE, BALLOT, SYNC };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  uint3 thread{};
  int index = 0;
  State state = State::DONE;
  const char* where = "";
  Collective collective = Collective::NONE;
  unsigned mask = 0;
  uint64_t value = 0, result = 0;
  int source = 0;
  SanitizerState sanitizer;
};

struct SharedObject {
  const void* key;
  void* memory;
  size_t bytes;
};

// The running block; the emulator supports one calling thread. Neither the block nor its fibers are destroyed.
struct Block {
  std::vector<Fiber> fibers;
  int threads = 0;
  uint3 index{};
  dim3 block_size, grid_size;
  std::vector<SharedObject> shared;
  void* scheduler_stack_pointer = nullptr;
  SanitizerState scheduler;
  Fiber* current = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::string error;
  int schedule = 0;
  char launched = 0, finished = 0, barrier = 0, warps[WARP_LANES] = {};  // addresses that order threads for the sanitizer
};
inline Block& block = *new Block;

[[noreturn]] inline void fail(const std::string& text) { throw std::runtime_error(text); }

extern "C" __attribute__((visibility("hidden"))) void ledom_emulation_switch(void** save, void* load);
asm(R"(
.text
.weak ledom_emulation_switch
.hidden ledom_emulation_switch
.type ledom_emulation_switch,@function
ledom_emulation_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi); movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size ledom_emulation_switch,.-ledom_emulation_switch
)");

inline void leave_fiber() {
  Fiber* fiber = block.current;
  before_switch(block.scheduler, fiber->state == State::DONE ? nullptr : &fiber->sanitizer, nullptr, 0);
  ledom_emulation_switch(&fiber->stack_pointer, block.scheduler_stack_pointer);
  after_switch(&fiber->sanitizer, nullptr);
}

inline void resume(Fiber& fiber) {
  block.current = &fiber;
  before_switch(fiber.sanitizer, &block.scheduler, fiber.stack, STACK_BYTES);
  ledom_emulation_switch(&block.scheduler_stack_pointer, fiber.stack_pointer);
  after_switch(&block.scheduler, nullptr);
}

inline void run_fiber() {
  after_switch(nullptr, &block.scheduler);
  acquire(&block.launched);
  try {
    (*block.kernel)();
  } catch (const std::exception& error) {
    if (block.error.empty()) block.error = error.what();
  }
  release(&block.finished);
  block.current->state = State::DONE;
  leave_fiber();
  std::abort();
}

inline void prepare(Fiber& fiber, int index) {
  const dim3& size = block.block_size;
  const unsigned t = static_cast<unsigned>(index);
  fiber.index = index;
  fiber.thread = {t % size.x, t / size.x % size.y, t / (size.x * size.y)};
  fiber.state = State::READY;
  void** top = reinterpret_cast<void**>(fiber.stack + STACK_BYTES) - 1;  // 8 below a multiple of 16, as after a call
  *--top = reinterpret_cast<void*>(&run_fiber);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber.stack_pointer = top;
}

inline void wait_at_barrier(const char* where) {
  const Quiet quiet;
  block.current->state = State::AT_BARRIER;
  block.current->where = where;
  release(&block.barrier);
  leave_fiber();
  acquire(&block.barrier);
}

// Returns true if all lanes of the mask have reached the same collective; fails if they never can.
inline bool is_complete(const Fiber& fiber) {
  const int first = fiber.index / WARP_LANES * WARP_LANES;
  bool complete = true;
  for (int lane = 0; lane < WARP_LANES; lane++) {
    if (!(fiber.mask >> lane & 1)) continue;
    const int index = first + lane;
    if (index >= block.threads) fail(std::string("mask names a lane beyond the block at ") + fiber.where);
    const Fiber& other = block.fibers[index];
    if (other.state == State::DONE) fail(std::string("mask names an exited lane at ") + fiber.where);
    if (other.state != State::AT_COLLECTIVE) complete = false;
    else if (other.collective != fiber.collective || other.mask != fiber.mask)
      fail(std::string("warp collectives disagree: ") + fiber.where + " and " + other.where);
  }
  return complete;
}

inline void finish_collective(const Fiber& fiber) {
  Fiber* lanes = &block.fibers[fiber.index / WARP_LANES * WARP_LANES];
  unsigned ballot = 0;
  for (int lane = 0; lane < WARP_LANES; lane++)
    if ((fiber.mask >> lane & 1) && lanes[lane].value) ballot |= 1u << lane;
  for (int lane = 0; lane < WARP_LANES; lane++) {
    if (!(fiber.mask >> lane & 1)) continue;
    Fiber& other = lanes[lane];
    const bool known = fiber.mask >> other.source & 1;
    other.result = other.collective == Collective::BALLOT ? ballot : known ? lanes[other.source].value : ~uint64_t{0};
    other.state = State::READY;
  }
}

inline uint64_t warp_collective(Collective collective, unsigned mask, uint64_t value, int source, const char* where) {
  const Quiet quiet;
  Fiber& fiber = *block.current;
  if (!(mask >> fiber.index % WARP_LANES & 1)) fail(std::string("the calling lane is not in the mask at ") + where);
  fiber.collective = collective;
  fiber.mask = mask;
  fiber.value = value;
  fiber.source = source;
  fiber.where = where;
  fiber.state = State::AT_COLLECTIVE;
  char* order = &block.warps[fiber.index / WARP_LANES];
  release(order);
  if (is_complete(fiber)) finish_collective(fiber);
  leave_fiber();
  acquire(order);
  return fiber.result;
}

// Returns the block's object for a declaration; the first thread makes it and fills it with NaN.
inline void* shared_object(const void* key, size_t bytes) {
  const Quiet quiet;
  size_t used = bytes;
  for (const SharedObject& object : block.shared) {
    if (object.key == key) return object.memory;
    used += object.bytes;
  }
  if (used > SHARED_BYTES) fail("shared memory above 227 KiB");
  void* memory = std::aligned_alloc(16, (bytes + 15) / 16 * 16);
  std::memset(memory, 0xFF, bytes);
  block.shared.push_back({key, memory, bytes});
  return memory;
}

inline void free_shared() {
  for (const SharedObject& object : block.shared) std::free(object.memory);
  block.shared.clear();
}

// Runs each lane of a warp as far as possible. Returns true if one moved.
inline bool run_warp(int warp, std::mt19937& random) {
  const int first = warp * WARP_LANES, lanes = std::min(WARP_LANES, block.threads - first);
  int order[WARP_LANES];
  for (int i = 0; i < lanes; i++) order[i] = block.schedule == 1 ? first + lanes - 1 - i : first + i;
  bool moved = false;
  for (bool again = true; again;) {
    again = false;
    if (block.schedule > 1) std::shuffle(order, order + lanes, random);
    for (int i = 0; i < lanes; i++) {
      Fiber& fiber = block.fibers[order[i]];
      if (fiber.state != State::READY) continue;
      resume(fiber);
      again = moved = true;
      if (!block.error.empty()) fail(block.error);
    }
    if (block.schedule > 1 && random() % 4 == 0) break;  // interrupt the warp sometimes
  }
  return moved;
}

// Opens the barrier if the whole block has reached it. Returns true if it did.
inline bool open_barrier() {
  int waiting = 0;
  const char* where = nullptr;
  for (int i = 0; i < block.threads; i++) {
    const Fiber& fiber = block.fibers[i];
    if (fiber.state != State::AT_BARRIER) continue;
    if (where && std::strcmp(where, fiber.where)) fail(std::string("threads wait at two barriers: ") + where + " and " + fiber.where);
    where = fiber.where;
    waiting++;
  }
  int done = 0;
  for (int i = 0; i < block.threads; i++) done += block.fibers[i].state == State::DONE;
  if (waiting && waiting + done == block.threads && done)
    fail("a barrier is reached by " + std::to_string(waiting) + " of " + std::to_string(block.threads) + " threads at " + where);
  if (waiting != block.threads) return false;
  for (int i = 0; i < block.threads; i++) block.fibers[i].state = State::READY;
  return true;
}

inline bool is_done() {
  return std::all_of(block.fibers.begin(), block.fibers.begin() + block.threads,
                     [](const Fiber& fiber) { return fiber.state == State::DONE; });
}

inline void run_block(std::mt19937& random) {
  release(&block.launched);
  for (int i = 0; i < block.threads; i++) prepare(block.fibers[i], i);
  std::vector<int> warps((block.threads + WARP_LANES - 1) / WARP_LANES);
  for (size_t i = 0; i < warps.size(); i++) warps[i] = static_cast<int>(block.schedule == 1 ? warps.size() - 1 - i : i);
  while (!is_done()) {
    if (block.schedule > 1) std::shuffle(warps.begin(), warps.end(), random);
    bool moved = false;
    for (int warp : warps) moved |= run_warp(warp, random);
    if (!open_barrier() && !moved && !is_done()) fail("dead-lock: threads wait for lanes or threads that never come");
  }
  acquire(&block.finished);
  free_shared();
}

inline void make_fibers(size_t count) {
  while (block.fibers.size() < count) {
    Fiber fiber;
    void* memory = mmap(nullptr, STACK_BYTES + GUARD_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for the stacks");
    mprotect(memory, GUARD_BYTES, PROT_NONE);
    fiber.stack = static_cast<char*>(memory) + GUARD_BYTES;
    start_fiber(fiber.sanitizer);
    block.fibers.push_back(fiber);
  }
}

inline void run_grid(dim3 grid, dim3 size, const std::function<void()>& kernel) {
  const uint64_t threads = uint64_t{size.x} * size.y * size.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > MOST_THREADS) fail("a block of " + std::to_string(threads) + " threads");
  if (blocks == 0 || grid.x > 0x7FFFFFFFu || grid.y > MOST_BLOCKS_YZ || grid.z > MOST_BLOCKS_YZ) fail("a grid that CUDA refuses");
  make_fibers(MOST_THREADS);
  start_scheduler(block.scheduler);
  block.threads = static_cast<int>(threads);
  block.block_size = size;
  block.grid_size = grid;
  block.kernel = &kernel;
  block.error.clear();
  std::mt19937 random(static_cast<unsigned>(block.schedule));
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; i++) order[i] = block.schedule == 1 ? blocks - 1 - i : i;
  if (block.schedule > 1) std::shuffle(order.begin(), order.end(), random);
  for (uint64_t i : order) {
    block.index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                   static_cast<unsigned>(i / (uint64_t{grid.x} * grid.y))};
    run_block(random);
  }
}

// Runs a kernel to its end. Returns 0, or FAILED with the error in block.error.
inline int launch(dim3 grid, dim3 size, const std::function<void()>& kernel) {
  const Quiet quiet;
  try {
    run_grid(grid, size, kernel);
    return cudaSuccess;
  } catch (const std::exception& error) {
    block.error = error.what();
    free_shared();
    return FAILED;
  }
}

}  // namespace emulation

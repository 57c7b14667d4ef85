// Reports fibers to gcc's sanitizers; empty functions without a sanitizer.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_create_fiber(unsigned);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#elif defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}
#endif

namespace emulation {

struct SanitizerState {
  void* fiber = nullptr;       // thread sanitizer
  void* fake_stack = nullptr;  // address sanitizer
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};

#if defined(__SANITIZE_THREAD__)
constexpr unsigned WITHOUT_ORDER = 1;
struct Quiet {  // hides the emulator's own accesses from the sanitizer
  Quiet() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
};
inline void start_fiber(SanitizerState& state) { state.fiber = __tsan_create_fiber(0); }
inline void start_scheduler(SanitizerState& state) { state.fiber = __tsan_get_current_fiber(); }
inline void before_switch(SanitizerState& to, SanitizerState*, const void*, size_t) { __tsan_switch_to_fiber(to.fiber, WITHOUT_ORDER); }
inline void after_switch(SanitizerState*, SanitizerState*) {}
inline void release(void* address) { __tsan_release(address); }
inline void acquire(void* address) { __tsan_acquire(address); }
#elif defined(__SANITIZE_ADDRESS__)
struct Quiet {
  Quiet() {}
};
inline void start_fiber(SanitizerState&) {}
inline void start_scheduler(SanitizerState&) {}
// `from` null: the fiber does not return to that stack. Without a stack: the scheduler's, as known when the fiber began.
inline void before_switch(SanitizerState& to, SanitizerState* from, const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(from ? &from->fake_stack : nullptr, stack ? stack : to.stack, stack ? bytes : to.stack_bytes);
}
inline void after_switch(SanitizerState* own, SanitizerState* left) {
  __sanitizer_finish_switch_fiber(own ? own->fake_stack : nullptr, left ? &left->stack : nullptr, left ? &left->stack_bytes : nullptr);
}
inline void release(void*) {}
inline void acquire(void*) {}
#else
struct Quiet {
  Quiet() {}
};
inline void start_fiber(SanitizerState&) {}
inline void start_scheduler(SanitizerState&) {}
inline void before_switch(SanitizerState&, SanitizerState*, const void*, size_t) {}
inline void after_switch(SanitizerState*, SanitizerState*) {}
inline void release(void*) {}
inline void acquire(void*) {}
#endif

}  // namespace emulation

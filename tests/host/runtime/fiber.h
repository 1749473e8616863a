// Fibers: stacks of their own on one OS thread, switched by hand. A CUDA thread of a host launch is one fiber.
//
// On x86-64 a switch is a dozen instructions (some 10 ns); elsewhere, or with GC_HOST_UCONTEXT, it is ucontext's, which
// is slower because it saves the signal mask. AddressSanitizer is told about every switch.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(GC_HOST_UCONTEXT)
#define GC_HOST_UCONTEXT
#endif

#if defined(GC_HOST_UCONTEXT)
#include <ucontext.h>
#endif

namespace gc::host {

// Reserved, not used: pages of a stack that is never that deep are never touched. A guard page lies below each stack.
inline constexpr std::size_t kStackBytes = 128 * 1024;

class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next resume() call entry(), which must not return: it ends with a last pause(). What the fiber did before
  // is dropped, without destructors.
  void start(void (*entry)());

  // Runs the fiber until it calls pause(). To be called from outside of fibers.
  void resume();

  // Goes back to the caller of resume(). To be called from inside a fiber.
  static void pause();

  // True between the resume() of a fiber and its pause().
  static bool inside() { return running_ != nullptr; }

 private:
  static void first_entry();

  static Fiber* running_;
  char* stack_ = nullptr;
  void (*entry_)() = nullptr;
#if defined(GC_HOST_UCONTEXT)
  ucontext_t context_ = {};
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace gc::host

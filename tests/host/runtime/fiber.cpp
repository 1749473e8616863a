#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(GC_HOST_UCONTEXT)
// Saves the callee-saved registers and the stack pointer of the running context, and loads those of the other.
extern "C" void gc_host_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl gc_host_switch
.type gc_host_switch, @function
gc_host_switch:
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
.size gc_host_switch, .-gc_host_switch
)");
#endif

namespace gc::host {
namespace {

constexpr std::size_t kPage = 4096;

#if defined(GC_HOST_UCONTEXT)
ucontext_t outside;
#else
void* outside = nullptr;
#endif

// What AddressSanitizer needs to follow a switch; nothing in the other builds.
struct Announce {
#if defined(__SANITIZE_ADDRESS__)
  const void* outside_stack = nullptr;
  std::size_t outside_bytes = 0;
  void to_fiber(void** save, const char* stack) { __sanitizer_start_switch_fiber(save, stack, kStackBytes); }
  void to_outside(void** save) { __sanitizer_start_switch_fiber(save, outside_stack, outside_bytes); }
  void in_fiber(void* save) { __sanitizer_finish_switch_fiber(save, &outside_stack, &outside_bytes); }
  void in_outside(void* save) { __sanitizer_finish_switch_fiber(save, nullptr, nullptr); }
  // A fiber that was dropped left the red zones of its frames behind.
  void clean(char* stack) { ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes); }
#else
  void to_fiber(void**, const char*) {}
  void to_outside(void**) {}
  void in_fiber(void*) {}
  void in_outside(void*) {}
  void clean(char*) {}
#endif
};
Announce announce;

std::vector<char*> free_stacks;

char* take_stack() {
  if (!free_stacks.empty()) {
    char* const stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  void* const pages =
      mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED || mprotect(pages, kPage, PROT_NONE) != 0) {
    std::perror("no memory for a fiber's stack");
    std::abort();
  }
  return static_cast<char*>(pages) + kPage;
}

}  // namespace

Fiber* Fiber::running_ = nullptr;

Fiber::~Fiber() {
  if (stack_ != nullptr) free_stacks.push_back(stack_);
}

void Fiber::first_entry() {
  announce.in_fiber(nullptr);
  running_->entry_();
  std::abort();  // entry must not return
}

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) stack_ = take_stack();
  announce.clean(stack_);
  entry_ = entry;
#if defined(GC_HOST_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::first_entry, 0);
#else
  // As gc_host_switch left it: six registers, and the address that `ret` takes. Above that a null return address, so
  // that the stack is aligned as after a call and a debugger's walk ends there.
  void** const top = reinterpret_cast<void**>(stack_ + kStackBytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(&Fiber::first_entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  stack_pointer_ = top - 8;
#endif
}

void Fiber::resume() {
  void* save = nullptr;
  running_ = this;
  announce.to_fiber(&save, stack_);
#if defined(GC_HOST_UCONTEXT)
  swapcontext(&outside, &context_);
#else
  gc_host_switch(&outside, stack_pointer_);
#endif
  announce.in_outside(save);
  running_ = nullptr;
}

void Fiber::pause() {
  void* save = nullptr;
  Fiber* const self = running_;
  announce.to_outside(&save);
#if defined(GC_HOST_UCONTEXT)
  swapcontext(&self->context_, &outside);
#else
  gc_host_switch(&self->stack_pointer_, outside);
#endif
  announce.in_fiber(save);
}

}  // namespace gc::host

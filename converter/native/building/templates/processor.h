// Which processors the kernels run on. model.cpp is compiled for any processor of the family, and asks before a kernel runs.
#pragma once

#include <stddef.h>

// A bit that cpuid must report, and the registers that the operating system must save (bits of XCR0). On aarch64 a bit of the
// operating system's word `leaf` (getauxval).
struct Feature {
  const char* missing;
  unsigned leaf, subleaf;
  int word;  // 0: eax, 1: ebx, 2: ecx, 3: edx
  int bit;
  unsigned long saved;
};

// Ends with a Feature whose `missing` is nullptr.
extern "C" __attribute__((visibility("hidden"))) const Feature gkp_features[];

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

static inline unsigned long saved_registers() {
  unsigned words[4];
  if (!__get_cpuid(1, &words[0], &words[1], &words[2], &words[3]) || !(words[2] >> 27 & 1)) return 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<unsigned long>(high) << 32 | low;
}

// nullptr, or what is missing here.
static inline const char* missing_feature() {
  const unsigned long saved = saved_registers();
  for (const Feature* f = gkp_features; f->missing != nullptr; ++f) {
    unsigned words[4] = {};
    const bool known = __get_cpuid_count(f->leaf, f->subleaf, &words[0], &words[1], &words[2], &words[3]);
    if (!known || !(words[f->word] >> f->bit & 1) || (saved & f->saved) != f->saved) return f->missing;
  }
  return nullptr;
}

// Linux gives the registers of AMX, the tiles, to a process that asks. To ask again changes nothing.
static inline bool tiles_denied() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, bit of XCR0
  bool needed = false;
  for (const Feature* f = gkp_features; f->missing != nullptr; ++f) needed |= f->saved >> TILE_DATA & 1;
  return needed && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) != 0;
}
#else
#include <sys/auxv.h>

static inline const char* missing_feature() {
  for (const Feature* f = gkp_features; f->missing != nullptr; ++f)
    if (!(getauxval(f->leaf) >> f->bit & 1)) return f->missing;
  return nullptr;
}

static inline bool tiles_denied() { return false; }
#endif

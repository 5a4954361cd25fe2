// cpuid and xgetbv need no operating system. Intel SDM volume 1, 14.3 and 15.2: a register is usable when XCR0 says so.
#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>

#include "platform/cpu.h"

namespace edgeformer {
namespace {

using Features = std::vector<std::pair<std::string, bool>>;

uint64_t enabled_state() {  // XCR0: the registers that the OS saves
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

Features detect() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  const bool osxsave = __get_cpuid(1, &a, &b, &c, &d) && (c >> 27 & 1);
  const uint32_t leaf1 = c;
  uint32_t b7 = 0, c7 = 0, a71 = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    b7 = b, c7 = c;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) a71 = a;  // a: the last subleaf there is
  }
  const uint64_t state = osxsave ? enabled_state() : 0;
  const bool ymm = (state & 0x06) == 0x06;
#if defined(__APPLE__)
  // macOS enables the AVX-512 state of a thread at its first use: XCR0 does not show it before (XNU, fpu.c).
  const bool zmm = ymm;
#else
  const bool zmm = (state & 0xe6) == 0xe6;
#endif
  return {
      {"avx2", ymm && (b7 >> 5 & 1)},      {"fma", ymm && (leaf1 >> 12 & 1)},   {"f16c", ymm && (leaf1 >> 29 & 1)},
      {"avxvnni", ymm && (a71 >> 4 & 1)},  {"avx512f", zmm && (b7 >> 16 & 1)},  {"avx512dq", zmm && (b7 >> 17 & 1)},
      {"avx512bw", zmm && (b7 >> 30 & 1)}, {"avx512vl", zmm && (b7 >> 31 & 1)}, {"avx512vnni", zmm && (c7 >> 11 & 1)},
  };
}

}  // namespace

const Features& cpu_features() {
  static const Features found = detect();
  return found;
}

const char* cpu_maker() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx ? "AMD" : "";
}

}  // namespace edgeformer
#endif

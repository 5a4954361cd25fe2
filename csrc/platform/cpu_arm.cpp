// ARM has no instruction that a program may ask: the operating system tells.
#if !defined(__x86_64__)
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(_WIN32)
#include <windows.h>
#endif

#include "platform/cpu.h"

namespace edgeformer {
namespace {

using Features = std::vector<std::pair<std::string, bool>>;

#if defined(__aarch64__) && defined(__linux__)
// HWCAP_ASIMDDP and HWCAP2_I8MM of the kernel's ABI; older headers lack the second.
Features detect() {
  return {{"dotprod", (getauxval(AT_HWCAP) >> 20 & 1) != 0}, {"i8mm", (getauxval(26 /* AT_HWCAP2 */) >> 13 & 1) != 0}};
}
#elif defined(__aarch64__) && defined(__APPLE__)
// Apple's "Determining Instruction Set Characteristics". M1 has dotprod, M2 and later have i8mm too.
bool has(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
Features detect() {
  return {{"dotprod", has("hw.optional.arm.FEAT_DotProd")}, {"i8mm", has("hw.optional.arm.FEAT_I8MM")}};
}
#elif defined(__aarch64__) && defined(_WIN32)
// winnt.h: PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE and PF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE; older headers lack them.
Features detect() {
  return {{"dotprod", IsProcessorFeaturePresent(43) != 0}, {"i8mm", IsProcessorFeaturePresent(66) != 0}};
}
#elif defined(__aarch64__)
Features detect() { return {{"dotprod", false}, {"i8mm", false}}; }
#else
Features detect() { return {}; }
#endif

}  // namespace

const Features& cpu_features() {
  static const Features found = detect();
  return found;
}

const char* cpu_maker() { return ""; }

}  // namespace edgeformer
#endif

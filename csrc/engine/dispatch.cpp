#include "engine/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace edgeformer {
namespace {

using Features = std::vector<std::pair<std::string, bool>>;

#if defined(__x86_64__)

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
  const bool ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6;
  return {
      {"avx2", ymm && (b7 >> 5 & 1)},      {"fma", ymm && (leaf1 >> 12 & 1)},   {"f16c", ymm && (leaf1 >> 29 & 1)},
      {"avxvnni", ymm && (a71 >> 4 & 1)},  {"avx512f", zmm && (b7 >> 16 & 1)},  {"avx512dq", zmm && (b7 >> 17 & 1)},
      {"avx512bw", zmm && (b7 >> 30 & 1)}, {"avx512vl", zmm && (b7 >> 31 & 1)}, {"avx512vnni", zmm && (c7 >> 11 & 1)},
  };
}

// Kernels::prefetch, as measured (docs/performance.md): 4 KiB on Intel Xeons. On Zen 4: none for one or two rows,
// 8 KiB for more.
std::pair<int64_t, int64_t> prefetch() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx) return {0, 8192};
  return {4096, 4096};
}

#elif defined(__aarch64__)

std::pair<int64_t, int64_t> prefetch() { return {0, 0}; }  // the NEON tables have S::kPrefetch

Features detect() {
#if defined(__linux__)
  // HWCAP_ASIMDDP and HWCAP2_I8MM of the kernel's ABI; older headers lack the second.
  return {{"dotprod", (getauxval(AT_HWCAP) >> 20 & 1) != 0}, {"i8mm", (getauxval(26 /* AT_HWCAP2 */) >> 13 & 1) != 0}};
#elif defined(__APPLE__)
  return {{"dotprod", true}, {"i8mm", false}};  // every Apple arm64 has dotprod
#else
  return {{"dotprod", false}, {"i8mm", false}};
#endif
}

#else

std::pair<int64_t, int64_t> prefetch() { return {0, 0}; }
Features detect() { return {}; }

#endif

const Features& features() {
  static const Features found = detect();
  return found;
}

struct Table {
  const char* name;
  std::vector<std::string> needs;
  Kernels (*make)();
};

#if defined(__x86_64__)
Kernels make_avx512vnni() { return kernels_avx512vnni_bytes(kernels_avx512vnni()); }
#elif defined(__aarch64__)
Kernels make_i8mm() { return kernels_neon_i8mm(kernels_neon_dotprod()); }
#endif

const std::vector<Table>& tables() {  // best first
  static const std::vector<Table> all = {
#if defined(__x86_64__)
      {"avx512vnni",
       {"avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512vnni"},
       make_avx512vnni},
      {"avxvnni", {"avx2", "fma", "f16c", "avxvnni"}, kernels_avxvnni},
      {"avx2", {"avx2", "fma", "f16c"}, kernels_avx2},
#elif defined(__aarch64__)
      {"neon_i8mm", {"dotprod", "i8mm"}, make_i8mm},
      {"neon_dotprod", {"dotprod"}, kernels_neon_dotprod},
#endif
      {"scalar", {}, kernels_scalar},
  };
  return all;
}

Kernels made(const Table& table) {
  Kernels kernels = table.make();
  if (const char* name = null_kernel(kernels))
    throw std::logic_error(std::string("the kernel table ") + table.name + " has no " + name);
  const auto [few, more] = prefetch();
  kernels.prefetch[0] = few, kernels.prefetch[1] = more;
  return kernels;
}

bool has(const std::string& feature) {
  for (const auto& [name, present] : features())
    if (name == feature) return present;
  return false;
}

std::string missing(const Table& table) {
  std::string names;
  for (const auto& need : table.needs)
    if (!has(need)) names += (names.empty() ? "" : ", ") + need;
  return names;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

const char* null_kernel(const Kernels& kernels) {
#define EDGEFORMER_CHECK(name) \
  if (!kernels.name) return #name;
  EDGEFORMER_KERNELS(EDGEFORMER_CHECK)
#undef EDGEFORMER_CHECK
  for (int type = 0; type < kWeightTypes; type++)
    if (!kernels.linear[type]) return kWeightTypeNames[type];
  return nullptr;
}

std::vector<std::pair<std::string, bool>> cpu_features() { return features(); }

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const auto& table : tables()) names.push_back(table.name);
  return names;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const auto& table : tables())
    if (missing(table).empty()) names.push_back(table.name);
  return names;
}

Kernels kernels_for(const std::string& isa) {
  const char* forced = std::getenv("EDGEFORMER_ISA");
  const bool from_environment = isa.empty() && forced && *forced;
  const std::string wanted = from_environment ? forced : isa;
  for (const auto& table : tables()) {
    const std::string lacks = missing(table);
    if (wanted.empty() && lacks.empty()) return made(table);
    if (wanted != table.name) continue;
    if (lacks.empty()) return made(table);
    throw std::invalid_argument(
        "isa \"" + wanted + "\" needs " + lacks + ", which this CPU or its OS does not offer; " +
        (from_environment ? "unset EDGEFORMER_ISA or set it to" : "choose") + " one of: " + joined(usable_isas()));
  }
  throw std::invalid_argument((from_environment ? "EDGEFORMER_ISA is \"" : "isa is \"") + wanted +
                              "\", which is not in this build; usable here: " + joined(usable_isas()));
}

}  // namespace edgeformer

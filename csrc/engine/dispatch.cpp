#include "engine/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#include "platform/cpu.h"

namespace edgeformer {
namespace {

// Kernels::prefetch, as measured (docs/performance.md): 4 KiB on Intel Xeons. On Zen 4: none for one or two rows,
// 8 KiB for more. The NEON tables have S::kPrefetch.
std::pair<int64_t, int64_t> prefetch() {
#if defined(__x86_64__)
  if (std::string(cpu_maker()) == "AMD") return {0, 8192};
  return {4096, 4096};
#else
  return {0, 0};
#endif
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
  for (const auto& [name, present] : cpu_features())
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

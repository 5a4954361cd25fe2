// The kernel tables of this build, those that this CPU and OS can run, and the choice of one.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kernels/kernels.h"

namespace edgeformer {

// Names of the tables in this build, best first; the last is "scalar".
std::vector<std::string> built_isas();
// Names of the tables that run on this CPU and OS, best first.
std::vector<std::string> usable_isas();
// The table named `isa`; if empty, the one that EDGEFORMER_ISA (environment) names, else the best usable one.
// Throws std::invalid_argument for a table that is unknown, not built or not usable; the message lists the usable ones.
Kernels kernels_for(const std::string& isa);
// The name of a kernel (or the weight type of a linear) whose pointer is null; null if the table is complete.
const char* null_kernel(const Kernels& kernels);

}  // namespace edgeformer

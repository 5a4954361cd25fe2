// Which kernel tables are built in, which of them this CPU and OS can run, and choosing one.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kernels/kernels.h"

namespace edgeformer {

// Name and presence of each CPU feature that a table asks for, the OS's part (register state) included.
std::vector<std::pair<std::string, bool>> cpu_features();
// Names of the tables in this build, best first; "scalar" is always the last.
std::vector<std::string> built_isas();
// Those of them that run here, best first.
std::vector<std::string> usable_isas();
// The table named `isa`; empty: the environment's EDGEFORMER_ISA, and without it the best usable one.
// Throws std::invalid_argument (the message lists the usable ones) where the name is unknown, not built or not usable.
Kernels kernels_for(const std::string& isa);

}  // namespace edgeformer

// What this CPU can do, and its operating system lets it.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace edgeformer {

// Name and presence of each feature that a kernel table needs; present: the OS saves its registers too.
const std::vector<std::pair<std::string, bool>>& cpu_features();

// "AMD", or "" for any other maker.
const char* cpu_maker();

}  // namespace edgeformer

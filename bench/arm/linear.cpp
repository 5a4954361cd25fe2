// Runs one linear kernel of one table REPEATS times on generated weights, so that its instructions can be counted.
//
//   linear ISA TYPE N K M REPEATS      TYPE: a WeightType by its number
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "engine/dispatch.h"
#include "kernels/pack.h"
#include "platform/memory.h"

using namespace edgeformer;

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  try {
    const Kernels kernels = kernels_for(argv[1]);
    const auto type = WeightType(std::atoi(argv[2]));
    const int64_t n = std::atoll(argv[3]), k = std::atoll(argv[4]), m = std::atoll(argv[5]);
    const size_t groups = static_cast<size_t>(n * blocks_of(k));
    std::vector<uint8_t> q(static_cast<size_t>(n * k), 0x35);
    std::vector<float> scale(groups, 0.0078125f), x(static_cast<size_t>(m * k)), y(static_cast<size_t>(m * n));
    for (size_t i = 0; i < x.size(); i++) x[i] = float(int(i * 37 % 255) - 127) / 64;
    PackSource source = {};
    source.q = q.data(), source.scale = scale.data(), source.min = scale.data(), source.n = n, source.k = k;
    source.block = span_of(type);
    void* packed = pages_alloc(packed_bytes(type, n, k));
    if (pack_rows(type, source, 0, n, nullptr, packed).error != PackError::none) throw std::runtime_error("pack_rows");
    std::vector<int8_t> xq(static_cast<size_t>(m * blocks_of(k) * kBlock));
    std::vector<XBlock> xb(static_cast<size_t>(m * blocks_of(k)));
    kernels.quantize({.x = x.data(),
                      .ldx = k,
                      .m = m,
                      .k = k,
                      .span = span_of(type),
                      .block_begin = 0,
                      .block_end = blocks_of(k),
                      .xq = xq.data(),
                      .xb = xb.data()});
    const LinearArgs a = {packed, n, k, xq.data(), xb.data(), x.data(), k, m, y.data(), n};
    for (int i = std::atoi(argv[6]); i > 0; i--) kernels.linear[int(type)](a, 0, panels_of(n));
    std::printf("%g\n", double(y.back()));
    pages_free(packed, packed_bytes(type, n, k));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

// Runs every kernel of one table on generated inputs and prints a hash of the output bits, one line a case.
//
//   runner --list      the usable tables, best first
//   runner ISA         "name hash" lines; the inputs come from integers, so they are the same on every machine
//
// Two tables agree where their lines agree. Built for any architecture with the sources of csrc/.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/dispatch.h"
#include "kernels/pack.h"
#include "platform/memory.h"
#include "platform/threads.h"
#include "program/kv_cache.h"

using namespace edgeformer;

namespace {

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return uint32_t(state >> 33);
  }
  int32_t below(int32_t n) { return int32_t(next() % uint32_t(n)); }
  float value() { return float(int32_t(next() & 0xffffff) - 0x800000) * 0x1p-21f; }  // -4 .. 4
};

std::vector<float> floats(Random& random, int64_t n) {
  std::vector<float> x(static_cast<size_t>(n));
  for (auto& v : x) v = random.value();
  return x;
}

void print(const std::string& name, const void* data, size_t bytes) {
  uint64_t hash = 14695981039346656037ull;  // FNV-1a
  for (size_t i = 0; i < bytes; i++) hash = (hash ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211ull;
  std::printf("%s %016llx\n", name.c_str(), static_cast<unsigned long long>(hash));
}

void print(const std::string& name, const std::vector<float>& y) { print(name, y.data(), y.size() * 4); }

void linears(const Kernels& kernels) {
  static const int64_t sizes[][2] = {{1, 1}, {17, 33}, {33, 95}, {49, 800}, {35, 128}, {49, 1152}};
  static const int64_t rows[] = {1, 2, 3, 4, 5, 8, 9, 11, 18};
  for (int type = 0; type < kWeightTypes; type++) {
    for (const auto& [n, k] : sizes) {
      Random random = {uint64_t(type * 1000 + n * 7 + k)};
      const int64_t span = span_of(WeightType(type));
      const bool wide = span > kBlock;
      if (wide && k % span) continue;
      const int64_t block = type == int(WeightType::q8x16) ? 16 : span, groups = (k + block - 1) / block;
      std::vector<uint8_t> nibbles(size_t(n * k + 1) / 2 + 1);
      std::vector<int8_t> bytes(static_cast<size_t>(n * k));
      for (auto& v : nibbles) v = uint8_t(random.below(256));
      for (auto& v : bytes) v = int8_t(random.below(255) - 127);
      const std::vector<float> dense = floats(random, n * k);
      std::vector<float> scale(static_cast<size_t>(n * groups)), min(scale.size());
      for (auto& v : scale) v = float(random.below(2047) - 1023) * 0x1p-14f;  // exact in fp16
      for (auto& v : min) v = float(random.below(2047) - 1023) * 0x1p-10f;
      const bool is_nibbles = has_nibbles(WeightType(type)), is_f32 = type == int(WeightType::f32);
      PackSource source = {};
      source.q = is_f32       ? static_cast<const void*>(dense.data())
                 : is_nibbles ? static_cast<const void*>(nibbles.data())
                              : bytes.data();
      source.scale = scale.data(), source.min = min.data(), source.n = n, source.k = k, source.block = block;
      const size_t size = packed_bytes(WeightType(type), n, k);
      void* packed = pages_alloc(size);
      if (pack_rows(WeightType(type), source, 0, n, nullptr, packed).error != PackError::none)
        throw std::runtime_error("pack_rows failed");
      for (const int64_t m : rows) {
        const std::string name = std::string(kWeightTypeNames[type]) + " " + std::to_string(n) + "x" +
                                 std::to_string(k) + " m" + std::to_string(m);
        const std::vector<float> x = floats(random, m * k);
        std::vector<int8_t> xq(static_cast<size_t>(m * blocks_of(k) * kBlock));
        std::vector<XBlock> xb(static_cast<size_t>(m * blocks_of(k)));
        kernels.quantize({.x = x.data(),
                          .ldx = k,
                          .m = m,
                          .k = k,
                          .span = span,
                          .block_begin = 0,
                          .block_end = blocks_of(k),
                          .xq = xq.data(),
                          .xb = xb.data()});
        if (type == 0 || wide) print("quantize " + name, xq.data(), xq.size());
        if (type == 0 || wide) print("quantize scales " + name, xb.data(), xb.size() * sizeof(XBlock));
        std::vector<float> y(static_cast<size_t>(m * n));
        LinearArgs a = {packed, n, k, xq.data(), xb.data(), x.data(), k, m, y.data(), n};
        kernels.linear[type](a, 0, panels_of(n));
        print("linear " + name, y);
      }
      pages_free(packed, size);
    }
  }
}

void elementwise(const Kernels& kernels) {
  Random random = {42};
  std::vector<float> x = floats(random, 2000);
  for (size_t i = 0; i < 500; i++) x[i] *= 25;        // the tails
  for (size_t i = 500; i < 700; i++) x[i] *= 3e7f;    // sin and cos of large arguments
  for (size_t i = 700; i < 800; i++) x[i] *= 1e-39f;  // subnormals
  std::vector<float> positive = x;
  for (auto& v : positive) v = v < 0 ? -v : v + 1e-30f;
  for (int op = 0; op < int(Unary::count); op++) {
    const Unary u = Unary(op);
    const bool needs_positive = u == Unary::sqrt || u == Unary::log || u == Unary::rsqrt || u == Unary::reciprocal;
    std::vector<float> y(x.size());
    kernels.unary(u, needs_positive ? positive.data() : x.data(), y.data(), int64_t(x.size()));
    print("unary " + std::to_string(op), y);
  }
  for (const int64_t n : {1, 15, 16, 17, 100, 576}) {
    const std::string name = " n" + std::to_string(n);
    const int64_t wide = 2 * round_up(n, 16);
    const std::vector<float> in = floats(random, 3 * wide), weight = floats(random, wide), bias = floats(random, wide);
    std::vector<float> y(static_cast<size_t>(3 * n));
    const NormArgs norm = {.x = in.data(),
                           .ldx = wide,
                           .m = 3,
                           .n = n,
                           .weight = weight.data(),
                           .bias = bias.data(),
                           .eps = 1e-5f,
                           .y = y.data(),
                           .ldy = n};
    kernels.rms_norm(norm);
    print("rms_norm" + name, y);
    kernels.layer_norm(norm);
    print("layer_norm" + name, y);
    kernels.softmax(in.data(), wide, 3, n, y.data(), n);
    print("softmax" + name, y);
    GatedArgs gated = {in.data(), wide, 3, n, bias.data(), Unary::silu, y.data(), n};
    kernels.gated(gated);
    print("gated" + name, y);
    EpilogueArgs epilogue = {y.data(), n, 3, n, bias.data(), Unary::gelu, 0.3f, in.data(), wide};
    kernels.epilogue(epilogue);
    print("epilogue" + name, y);
  }
  for (const bool interleaved : {false, true}) {
    const std::vector<float> in = floats(random, 3 * 2 * 80), cos = floats(random, 3 * 19),
                             sin = floats(random, 3 * 19);
    std::vector<float> y(in.size());
    kernels.rope({.x = in.data(),
                  .ldx = 160,
                  .m = 3,
                  .heads = 2,
                  .head_dim = 80,
                  .rotary = 38,
                  .interleaved = interleaved,
                  .cos = cos.data(),
                  .sin = sin.data(),
                  .ldc = 19,
                  .y = y.data(),
                  .ldy = 160});
    print(interleaved ? "rope interleaved" : "rope half", y);
  }
}

void attention(const Kernels& kernels) {
  static const int64_t shapes[][4] = {{1, 1, 4, 4}, {2, 3, 64, 64}, {1, 5, 30, 17}, {1, 2, 128, 96}};
  for (const KvType type : {KvType::int8, KvType::float32}) {
    for (const auto& [heads, group, dim, value_dim] : shapes) {
      Random random = {uint64_t(heads * 100 + dim)};
      const std::string name = std::string(type == KvType::int8 ? " int8 " : " float32 ") + std::to_string(dim);
      const int64_t length = kChunkTokens + 21, tokens = 19;
      KvCache cache({{type, heads, dim, value_dim}}, 1000);
      cache.reserve(length);
      const std::vector<float> k = floats(random, length * heads * dim), v = floats(random, length * heads * value_dim);
      kernels.kv_append(
          {cache.layout(0), cache.chunks(0), 0, length, 0, heads, k.data(), heads * dim, v.data(), heads * value_dim});
      cache.advance(length);
      const std::vector<uint8_t> saved = cache.save();
      print("kv_append" + name, saved.data(), saved.size());
      const std::vector<float> q = floats(random, tokens * heads * group * dim);
      std::vector<int32_t> begin, end;
      for (int64_t i = 0; i < tokens; i++) {
        end.push_back(int32_t(length - tokens + 1 + i));
        begin.push_back(i % 3 ? 0 : end.back() - 40);
      }
      AttentionArgs a = {};
      a.layout = cache.layout(0), a.chunks = cache.chunks(0), a.group = group, a.tokens = tokens;
      a.q = q.data(), a.ldq = heads * group * dim, a.begin = begin.data(), a.end = end.data();
      a.scale = 0.125f, a.softcap = dim == 30 ? 4.0f : 0.0f;
      std::vector<float> out(static_cast<size_t>(tokens * heads * group * value_dim));
      a.out = out.data(), a.ldo = heads * group * value_dim;
      for (int64_t h = 0; h < heads; h++) kernels.attention(a, h, 0, tokens);
      print("attention" + name, out);
      const int64_t stride = tokens * group * partial_floats(a.layout);
      std::vector<float> partial(static_cast<size_t>(2 * stride));
      for (int64_t h = 0; h < heads; h++) {
        for (int64_t c = 0; c < 2; c++) kernels.attention_partial(a, h, 0, tokens, c, partial.data() + c * stride);
        kernels.attention_merge(a, h, 0, tokens, {.partial = partial.data(), .chunks = 2, .stride = stride});
      }
      print("attention" + name, out);  // the same name: both must give one hash
    }
  }
}

// A table has every kernel, and each one that is taken out is seen.
void completeness(const Kernels& kernels) {
  const auto check = [](const Kernels& table, const char* expected) {
    const char* found = null_kernel(table);
    if (std::string(found ? found : "") != expected) throw std::runtime_error(std::string("not seen: ") + expected);
  };
  check(kernels, "");
  Kernels lacking = kernels;
#define EDGEFORMER_CHECK(name) \
  lacking.name = nullptr;      \
  check(lacking, #name);       \
  lacking = kernels;
  EDGEFORMER_KERNELS(EDGEFORMER_CHECK)
#undef EDGEFORMER_CHECK
  for (int type = 0; type < kWeightTypes; type++) {
    lacking.linear[type] = nullptr;
    check(lacking, kWeightTypeNames[type]);
    lacking = kernels;
  }
}

void threads() {
  ThreadPool pool(3);
  std::vector<int64_t> done(500);
  auto begin = [&](int) -> int64_t { return 10; };
  auto work = [&](int p, int64_t c, int) { done[size_t(p * 10 + c)] += p + c; };
  pool.run(50, begin, work);
  print("threads", done.data(), done.size() * 8);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  try {
    if (!std::strcmp(argv[1], "--list")) {
      for (const auto& isa : usable_isas()) std::printf("%s\n", isa.c_str());
      return 0;
    }
    const Kernels kernels = kernels_for(argv[1]);
    completeness(kernels);
    linears(kernels);
    elementwise(kernels);
    attention(kernels);
    threads();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

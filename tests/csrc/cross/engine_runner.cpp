// Runs a dumped program (test_engine_cross.py) without Python and prints a hash of each call's output bits.
//
//   engine_runner FILE ISA THREADS     one line a call
//
// The file is a stream of little-endian int64, doubles, and bytes behind their count, in the order of `read` below: the
// program as the bindings get it, what was packed into each weight, then the calls, all of one state.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/dispatch.h"
#include "engine/engine.h"

using namespace edgeformer;

namespace {

class Reader {
 public:
  explicit Reader(const char* path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) throw std::runtime_error(std::string("cannot read ") + path);
    bytes_.assign(std::istreambuf_iterator<char>(in), {});
  }
  int64_t integer() { return plain<int64_t>(); }
  double number() { return plain<double>(); }
  std::vector<uint8_t> blob() {
    const size_t n = static_cast<size_t>(integer());
    const uint8_t* p = take(n);
    return std::vector<uint8_t>(p, p + n);
  }
  std::string text() {
    const auto b = blob();
    return std::string(b.begin(), b.end());
  }
  template <class T>
  std::vector<T> list() {
    std::vector<T> out;
    for (int64_t n = integer(); n > 0; n--) out.push_back(static_cast<T>(integer()));
    return out;
  }

 private:
  template <class T>
  T plain() {
    T value;
    std::memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }
  const uint8_t* take(size_t n) {
    if (n > bytes_.size() - at_) throw std::runtime_error("the dump is cut short");
    at_ += n;
    return bytes_.data() + at_ - n;
  }
  std::vector<uint8_t> bytes_;
  size_t at_ = 0;
};

ProgramSpec read(Reader& in, KvType kv) {
  ProgramSpec p;
  for (int64_t n = in.integer(); n > 0; n--) p.symbols.push_back(in.text());
  for (int64_t n = in.integer(); n > 0; n--) p.sizes.push_back({in.list<int64_t>()});
  for (int64_t n = in.integer(); n > 0; n--) {
    SlotSpec s;
    s.name = in.text();
    s.dtype = value_named(kDTypes, "slot type", in.text());
    s.shape = in.list<int>();
    s.view_of = static_cast<int>(in.integer());
    s.is_constant = in.integer() != 0;
    s.constant = in.blob();
    p.slots.push_back(std::move(s));
  }
  for (int64_t n = in.integer(); n > 0; n--) {
    const WeightType type = weight_type_named(in.text());
    const int64_t rows = in.integer();
    p.weights.push_back({type, rows, in.integer()});
  }
  for (int64_t n = in.integer(); n > 0; n--) {
    OpSpec op;
    op.kind = in.text();
    op.inputs = in.list<int>();
    op.outputs = in.list<int>();
    op.weights = in.list<int>();
    for (int64_t i = in.integer(); i > 0; i--) {
      const std::string name = in.text();
      op.ints[name] = in.list<int64_t>();
    }
    for (int64_t i = in.integer(); i > 0; i--) {
      auto& values = op.floats[in.text()];
      for (int64_t j = in.integer(); j > 0; j--) values.push_back(in.number());
    }
    for (int64_t i = in.integer(); i > 0; i--) {
      auto& values = op.names[in.text()];
      for (int64_t j = in.integer(); j > 0; j--) values.push_back(in.text());
    }
    for (int64_t i = in.integer(); i > 0; i--) {
      const std::string name = in.text();
      op.sizes[name] = in.list<int>();
    }
    p.ops.push_back(std::move(op));
  }
  for (int64_t n = in.integer(); n > 0; n--) {
    const auto c = in.list<int64_t>();
    p.caches.push_back({c.at(3) ? KvType::float32 : kv, c.at(0), c.at(1), c.at(2)});
  }
  p.inputs = in.list<int>();
  p.outputs = in.list<int>();
  p.row_local = in.integer() != 0;
  p.batch_symbol = static_cast<int>(in.integer());
  p.sequence_symbol = static_cast<int>(in.integer());
  p.kept_symbol = static_cast<int>(in.integer());
  p.past_symbol = static_cast<int>(in.integer());
  return p;
}

void pack(Reader& in, Engine& engine) {
  for (int64_t n = in.integer(); n > 0; n--) {
    const int weight = static_cast<int>(in.integer());
    const auto q = in.blob(), scale = in.blob(), min = in.blob();
    const int64_t rows = in.integer(), block = in.integer();
    const auto dest = in.list<int64_t>();
    const auto floats = [](const std::vector<uint8_t>& b) {
      return b.empty() ? nullptr : reinterpret_cast<const float*>(b.data());
    };
    const PackSource source = {q.data(), floats(scale), floats(min), rows, engine.spec().weights.at(weight).k, block};
    if (engine.pack(weight, source, dest.data()).error != PackError::none)
      throw std::runtime_error("a weight is refused");
  }
}

// One batch of one sequence: the symbols' values come from the dump, as the bindings would bind them.
void call(Reader& in, Engine& engine, State& state) {
  Call c;
  c.state = &state;
  c.rows = in.integer();
  c.logits_to_keep = in.integer();
  c.symbols = in.list<int64_t>();
  std::vector<std::vector<uint8_t>> inputs;
  for (int64_t n = in.integer(); n > 0; n--) inputs.push_back(in.blob());
  for (const auto& i : inputs) c.inputs.push_back(i.data());
  std::vector<std::vector<uint8_t>> outputs;
  std::vector<void*> memory;
  for (size_t o = 0; o < engine.spec().outputs.size(); o++) {
    size_t count = 4;  // outputs are float32
    for (const int64_t d : engine.output_shape(c, o)) count *= static_cast<size_t>(d);
    outputs.emplace_back(count);
  }
  for (auto& o : outputs) memory.push_back(o.data());
  std::vector<Call> calls = {c};
  const int64_t vocab = engine.output_shape(c, engine.logits_output()).back();
  const auto& logits = outputs.at(engine.logits_output());
  std::vector<int64_t> likeliest(logits.size() / 4 / vocab);
  engine.forward(calls, memory, likeliest.data(), nullptr);
  for (size_t row = 0; row < likeliest.size(); row++) {
    const float* x = reinterpret_cast<const float*>(logits.data()) + row * vocab;
    if (std::max_element(x, x + vocab) - x != likeliest[row]) throw std::runtime_error("another logit is the largest");
  }
  uint64_t hash = 14695981039346656037ull;  // FNV-1a
  for (const auto& o : outputs) {
    for (const uint8_t byte : o) hash = (hash ^ byte) * 1099511628211ull;
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(hash));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  try {
    Reader in(argv[1]);
    const KvType kv = in.integer() ? KvType::float32 : KvType::int8;
    ProgramSpec spec = read(in, kv);
    Engine engine(std::move(spec), kernels_for(argv[2]), std::atoi(argv[3]), 512, 512);
    pack(in, engine);
    State state;
    for (int64_t n = in.integer(); n > 0; n--) call(in, engine, state);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

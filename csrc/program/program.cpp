#include "program/program.h"

#include <algorithm>

namespace edgeformer {

int64_t SizeExpr::evaluate(const std::vector<int64_t>& symbols) const {
  int64_t stack[64];
  int top = 0;
  for (size_t i = 0; i + 1 < code.size(); i += 2) {
    const int64_t op = code[i], number = code[i + 1];
    if (op <= 1) {
      if (top == 64) throw std::logic_error("size expression too deep");
      stack[top++] = op == 0 ? number : symbols[number];
      continue;
    }
    const int64_t b = stack[--top], a = stack[top - 1];
    int64_t r = 0;
    switch (op) {
      case 2:
        r = a + b;
        break;
      case 3:
        r = a * b;
        break;
      case 4:
        if (b == 0) throw InputProblem("a size expression divides by zero: an input has an empty axis");
        r = a / b - ((a % b != 0) && ((a < 0) != (b < 0)));
        break;
      case 5:
        r = std::min(a, b);
        break;
      case 6:
        r = std::max(a, b);
        break;
      default:
        r = std::min(std::max<int64_t>(a < 0 ? a + b : a, 0), b);
    }
    stack[top - 1] = r;
  }
  return stack[0];
}

size_t Tensor::bytes() const {
  switch (dtype) {
    case DType::f32:
      return static_cast<size_t>(count) * 4;
    case DType::i64:
      return static_cast<size_t>(count) * 8;
    case DType::boolean:
      return static_cast<size_t>(count);
    case DType::quant:
    case DType::quant64:
    case DType::quant128: {
      const int64_t blocks = rows() * blocks_of(columns());
      return static_cast<size_t>(round_up(blocks * kBlock, 64)) + static_cast<size_t>(blocks) * sizeof(XBlock);
    }
  }
  return 0;
}

}  // namespace edgeformer

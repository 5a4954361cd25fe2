// Functions of one element that no fast path has: rounding, signs, tests, and the rarer activations.
#include <cmath>

#include "kernels/scalar/scalar_math.h"
#include "ops/ops.h"

namespace edgeformer {
namespace {

// 2^23 and larger floats are whole numbers. SSE2 and plain C have no rounding instruction, so it is written out.
bool is_whole(float x) { return !(std::fabs(x) < 8388608.0f); }

float below(float x) {  // the largest whole number <= x; keeps NaN, infinities and -0
  if (is_whole(x)) return x;
  const float t = static_cast<float>(static_cast<int32_t>(x));
  return with_sign(t > x ? t - 1.0f : t, x);
}

float nearest(float x) {  // halves to the even number
  if (is_whole(x)) return x;
  const float low = below(x), rest = x - low;
  const bool odd = (static_cast<int32_t>(low) & 1) != 0;
  return with_sign(rest > 0.5f || (rest == 0.5f && odd) ? low + 1.0f : low, x);
}

float expm1_of_negative(float x) { return exp1(min1(0.0f, x)) - 1.0f; }

// `a` and `b`: the operator's alpha and beta (or gamma).
float point(Point fn, float x, float a, float b) {
  switch (fn) {
    case Point::floor:
      return below(x);
    case Point::ceil:
      return -below(-x);
    case Point::round:
      return nearest(x);
    case Point::sign:
      return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x;
    case Point::leaky_relu:
      return x < 0.0f ? a * x : x;
    case Point::elu:
      return x < 0.0f ? a * expm1_of_negative(x) : x;
    case Point::selu:
      return b * (x > 0.0f ? x : a * expm1_of_negative(x));
    case Point::celu:
      return x < 0.0f ? a * expm1_of_negative(x / a) : x;
    case Point::hard_sigmoid:
      return max1(0.0f, min1(1.0f, a * x + b));
    case Point::hard_swish:
      return x * max1(0.0f, min1(1.0f, x / 6.0f + 0.5f));
    case Point::thresholded_relu:
      return x > a ? x : 0.0f;
    case Point::softsign:
      return x / (1.0f + std::fabs(x));
    case Point::mish:
      return x * tanh1(softplus1(x));
    case Point::swish:
      return x * sigmoid1(a * x);
    default:
      return x;
  }
}

// y[i] = fn(x[i]): floats; sign also of whole numbers; is_nan and is_inf give bools. For is_inf, a and b: whether -inf and
// inf count.
class Pointwise final : public ParallelOp {
 public:
  Pointwise(int index, const OpSpec& spec)
      : ParallelOp(index, spec),
        fn_(value_named(kPoints, "function", spec.name("fn"))),
        a_(static_cast<float>(spec.floats.at("numbers")[0])),
        b_(static_cast<float>(spec.floats.at("numbers")[1])) {}

 protected:
  int64_t units(const Run& run) const override { return out(run, 0).count; }
  int64_t unit_cost(const Run&) const override { return 4; }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const Tensor &x = in(run, 0), &y = out(run, 0);
    for (int64_t i = begin; i < end; ++i) {
      if (y.dtype == DType::boolean) {
        y.boolean()[i] = test(x.f32()[i]);
      } else if (y.dtype == DType::i64) {
        y.i64()[i] = (x.i64()[i] > 0) - (x.i64()[i] < 0);
      } else {
        y.f32()[i] = point(fn_, x.f32()[i], a_, b_);
      }
    }
  }

 private:
  bool test(float x) const {
    if (fn_ == Point::is_nan) return std::isnan(x);
    return std::isinf(x) && (x < 0.0f ? a_ != 0.0f : b_ != 0.0f);
  }

  const Point fn_;
  const float a_, b_;
};

}  // namespace

std::unique_ptr<Op> make_pointwise_op(int index, const OpSpec& spec) {
  if (spec.kind == "pointwise") return std::make_unique<Pointwise>(index, spec);
  return nullptr;
}

}  // namespace edgeformer

// A plan: the operations of a whole model in a list, so that one call runs them all. It is made by plan.py, once; what
// changes from run to run is the number of new rows and the position of the first.
#include <cstring>
#include <vector>

#include "lockstep/kernels.hpp"

using lockstep::Table;
using std::int64_t;
using std::size_t;

namespace {

// The numbers are those of Operation in plan.py.
enum class Operation : int64_t {
  kGather = 0,
  kAdd = 1,
  kMultiply = 2,
  kLayerNorm = 3,
  kRmsNorm = 4,
  kRotary = 5,
  kApply = 6,
  kRelu = 7,
  kQuantise = 8,
  kLinear = 9,
  kKeep = 10,
  kAttention = 11,
};

// A value: a row for each new token, for the last one alone, or (bytes = 0) one that stands for every token.
struct Rows {
  char* base;
  size_t bytes;   // from row to row
  int64_t whole;  // whether there is a row for each new token
};

constexpr size_t kOperands = 2, kTensors = 6, kSizes = 7, kNumbers = 2;

struct Step {
  Operation operation;
  int64_t last;  // whether only the row of the last token is computed
  Rows in[kOperands], out[kOperands];
  const void* tensor[kTensors];
  int64_t size[kSizes];
  double number[kNumbers];
};

class Run {
 public:
  Run(size_t fresh, size_t first) : fresh_(fresh), first_(first), positions_(fresh) {
    for (size_t i = 0; i < fresh; ++i) positions_[i] = static_cast<int64_t>(first + i);
  }

  void operator()(const Step& step) {
    step_ = &step;
    rows_ = step.last ? 1 : fresh_;
    switch (step.operation) {
      case Operation::kGather: return gather();
      case Operation::kAdd: return pairs(lockstep_add);
      case Operation::kMultiply: return pairs(lockstep_multiply);
      case Operation::kLayerNorm:
        return lockstep_layer_norm(tensor<Table>(2), rows_, size(0), in<float>(0), tensor<float>(0), tensor<float>(1),
                                   number(0), number(1), out<float>(0));
      case Operation::kRmsNorm:
        return lockstep_rms_norm(tensor<Table>(2), rows_ * size(1), size(0), in<float>(0), tensor<float>(0), number(0),
                                 number(1), out<float>(0));
      case Operation::kRotary: {
        const size_t at = (first_ + fresh_ - rows_) * size(2);
        return lockstep_rotary(rows_, size(0), size(1), size(2), static_cast<int>(size(3)), in<float>(0),
                               tensor<float>(0) + at, tensor<float>(1) + at, out<float>(0));
      }
      case Operation::kApply: return lockstep_apply(tensor<Table>(0), rows_ * size(0), in<float>(0), out<float>(0));
      case Operation::kRelu: return lockstep_relu(rows_ * size(0), in<float>(0), out<float>(0));
      case Operation::kQuantise:
        return lockstep_quantise_rows(tensor<Table>(0), rows_, size(0), in<float>(0), tensor<float>(1),
                                      out<std::uint8_t>(0), out<float>(1));
      case Operation::kLinear:
        return lockstep_linear(rows_, size(0), size(1), in<std::int8_t>(0), in<float>(1), tensor<std::uint8_t>(0),
                               tensor<float>(1), tensor<float>(2), out<float>(0));
      case Operation::kKeep: return keep();
      case Operation::kAttention: return attend();
    }
  }

 private:
  size_t size(size_t i) const { return static_cast<size_t>(step_->size[i]); }
  float number(size_t i) const { return static_cast<float>(step_->number[i]); }
  template <class T>
  const T* tensor(size_t i) const { return static_cast<const T*>(step_->tensor[i]); }
  template <class T>
  T* kept(size_t i) const { return static_cast<T*>(const_cast<void*>(step_->tensor[i])); }
  template <class T>
  T* at(const Rows& value) const {
    return reinterpret_cast<T*>(value.base + (value.whole ? (fresh_ - rows_) * value.bytes : 0));
  }
  template <class T>
  const T* in(size_t i) const { return at<const T>(step_->in[i]); }
  template <class T>
  T* out(size_t i) const { return at<T>(step_->out[i]); }

  void gather() const {
    const auto* index = in<int64_t>(0);
    const auto* table = tensor<char>(0);
    char* to = out<char>(0);
    for (size_t r = 0; r < rows_; ++r, to += size(0))
      std::memcpy(to, table + static_cast<size_t>(index[r]) * size(0), size(0));
  }

  // Caches are [heads][capacity][d], scales [heads][capacity]: what one head reads lies together.
  static lockstep::CacheLayout layout(size_t capacity, size_t d) { return {d, capacity * d, 1, capacity}; }

  void keep() const {
    const size_t heads = size(0), d = size(1);
    const lockstep::CacheLayout there = layout(size(2), d);
    lockstep_keep(tensor<Table>(0), rows_, heads, d, in<float>(0), &there, kept<std::uint8_t>(1) + first_ * d,
                  kept<float>(2) + first_);
  }

  void attend() const {
    const lockstep::CacheLayout there = layout(size(6), size(2));
    lockstep_attention(tensor<Table>(0), tensor<Table>(1), rows_, first_ + fresh_, size(0), size(1), size(2), size(3),
                       number(0), static_cast<int>(size(4)), step_->size[5], positions_.data() + (fresh_ - rows_),
                       in<float>(0), tensor<std::int8_t>(2), tensor<float>(3), tensor<std::int8_t>(4),
                       tensor<float>(5), &there, nullptr, nullptr, out<float>(0));
  }

  template <class Function>
  void pairs(Function function) const {
    const auto stride = [](const Rows& value) { return value.bytes / sizeof(float); };
    function(rows_, size(0), in<float>(0), stride(step_->in[0]), in<float>(1), stride(step_->in[1]), out<float>(0));
  }

  size_t fresh_, first_, rows_ = 0;
  std::vector<int64_t> positions_;
  const Step* step_ = nullptr;
};

}  // namespace

// Runs the steps for `fresh` new rows, the first of which is at position `first`.
extern "C" void lockstep_run(const Step* steps, size_t count, size_t fresh, size_t first) {
  Run run(fresh, first);
  for (size_t i = 0; i < count; ++i) run(steps[i]);
}

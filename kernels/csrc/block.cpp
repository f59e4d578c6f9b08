// A pre-norm transformer block in one call, by the kernels of the other files: norm, qkv, attention, projection; norm, fc1,
// GELU, fc2. After a product the interpreter's own code has left the caches, so that the way from one call to the next is long.
#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "activation.h"
#include "add_norm.h"
#include "attention.h"
#include "linear.h"
#include "tensor.h"

#pragma weak aoti_record_function_start  // absent: kernels have no names
#pragma weak aoti_record_function_end

#ifdef COHOBATE_X86
namespace cohobate {
namespace {

using Tensors = std::vector<Tensor>;

// What torch's profiler shows of a kernel inside the call.
class Named {
 public:
  explicit Named(const char* name) {
    if (aoti_record_function_start && aoti_record_function_end) aoti_record_function_start(name, nullptr, nullptr, 0, &handle_);
  }
  ~Named() {
    if (handle_) aoti_record_function_end(handle_);
  }
  Named(const Named&) = delete;
  Named& operator=(const Named&) = delete;

 private:
  AtenRecordFunctionHandle handle_ = nullptr;
};

struct Sizes {
  int64_t batch, length, width, hidden, heads;
  int64_t rows() const { return batch * length; }
};

template <class T>
const T* read(const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }

template <class T>
T* write(Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }

const float* read(const std::optional<Tensor>& x) { return x ? read<float>(*x) : nullptr; }

// Consecutive parts of one tensor.
class Parts {
 public:
  explicit Parts(Tensor& whole)
      : next_(static_cast<char*>(whole.mutable_data_ptr())), end_(next_ + whole.numel() * whole.element_size()) {}

  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(next_);
    next_ += count * sizeof(T);
    STD_TORCH_CHECK(next_ <= end_, "block: expected a larger workspace");
    return part;
  }

 private:
  char *next_, *end_;
};

// A stream and a branch that is added to it first, or null.
struct Stream {
  const void* x;
  Dtype dtype;
  const bf16* branch;
  const float* factor;
};

struct Affine {
  const float *weight, *bias;
};

void norm(const Sizes& s, const Stream& in, Affine affine, double eps, void* sum, bf16* normed, float* stats) {
  Named named("cohobate::add_norm");
  const int64_t batch_stride = s.length * s.width;
  COHOBATE_DISPATCH(add_norm)
  ({{s.batch, s.length, s.width}, {in.x, in.dtype, batch_stride, s.width}, {in.branch, Dtype::bf16, batch_stride, s.width},
    in.factor, affine.weight, affine.bias, static_cast<float>(eps), 1.0f, in.branch ? sum : nullptr, normed, NormOut::bf16,
    stats, stats + s.rows()});
}

Heads head_rows(bf16* data, const Sizes& s, int64_t parts, int64_t part) {
  return {data + part * s.width, s.length * parts * s.width, parts * s.width, s.width / s.heads};
}

AttentionShape attention_shape(const Sizes& s) {
  const int64_t dim = s.width / s.heads;
  return {s.batch, s.heads, s.length, s.length, dim, static_cast<float>(std::pow(dim, -0.5)), Dtype::bf16};
}

void attend(const Sizes& s, bf16* qkv, bf16* out) {
  Named named("cohobate::short_attention");
  COHOBATE_DISPATCH(attention)
  (attention_shape(s), head_rows(qkv, s, 3, 0), head_rows(qkv, s, 3, 1), head_rows(qkv, s, 3, 2), head_rows(out, s, 1, 0));
}

// What is kept for the backward pass, in the order in which it is written.
struct Kept {
  float *stats1, *stats2;
  bf16 *normed1, *qkv, *heads, *normed2, *hidden, *activated;

  Kept(Tensor& memory, const Sizes& s) {
    Parts parts(memory);
    const int64_t rows = s.rows();
    stats1 = parts.take<float>(2 * rows), stats2 = parts.take<float>(2 * rows);
    normed1 = parts.take<bf16>(rows * s.width), qkv = parts.take<bf16>(rows * 3 * s.width);
    heads = parts.take<bf16>(rows * s.width), normed2 = parts.take<bf16>(rows * s.width);
    hidden = parts.take<bf16>(rows * s.hidden), activated = parts.take<bf16>(rows * s.hidden);
  }
};

struct Linear {
  const float *weight, *bias;
  int64_t inputs, outputs;

  void forward(const bf16* x, bf16* out, int64_t rows) const {
    Named named("cohobate::linear");
    avx512bf16::linear(x, weight, bias, out, rows, inputs, outputs);
  }

  // dx is what the next kernel reads, so it comes last.
  void backward(const bf16* grad, const bf16* x, bf16* dx, float* dweight, float* dbias, int64_t rows) const {
    Named named("cohobate::linear_backward");
    avx512bf16::linear_dw(grad, x, dweight, dbias, rows, inputs, outputs);
    avx512bf16::linear_dx(grad, weight, dx, rows, inputs, outputs);
  }
};

// The parameters in the order of the module: norm1, qkv, proj, norm2, fc1, fc2, weight and bias of each.
struct Parameters {
  Affine norm1, norm2;
  Linear qkv, proj, fc1, fc2;

  Parameters(const Tensors& p, const Sizes& s)
      : norm1{read<float>(p[0]), read<float>(p[1])},
        norm2{read<float>(p[6]), read<float>(p[7])},
        qkv{read<float>(p[2]), read<float>(p[3]), s.width, 3 * s.width},
        proj{read<float>(p[4]), read<float>(p[5]), s.width, s.width},
        fc1{read<float>(p[8]), read<float>(p[9]), s.width, s.hidden},
        fc2{read<float>(p[10]), read<float>(p[11]), s.hidden, s.width} {}
};

BiasGelu gelu(const Sizes& s, const bf16* hidden, const std::vector<float>& zeros) {
  return {hidden, Dtype::bf16, s.hidden, s.rows(), s.hidden, zeros.data(), false};
}

Sizes sizes_of(const Tensor& x, int64_t hidden, int64_t heads) {
  STD_TORCH_CHECK(isa() == Isa::avx512bf16, "block: expected a processor with avx512_bf16");
  return {x.size(0), x.size(1), x.size(2), hidden, heads};
}

void block(const Tensor& x, const std::optional<Tensor>& branch, const std::optional<Tensor>& factor,
           const std::optional<Tensor>& drop, const Tensors& weights, int64_t heads, double eps, std::optional<Tensor> first,
           Tensor kept_memory, Tensor sum, Tensor out) {
  const Sizes s = sizes_of(x, weights[8].size(0), heads);
  const Parameters p(weights, s);
  const Kept kept(kept_memory, s);
  const Dtype dtype = dtype_of(x);
  const std::vector<float> zeros(s.hidden);
  const void* x1 = first ? first->const_data_ptr() : x.const_data_ptr();
  bf16* branch1 = write<bf16>(out);  // until fc2 writes it
  norm(s, {x.const_data_ptr(), dtype, branch ? read<bf16>(*branch) : nullptr, read(factor)}, p.norm1, eps,
       first ? first->mutable_data_ptr() : nullptr, kept.normed1, kept.stats1);
  p.qkv.forward(kept.normed1, kept.qkv, s.rows());
  attend(s, kept.qkv, kept.heads);
  p.proj.forward(kept.heads, branch1, s.rows());
  norm(s, {x1, dtype, branch1, read(drop)}, p.norm2, eps, sum.mutable_data_ptr(), kept.normed2, kept.stats2);
  p.fc1.forward(kept.normed2, kept.hidden, s.rows());
  {
    Named named("cohobate::bias_gelu");
    COHOBATE_DISPATCH(bias_gelu)(gelu(s, kept.hidden, zeros), kept.activated, false, 1.0f);
  }
  p.fc2.forward(kept.activated, write<bf16>(out), s.rows());
}

void norm_backward(const Sizes& s, const void* grad_sum, const bf16* grad_normed, const void* sum, Dtype dtype,
                   const float* stats, const float* factor, const float* weight, int64_t chunk, void* dx, bf16* dbranch,
                   float* affine) {
  Named named("cohobate::add_norm_backward");
  const int64_t batch_stride = s.length * s.width;
  COHOBATE_DISPATCH(add_norm_backward)
  ({{s.batch, s.length, s.width}, {grad_sum, dtype, batch_stride, s.width}, {grad_normed, Dtype::bf16, batch_stride, s.width},
    {sum, dtype, batch_stride, s.width}, stats, stats + s.rows(), factor, weight, dx, dbranch, Dtype::bf16, chunk, affine});
}

// gradients: of the weights of qkv, proj, fc1, fc2, and of the other parameters in one tensor, in the order of the module.
void block_backward(const std::optional<Tensor>& grad_sum, const Tensor& grad_out, const Tensor& first, const Tensor& sum,
                    Tensor kept_memory, const Tensors& weights, const std::optional<Tensor>& factor,
                    const std::optional<Tensor>& drop, int64_t heads, int64_t chunk, Tensor scratch, Tensor dx,
                    std::optional<Tensor> dbranch, Tensors gradients) {
  const Sizes s = sizes_of(sum, weights[8].size(0), heads);
  const Parameters p(weights, s);
  const Kept kept(kept_memory, s);
  const Dtype dtype = dtype_of(sum);
  const int64_t rows = s.rows(), width = s.width;
  const std::vector<float> zeros(s.hidden);

  Parts parts(gradients[4]);
  float *dnorm1 = parts.take<float>(2 * width), *dqkv_bias = parts.take<float>(3 * width), *dproj_bias = parts.take<float>(width);
  float *dnorm2 = parts.take<float>(2 * width), *dfc1_bias = parts.take<float>(s.hidden), *dfc2_bias = parts.take<float>(width);

  Parts space(scratch);
  char* dsum = space.take<char>(rows * width * (dtype == Dtype::f32 ? 4 : 2));
  bf16 *narrow = space.take<bf16>(rows * width), *branch1 = space.take<bf16>(rows * width);
  bf16* wide = space.take<bf16>(rows * std::max(s.hidden, 3 * width));

  p.fc2.backward(read<bf16>(grad_out), kept.activated, wide, write<float>(gradients[3]), dfc2_bias, rows);
  {
    Named named("cohobate::bias_gelu_backward");
    COHOBATE_DISPATCH(bias_gelu_backward)(gelu(s, kept.hidden, zeros), wide, s.hidden, wide, chunk, nullptr);
  }
  p.fc1.backward(wide, kept.normed2, narrow, write<float>(gradients[2]), dfc1_bias, rows);
  norm_backward(s, grad_sum ? grad_sum->const_data_ptr() : nullptr, narrow, sum.const_data_ptr(), dtype, kept.stats2, read(drop),
                p.norm2.weight, chunk, dsum, branch1, dnorm2);
  p.proj.backward(branch1, kept.heads, narrow, write<float>(gradients[1]), dproj_bias, rows);
  {
    Named named("cohobate::short_attention_backward");
    COHOBATE_DISPATCH(attention_backward)
    (attention_shape(s), head_rows(kept.qkv, s, 3, 0), head_rows(kept.qkv, s, 3, 1), head_rows(kept.qkv, s, 3, 2),
     head_rows(narrow, s, 1, 0), head_rows(wide, s, 3, 0), head_rows(wide, s, 3, 1), head_rows(wide, s, 3, 2));
  }
  p.qkv.backward(wide, kept.normed1, narrow, write<float>(gradients[0]), dqkv_bias, rows);
  norm_backward(s, dsum, narrow, first.const_data_ptr(), dtype, kept.stats1, read(factor), p.norm1.weight, chunk,
                dx.mutable_data_ptr(), dbranch ? write<bf16>(*dbranch) : nullptr, dnorm1);
}

// Several blocks; weights: qkv, proj, fc1, fc2 of each as linear_pack lays them out, the norms' own parameters inside. `first`
// (may be absent): the stream with `branch` added. The stream lies in `sum` and the branch in `out` from block to block.
void blocks_packed(const Tensor& x, const std::optional<Tensor>& branch, const Tensors& weights, const Tensors& biases,
                   int64_t activation, int64_t heads, double eps, std::optional<Tensor> first, Tensor scratch, Tensor sum,
                   Tensor out) {
  const Sizes s = sizes_of(x, biases[2].size(0), heads);
  const int64_t rows = s.rows();
  const Dtype dtype = dtype_of(x);
  const auto none = avx512bf16::Activation::none;
  Parts space(scratch);
  float* stats = space.take<float>(2 * rows);
  bf16 *narrow = space.take<bf16>(rows * s.width), *wide = space.take<bf16>(rows * std::max(s.hidden, 3 * s.width));
  const void* stream = x.const_data_ptr();
  const bf16* added = branch ? read<bf16>(*branch) : nullptr;
  void* summed = (first ? *first : sum).mutable_data_ptr();
  for (size_t i = 0; i < weights.size(); i += 4) {
    const auto product = [&](int j, const bf16* from, avx512bf16::Activation act, bf16* to, int64_t inputs, int64_t outputs) {
      Named named("cohobate::linear");
      avx512bf16::linear_packed(from, read<uint32_t>(weights[i + j]), read<bf16>(biases[i + j]), act, to, rows, inputs, outputs);
    };
    norm(s, {stream, dtype, added, nullptr}, {}, eps, summed, narrow, stats);
    if (added) stream = summed;
    product(0, narrow, none, wide, s.width, 3 * s.width);
    attend(s, wide, narrow);
    product(1, narrow, none, write<bf16>(out), s.width, s.width);
    norm(s, {stream, dtype, read<bf16>(out), nullptr}, {}, eps, sum.mutable_data_ptr(), narrow, stats);
    product(2, narrow, static_cast<avx512bf16::Activation>(activation), wide, s.width, s.hidden);
    product(3, wide, none, write<bf16>(out), s.hidden, s.width);
    stream = summed = sum.mutable_data_ptr();
    added = read<bf16>(out);
  }
}

}  // namespace
}  // namespace cohobate
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(cohobate_native, m) {
  m.def(
      "block(Tensor x, Tensor? branch, Tensor? factor, Tensor? drop, Tensor[] weights, int heads, float eps, "
      "Tensor(a!)? first, Tensor(b!) kept, Tensor(c!) sum, Tensor(d!) out) -> ()");
  m.def(
      "block_backward(Tensor? grad_sum, Tensor grad_out, Tensor first, Tensor sum, Tensor kept, Tensor[] weights, "
      "Tensor? factor, Tensor? drop, int heads, int chunk, Tensor(a!) scratch, Tensor(b!) dx, Tensor(c!)? dbranch, "
      "Tensor(d!)[] gradients) -> ()");
  m.def(
      "blocks_packed(Tensor x, Tensor? branch, Tensor[] weights, Tensor[] biases, int activation, int heads, float eps, "
      "Tensor(a!)? first, Tensor(b!) scratch, Tensor(c!) sum, Tensor(d!) out) -> ()");
}

#ifdef COHOBATE_X86
STABLE_TORCH_LIBRARY_IMPL(cohobate_native, CPU, m) {
  m.impl("block", TORCH_BOX(&cohobate::block));
  m.impl("block_backward", TORCH_BOX(&cohobate::block_backward));
  m.impl("blocks_packed", TORCH_BOX(&cohobate::blocks_packed));
}
#endif

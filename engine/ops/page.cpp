// Transfers between the arena and memory of the host that the device can reach (Backend::
// allocate_host). Neither op is differentiable.
//
//   page_in   y = page
//   page_out  page = x; an update
//
// They are all that a backend needs to know of paging: where their results lie and how long is the
// plan's business, and on a device they run beside the kernels.
#include "engine/ops.h"
#include "engine/ops/check.h"

namespace nibble {

Tensor page_in(Tensor page) { return check::graph_of(page, "page_in").emit(OpId::page_in, {page}); }
Tensor page_out(Tensor page, Tensor x) {
  return check::graph_of(page, "page_out").emit(OpId::page_out, {page, x});
}

namespace {

void check_page(const InferArgs& args) {
  const DType d = check::in(args, 0).dtype;
  if (d == DType::I8 || d == DType::I32 || d == DType::I64) {
    check::fail(args, 0, "page", "floating point, quantized or U8 elements");
  }
}

void infer_page_in(InferArgs& args) {
  check::count(args, 1);
  check_page(args);
  args.outputs[0] = check::in(args, 0);
}

void infer_page_out(InferArgs& args) {
  check::count(args, 2);
  check_page(args);
  check::shape(args, 0, "page", check::in(args, 1).shape, "the shape of x");
  if (!(check::in(args, 0) == check::in(args, 1))) {
    check::fail(args, 0, "page", "the type of x, " + check::in(args, 1).str());
  }
  args.outputs[0] = check::in(args, 0);
}

void reference_page_in(const ReferenceArgs& args) { args.out[0] = args.in[0]; }
void reference_page_out(const ReferenceArgs& args) { args.out[0] = args.in[1]; }

using Role = Sample::Role;

Sample sample_page_in(std::string_view label, Role role, Shape shape) {
  return {
      label, {{role, shape}}, [](Graph&, std::span<const Tensor> in) { return page_in(in[0]); }};
}
Sample sample_page_out(std::string_view label, Role page, Role x, Shape shape) {
  return {label, {{page, shape}, {x, shape}}, [](Graph&, std::span<const Tensor> in) {
            return page_out(in[0], in[1]);
          }};
}

std::vector<Sample> samples_page_in() {
  return {sample_page_in("state", Role::state, {3 * 4096}),
          sample_page_in("odd size", Role::cache, {3, 5})};
}
std::vector<Sample> samples_page_out() {
  return {sample_page_out("state", Role::state, Role::constant, {3 * 4096}),
          sample_page_out("odd size", Role::cache, Role::activation, {3, 5})};
}

}  // namespace

extern const OpDef page_in_op{.name = "page_in",
                              .infer = infer_page_in,
                              .reference = reference_page_in,
                              .samples = samples_page_in};
extern const OpDef page_out_op{.name = "page_out",
                               .infer = infer_page_out,
                               .reference = reference_page_out,
                               .samples = samples_page_out,
                               .updates = 0b01};

}  // namespace nibble

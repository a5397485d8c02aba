// The one schema block. Kernels register beside their code: prune.cpp, sparse.cpp, bitmap.cpp,
// value_stream.cpp, *_cuda.cpp.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(wanda_ext, m) {
  m.def("input_sumsq_(Tensor(a!) acc, Tensor x, Tensor? keep=None) -> ()");
  m.def(
      "prune_rows_(Tensor(a!) weight, Tensor? input_norm, int n_prune, Tensor(b!)? bad=None) "
      "-> ()");
  m.def(
      "prune_nm_(Tensor(a!) weight, Tensor? input_norm, int keep, int group, "
      "Tensor(b!)? bad=None) -> ()");
  m.def("pack_24(Tensor weight, Tensor(a!)? bad=None) -> (Tensor, Tensor)");
  m.def("unpack_24(Tensor values, Tensor meta, int order) -> Tensor");
  m.def("order_meta_24(Tensor meta, int n, int k, int src, int dst) -> Tensor");
  m.def("linear_24(Tensor x, Tensor values, Tensor meta, int order, Tensor? bias=None) -> Tensor");
  m.def("pack_bitmap(Tensor weight, Tensor(a!)? bad=None) -> (Tensor, Tensor)");
  m.def(
      "unpack_bitmap(Tensor values, Tensor mask, int n, int k, Tensor? surplus_rows=None, "
      "Tensor? surplus_columns=None, Tensor? surplus_values=None) -> Tensor");
  m.def(
      "linear_bitmap(Tensor x, Tensor values, Tensor mask, int n, Tensor? bias=None, "
      "Tensor? surplus_rows=None, Tensor? surplus_columns=None, Tensor? surplus_values=None) "
      "-> Tensor");
  m.def("pack_stream(Tensor weight, int count) -> (Tensor, Tensor, Tensor)");
  m.def("unpack_stream(Tensor values, Tensor mask, Tensor offsets, int k) -> Tensor");
  m.def(
      "linear_stream(Tensor x, Tensor values, Tensor mask, Tensor offsets, Tensor? bias=None) "
      "-> Tensor");
}

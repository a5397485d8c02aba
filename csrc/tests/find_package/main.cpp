// Prunes one row of four weights by magnitude to 2:4, through nothing but the installed library.
#include <cstdio>

#include "wanda_ext/ops.h"

int main() {
  float weight[4] = {1, -4, 3, 2};
  const wanda_ext::MatrixView view = {weight, 1, 4, 4, wanda_ext::DType::kFloat32};
  const wanda_ext::Status status =
      wanda_ext::prune_nm(view, nullptr, 2, 4, nullptr, wanda_ext::std_threads(2));
  std::printf("%s [%g %g %g %g]\n", status.message, weight[0], weight[1], weight[2], weight[3]);
  const bool right = weight[0] == 0 && weight[1] == -4 && weight[2] == 3 && weight[3] == 0;
  return status.ok() && right ? 0 : 1;
}

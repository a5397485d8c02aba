// The pruning ops on a device: the bits of the same ops on the CPU, and prune_pack_24 beside a
// copy.
//
//   pruning --check      every op once, bf16 and fp16, against the CPU, bit for bit
//   pruning --profile    the same without the CPU, each between cudaProfilerStart and
//                        cudaProfilerStop
//   pruning              times the fused 2:4 prune + pack beside a device-to-device copy of as many
//                        bytes as it reads and writes; ../bench_prune_cuda.py times the others
//
// options.h has the other options. Prints a line of JSON for each shape and dtype; what is wrong is
// recorded.
#include <functional>
#include <thread>

#include "harness.h"
#include "options.h"
#include "wanda_ext/ops.h"

namespace {

using bench::Bits;
using bench::check;
using bench::DeviceArray;
using bench::Entrant;
using bench::Options;
using bench::Shape;
using bench::Work;
using wanda_ext::ConstMatrixView;
using wanda_ext::DType;
using wanda_ext::MatrixView;
using wanda_ext::MetaOrder;
using wanda_ext::ParallelFor;
using wanda_ext::Status;
namespace cuda = wanda_ext::cuda;

Options defaults(Work work) {
  Options options;
  options.dtypes = {DType::kBFloat16};
  options.shapes = {{4096, 4096}};
  if (work == Work::kCheck) {
    options.shapes = {{136, 272}, {520, 2064}, {4096, 4096}, {64, 28672}};
    options.dtypes.push_back(DType::kFloat16);
  } else if (work == Work::kTime) {
    options.shapes = {{4096, 4096}, {11008, 4096}, {4096, 11008}};
  }
  return options;
}

// Everything an op may write: of one place, the host or the device.
struct Buffers {
  Bits* weight;
  Bits* values;
  std::int16_t* meta;
  double* sums;
  std::int32_t* bad;
  void* workspace;
};

// The same work on the device and on the CPU.
struct Op {
  const char* name;
  std::function<Status(const Buffers&, const float* norm, cudaStream_t)> on_device;
  std::function<Status(const Buffers&, const float* norm, const ParallelFor&)> on_cpu;
};

struct Problem {
  Shape shape;
  DType dtype;
  std::size_t elements, words;

  Problem(Shape shape, DType dtype)
      : shape(shape),
        dtype(dtype),
        elements(static_cast<std::size_t>(shape.n * shape.k)),
        words(elements / wanda_ext::kColumnsPerMeta) {}

  MatrixView view(Bits* weight) const { return {weight, shape.n, shape.k, shape.k, dtype}; }

  std::vector<Op> ops() const {
    std::vector<Op> all;
    all.push_back({"prune_rows",
                   [this](const Buffers& to, const float* norm, cudaStream_t stream) {
                     return cuda::prune_rows(view(to.weight), norm, shape.k / 2, to.bad, stream);
                   },
                   [this](const Buffers& to, const float* norm, const ParallelFor& parallel) {
                     return wanda_ext::prune_rows(view(to.weight), norm, shape.k / 2, to.bad,
                                                  to.workspace, parallel);
                   }});
    const auto prune_nm = [this, &all](const char* name, int keep, int group) {
      if (shape.k % group != 0) return;
      all.push_back(
          {name,
           [this, keep, group](const Buffers& to, const float* norm, cudaStream_t stream) {
             return cuda::prune_nm(view(to.weight), norm, keep, group, to.bad, stream);
           },
           [this, keep, group](const Buffers& to, const float* norm, const ParallelFor& parallel) {
             return wanda_ext::prune_nm(view(to.weight), norm, keep, group, to.bad, parallel);
           }});
    };
    prune_nm("prune_nm 2:4", 2, 4);
    prune_nm("prune_nm 4:8", 4, 8);
    prune_nm("prune_nm 16:32", 16, 32);
    const auto prune_then_pack = [this](const Buffers& to, const float* norm,
                                        const ParallelFor& parallel, bool keeps_weight) {
      std::vector<Bits> pruned(to.weight, to.weight + elements);
      Bits* weight = keeps_weight ? pruned.data() : to.weight;
      Status status = wanda_ext::prune_nm(view(weight), norm, 2, 4, to.bad, parallel);
      if (!status.ok()) return status;
      return wanda_ext::pack_24(view(weight), to.values, to.meta, to.bad, parallel);
    };
    all.push_back({"prune_pack_24",
                   [this](const Buffers& to, const float* norm, cudaStream_t stream) {
                     return cuda::prune_pack_24(view(to.weight), norm, to.values, to.meta, to.bad,
                                                stream);
                   },
                   [=](const Buffers& to, const float* norm, const ParallelFor& parallel) {
                     return prune_then_pack(to, norm, parallel, true);
                   }});
    all.push_back({"pack_24 and unpack_24",
                   [this](const Buffers& to, const float* norm, cudaStream_t stream) {
                     Status status = cuda::prune_nm(view(to.weight), norm, 2, 4, nullptr, stream);
                     if (!status.ok()) return status;
                     status = cuda::pack_24(view(to.weight), to.values, to.meta, to.bad, stream);
                     if (!status.ok()) return status;
                     return cuda::unpack_24(to.values, to.meta, MetaOrder::kCanonical,
                                            view(to.weight), stream);
                   },
                   [=](const Buffers& to, const float* norm, const ParallelFor& parallel) {
                     return prune_then_pack(to, norm, parallel, false);
                   }});
    all.push_back({"input_sumsq",
                   [this](const Buffers& to, const float*, cudaStream_t stream) {
                     return cuda::input_sumsq(to.sums, view(to.weight), nullptr, to.workspace,
                                              stream);
                   },
                   [this](const Buffers& to, const float*, const ParallelFor& parallel) {
                     return wanda_ext::input_sumsq(to.sums, view(to.weight), nullptr, parallel);
                   }});
    return all;
  }
};

// The device's buffers, the weight and the norms they start from, and what they hold at the end.
struct OnDevice {
  const Problem& problem;
  DeviceArray<Bits> pristine, weight, values;
  DeviceArray<std::int16_t> meta;
  DeviceArray<double> sums;
  DeviceArray<float> norm;
  DeviceArray<std::int32_t> bad;
  DeviceArray<char> workspace;

  explicit OnDevice(const Problem& problem)
      : problem(problem),
        pristine(problem.elements),
        weight(problem.elements),
        values(problem.elements / 2),
        meta(problem.words),
        sums(static_cast<std::size_t>(problem.shape.k)),
        norm(static_cast<std::size_t>(problem.shape.k)),
        bad(1),
        workspace(cuda::input_sumsq_workspace(problem.shape.n, problem.shape.k)) {
    bench::fill_normal(pristine.data(), problem.elements, 1, problem.dtype);
    bench::fill_normal(norm.data(), norm.size(), 2, true);
    check(cudaDeviceSynchronize());
  }

  Buffers buffers() const {
    return {weight.data(), values.data(), meta.data(), sums.data(), bad.data(), workspace.data()};
  }

  void restore(cudaStream_t stream) const {
    check(cudaMemcpyAsync(weight.data(), pristine.data(), weight.bytes(), cudaMemcpyDeviceToDevice,
                          stream));
    check(cudaMemsetAsync(values.data(), 0, values.bytes(), stream));
    check(cudaMemsetAsync(meta.data(), 0, meta.bytes(), stream));
    check(cudaMemsetAsync(sums.data(), 0, sums.bytes(), stream));
    check(cudaMemsetAsync(bad.data(), 0x7f, bad.bytes(), stream));
  }
};

// What an op leaves behind on the CPU.
struct OnHost {
  std::vector<Bits> weight, values;
  std::vector<std::int16_t> meta;
  std::vector<double> sums;
  std::int32_t bad = 0x7f7f7f7f;

  OnHost(const Problem& problem, const OnDevice& device, const Op& op)
      : weight(device.pristine.on_host()),
        values(device.values.size()),
        meta(device.meta.size()),
        sums(device.sums.size()) {
    const int threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    const ParallelFor parallel = wanda_ext::std_threads(threads);
    const std::vector<float> norm = device.norm.on_host();
    const std::size_t bytes = wanda_ext::prune_rows_workspace(problem.shape.k, threads);
    const std::size_t rounded = (bytes + 63) / 64 * 64;
    void* workspace = std::aligned_alloc(64, std::max<std::size_t>(rounded, 64));
    check(op.on_cpu({weight.data(), values.data(), meta.data(), sums.data(), &bad, workspace},
                    norm.data(), parallel));
    std::free(workspace);
  }

  // "" or the first thing in which the device differs.
  std::string difference(const OnDevice& device) const {
    std::string found = difference("weight", weight, device.weight);
    if (found.empty()) found = difference("values", values, device.values);
    if (found.empty()) found = difference("meta", meta, device.meta);
    if (found.empty()) found = difference("sums", sums, device.sums);
    const std::int32_t theirs = device.bad.on_host()[0];
    if (found.empty() && theirs != bad) {
      found = "bad is " + std::to_string(theirs) + ", on the CPU " + std::to_string(bad);
    }
    return found;
  }

 private:
  template <typename T>
  static std::string difference(const char* what, const std::vector<T>& ours,
                                const DeviceArray<T>& theirs) {
    const std::vector<T> host = theirs.on_host();
    for (std::size_t i = 0; i < ours.size(); ++i) {
      if (std::memcmp(&ours[i], &host[i], sizeof(T)) == 0) continue;
      return std::string(what) + "[" + std::to_string(i) + "] differs from the CPU's";
    }
    return "";
  }
};

// One cell of --check or --profile; whether all was right.
bool run_once(const Options& options, Shape shape, DType dtype, const bench::Stream& stream) {
  const Problem problem(shape, dtype);
  const OnDevice device(problem);
  const std::vector<Op> ops = problem.ops();
  std::vector<Entrant> entrants;
  for (const Op& op : ops) {
    if (options.leaves_out(op.name)) continue;
    entrants.push_back({op.name, [&](std::size_t) {
                          device.restore(stream);
                          return bench::problem(
                              op.on_device(device.buffers(), device.norm.data(), stream));
                        }});
  }
  const std::string name = bench::cell_name("check pruning", shape, dtype);
  bench::Object cell = bench::cell_of(name, shape, dtype);
  std::size_t next = 0;
  for (const Op& op : ops) {
    if (options.leaves_out(op.name)) continue;
    Entrant& entrant = entrants[next++];
    bench::running(name + ", " + entrant.name);
    entrant.wrong = entrant.call(0);
    const std::string failed = bench::problem(cudaStreamSynchronize(stream));
    if (entrant.wrong.empty()) entrant.wrong = failed;
    if (!entrant.wrong.empty() && bench::device_is_lost()) {
      cell.add("wrong", bench::wrong_of(entrants)).add("lost", entrant.name).print();
      std::exit(bench::kLost);
    }
    if (!entrant.wrong.empty()) continue;
    if (options.work == Work::kProfile) {
      bench::profile(stream, entrant);
    } else {
      entrant.wrong = OnHost(problem, device, op).difference(device);
    }
  }
  cell.add("tried", static_cast<std::int64_t>(entrants.size()));
  cell.add("wrong", bench::wrong_of(entrants)).print();
  return bench::wrong_of(entrants).empty();
}

bool time_prune_pack(const Options& options, Shape shape, DType dtype,
                     const bench::Stream& stream) {
  const Problem problem(shape, dtype);
  const auto [elements, words] = std::pair{problem.elements, problem.words};
  const std::size_t moved = elements * 2 + elements + words * 2;  // bytes read and written
  const std::size_t copies = bench::copies_of(moved);
  const DeviceArray<Bits> weights(copies * elements), values(copies * elements / 2);
  const DeviceArray<std::int16_t> meta(copies * words);
  const DeviceArray<char> source(copies * moved / 2), target(copies * moved / 2);
  const DeviceArray<float> norm(static_cast<std::size_t>(shape.k));
  const DeviceArray<std::int32_t> bad(1);
  bench::fill_normal(weights.data(), weights.size(), 1, dtype);
  bench::fill_normal(norm.data(), norm.size(), 2, true);
  check(cudaMemset(source.data(), 0x3c, source.bytes()));
  check(cudaDeviceSynchronize());
  std::vector<Entrant> entrants(2);
  entrants[0] = {
      "wanda_ext",
      [&, elements = elements, words = words](std::size_t i) {
        return bench::problem(cuda::prune_pack_24(problem.view(weights.data() + i * elements),
                                                  norm.data(), values.data() + i * elements / 2,
                                                  meta.data() + i * words, bad.data(), stream));
      },
      true};
  entrants[1] = {"copy",
                 [&](std::size_t i) {
                   return bench::problem(cudaMemcpyAsync(target.data() + i * (moved / 2),
                                                         source.data() + i * (moved / 2), moved / 2,
                                                         cudaMemcpyDeviceToDevice, stream));
                 },
                 true};
  bench::time_by_turns(stream, entrants, copies, options.rounds);
  bench::Object cell =
      bench::cell_of(bench::cell_name("prune_pack_24", shape, dtype), shape, dtype);
  bench::Object ratios;
  ratios.add("copy / wanda_ext", entrants[1].median() / entrants[0].median());
  cell.add("us", bench::times_of(entrants)).add("ratios", ratios);
  cell.add("wrong", bench::wrong_of(entrants)).print();
  return bench::wrong_of(entrants).empty();
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = bench::parse(argc, argv, defaults);
  bench::device_or_exit();
  const bench::Stream stream;
  bool right = true;
  for (const Shape& shape : options.shapes) {
    for (const DType dtype : options.dtypes) {
      const bool ok = options.work == Work::kTime ? time_prune_pack(options, shape, dtype, stream)
                                                  : run_once(options, shape, dtype, stream);
      right = ok && right;
    }
  }
  return right ? 0 : bench::kFailed;
}

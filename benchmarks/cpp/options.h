// The command line of the C++ benchmarks.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "harness.h"

namespace bench {

struct Shape {
  std::int64_t n, k;
};

inline std::string name_of(Shape shape) {
  return std::to_string(shape.n) + "x" + std::to_string(shape.k);
}

// Times; or computes everything once and compares; or lets a profiler see each kernel once.
enum class Work { kTime, kCheck, kProfile };

struct Options {
  Work work = Work::kTime;
  std::vector<Shape> shapes;
  std::vector<std::int64_t> m;
  std::vector<wanda_ext::DType> dtypes;
  std::vector<std::string> without;  // kernels, or a kernel with its splits, that are left out
  int rounds = 30;
  bool all_kernels = false;

  bool leaves_out(const std::string& name) const {
    for (const std::string& one : without) {
      if (name == one || name.rfind(one + "/", 0) == 0) return true;
    }
    return false;
  }
};

constexpr const char* kUsage =
    "[--check | --profile] [--shapes NxK,...] [--m M,...] [--dtype bf16|fp16|both]\n"
    "       [--rounds ROUNDS] [--all-kernels] [--without KERNEL,...]\n"
    "n, m and ROUNDS at least 1, k a multiple of 16\n";

[[noreturn]] inline void refuse(const char* program, const std::string& what) {
  std::fprintf(stderr, "%s is not understood\nusage: %s %s", what.c_str(), program, kUsage);
  std::exit(kNotRun);
}

inline std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts = {""};
  for (const char c : text) {
    if (c == at) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

// A number above 0, or 0.
inline std::int64_t positive(const std::string& text) {
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  const bool whole = !text.empty() && *end == '\0' && text[0] >= '0' && text[0] <= '9';
  return whole && value <= INT32_MAX ? value : 0;
}

// What is not given is as in `defaults`.
inline Options parse(int argc, char** argv, Options (*defaults)(Work)) {
  Options given;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--check" || option == "--profile") {
      given.work = option == "--check" ? Work::kCheck : Work::kProfile;
    } else if (option == "--all-kernels") {
      given.all_kernels = true;
    } else if (i + 1 == argc) {
      refuse(argv[0], option);
    } else {
      const std::string value = argv[++i], both = option + " " + value;
      if (option == "--without") {
        given.without = split(value, ',');
      } else if (option == "--dtype" && (value == "bf16" || value == "fp16" || value == "both")) {
        if (value != "fp16") given.dtypes.push_back(wanda_ext::DType::kBFloat16);
        if (value != "bf16") given.dtypes.push_back(wanda_ext::DType::kFloat16);
      } else if (option == "--rounds" && positive(value) > 0) {
        given.rounds = static_cast<int>(positive(value));
      } else if (option == "--m") {
        for (const std::string& m : split(value, ',')) {
          given.m.push_back(positive(m));
          if (given.m.back() == 0) refuse(argv[0], both);
        }
      } else if (option == "--shapes") {
        for (const std::string& shape : split(value, ',')) {
          const std::vector<std::string> parts = split(shape, 'x');
          if (parts.size() != 2) refuse(argv[0], both);
          given.shapes.push_back({positive(parts[0]), positive(parts[1])});
          const auto [n, k] = given.shapes.back();
          if (n == 0 || k == 0 || k % 16 != 0) refuse(argv[0], both);
        }
      } else {
        refuse(argv[0], both);
      }
    }
  }
  const Options otherwise = defaults(given.work);
  if (given.shapes.empty()) given.shapes = otherwise.shapes;
  if (given.m.empty()) given.m = otherwise.m;
  if (given.dtypes.empty()) given.dtypes = otherwise.dtypes;
  return given;
}

// "linear_24 4096x4096 bf16 m 8", or without m.
inline std::string cell_name(const char* what, Shape shape, wanda_ext::DType dtype,
                             std::int64_t m = 0) {
  const char* type = dtype == wanda_ext::DType::kBFloat16 ? "bf16" : "fp16";
  return std::string(what) + " " + name_of(shape) + " " + type +
         (m > 0 ? " m " + std::to_string(m) : "");
}

inline Object cell_of(const std::string& name, Shape shape, wanda_ext::DType dtype,
                      std::int64_t m = 0) {
  Object cell;
  cell.add("cell", name).add("n", shape.n).add("k", shape.k);
  if (m > 0) cell.add("m", m);
  return cell.add("dtype", wanda_ext::name_of(dtype));
}

// Has a profiler that was told to wait see what `call` does, which ran before.
inline void profile(const Stream& stream, Entrant& entrant) {
  running("profiling " + entrant.name);
  check(cudaProfilerStart());
  entrant.wrong = entrant.call(0);
  check(cudaStreamSynchronize(stream));
  check(cudaProfilerStop());
}

}  // namespace bench

// The numbers that both programs compute with.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

// `count` numbers, normal, the same in every run.
inline std::vector<float> normal(std::int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> numbers(static_cast<std::size_t>(count));
  for (float& number : numbers) number = distribution(generator);
  return numbers;
}

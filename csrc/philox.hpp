// Counter-based random numbers: the same bits here, in torch and in Triton, in whatever order they are asked for.
//
// Philox4x32-10: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <array>
#include <cstdint>

namespace tokenmill {

using PhiloxCounter = std::array<std::uint32_t, 4>;
using PhiloxKey = std::array<std::uint32_t, 2>;

inline std::uint32_t low_word(std::uint64_t value) { return static_cast<std::uint32_t>(value); }
inline std::uint32_t high_word(std::uint64_t value) { return static_cast<std::uint32_t>(value >> 32); }

inline PhiloxCounter philox(PhiloxCounter counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t left = std::uint64_t{0xD2511F53u} * counter[0];
    const std::uint64_t right = std::uint64_t{0xCD9E8D57u} * counter[2];
    counter = {high_word(right) ^ counter[1] ^ key[0], low_word(right), high_word(left) ^ counter[3] ^ key[1],
               low_word(left)};
    key[0] += 0x9E3779B9u;  // the golden ratio
    key[1] += 0xBB67AE85u;  // the square root of 3
  }
  return counter;
}

// A random word as a number in (-1, 1): an odd multiple of 2^-24, so exact in fp32, symmetric, and never 0.
inline float symmetric_uniform(std::uint32_t word) {
  const std::int32_t odd = static_cast<std::int32_t>(2 * (word >> 8) + 1) - (1 << 24);
  return static_cast<float>(odd) * 0x1p-24f;
}

// NEFTune's noise before it is scaled: U(-1, 1) for `count` rows of a document from `position` on, `dim` channels
// each, row-major into `out`. A key of its own for each step, then one counter for every four channels.
inline void neftune_uniform(std::uint64_t seed, std::uint64_t step, std::int64_t document_id, std::uint32_t position,
                            std::int64_t count, std::int64_t dim, float* out) {
  constexpr std::uint32_t kNeft = 0x4E454654u;  // "NEFT": other uses of the same seed have another tag
  const PhiloxCounter derived = philox({low_word(step), high_word(step), kNeft, 0}, {low_word(seed), high_word(seed)});
  const auto document = static_cast<std::uint64_t>(document_id);
  for (std::int64_t row = 0; row < count; ++row) {
    PhiloxCounter words{};
    for (std::int64_t channel = 0; channel < dim; ++channel) {
      if (channel % 4 == 0)
        words = philox({low_word(document), high_word(document), position + static_cast<std::uint32_t>(row),
                        static_cast<std::uint32_t>(channel / 4)},
                       {derived[0], derived[1]});
      *out++ = symmetric_uniform(words[channel % 4]);
    }
  }
}

}  // namespace tokenmill

// The order of samples: a keyed bijection of [0, n) in constant memory, so that any position of any epoch is found
// without making the others.
//
// A Feistel network permutes the smallest power of two that holds n; an image outside [0, n) is permuted again until
// it falls inside (cycle walking: J. Black, P. Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002), which
// takes fewer than two passes on average.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "philox.hpp"

namespace tokenmill {

// The key of one epoch of one source.
inline std::uint64_t derive_key(std::uint64_t seed, std::uint32_t source, std::uint64_t epoch) {
  constexpr std::uint32_t kPerm = 0x5045524Du;  // "PERM": other uses of the same seed have another tag
  const PhiloxCounter words =
      philox({low_word(epoch), high_word(epoch), source, kPerm}, {low_word(seed), high_word(seed)});
  return words[0] | std::uint64_t{words[1]} << 32;
}

class Permutation {
 public:
  Permutation(std::uint64_t n, std::uint64_t key) : n_(n) {
    if (n == 0) throw std::invalid_argument("a permutation needs n >= 1, got 0");
    const int bits = std::max(2, static_cast<int>(std::bit_width(n - 1)));
    low_bits_ = bits / 2;
    low_mask_ = (std::uint64_t{1} << low_bits_) - 1;
    high_mask_ = (std::uint64_t{1} << (bits - low_bits_)) - 1;
    rounds_ = bits > 16 ? 6 : kMostRounds;  // halves of a few bits need more rounds before every order is as likely
    for (std::uint32_t round = 0; round < rounds_; ++round) {
      const PhiloxCounter words = philox({round, 0, 0, 0}, {low_word(key), high_word(key)});
      keys_[round] = {words[0] | std::uint64_t{words[1]} << 32, (words[2] | std::uint64_t{words[3]} << 32) | 1};
    }
  }

  std::uint64_t operator()(std::uint64_t index) const {
    if (index >= n_)
      throw std::invalid_argument("index " + std::to_string(index) + " is not below n = " + std::to_string(n_));
    do index = once(index);
    while (index >= n_);
    return index;
  }

  void fill(std::uint64_t start, std::uint64_t count, std::uint64_t* out) const {
    if (start > n_ || count > n_ - start)
      throw std::invalid_argument("indices " + std::to_string(start) + " and " + std::to_string(count) +
                                  " more are not all below n = " + std::to_string(n_));
    std::array<std::uint32_t, kBlock> outside;  // where an image has still to walk
    for (std::uint64_t block = 0; block < count; block += kBlock, out += kBlock) {
      const auto size = static_cast<std::uint32_t>(std::min(count - block, kBlock));
      for (std::uint32_t i = 0; i < size; ++i) out[i] = once(start + block + i);
      std::uint32_t left = 0;
      for (std::uint32_t i = 0; i < size; ++i) {
        outside[left] = i;
        left += out[i] >= n_;  // a sum, not a branch, which would be guessed wrong as often as not
      }
      while (left > 0) {
        const std::uint32_t walking = left;
        left = 0;
        for (std::uint32_t i = 0; i < walking; ++i) {
          const std::uint32_t place = outside[i];
          out[place] = once(out[place]);
          outside[left] = place;
          left += out[place] >= n_;
        }
      }
    }
  }

 private:
  static constexpr std::uint32_t kMostRounds = 24;
  static constexpr std::uint64_t kBlock = 1024;
  struct RoundKey {
    std::uint64_t add, multiply;
  };

  // Both halves of a 128-bit product folded together: every output bit depends on every input bit.
  static std::uint64_t mix(std::uint64_t half, const RoundKey& key) {
    __extension__ using Wide = unsigned __int128;
    const Wide product = static_cast<Wide>(half + key.add) * key.multiply;
    return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
  }

  std::uint64_t once(std::uint64_t index) const {
    std::uint64_t low = index & low_mask_, high = index >> low_bits_;
    for (std::uint32_t round = 0; round < rounds_; round += 2) {
      low ^= mix(high, keys_[round]) & low_mask_;
      high ^= mix(low, keys_[round + 1]) & high_mask_;
    }
    return high << low_bits_ | low;
  }

  std::uint64_t n_, low_mask_, high_mask_;
  int low_bits_;
  std::uint32_t rounds_;
  std::array<RoundKey, kMostRounds> keys_;
};

}  // namespace tokenmill

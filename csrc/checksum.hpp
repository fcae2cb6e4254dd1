// Whether mapped tokens are as they were written: each block of a shard has a CRC-32 (that of zlib and gzip), which is
// summed the first time that a token of it is wanted, so nothing damaged is used and nothing is read before its time.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "assemble.hpp"

namespace tokenmill {

// Eight bytes a step ("slicing by 8": M. Kounavis, F. Berry, 2005): table k says what a byte does k bytes further on.
constexpr auto kCrcTables = [] {
  std::array<std::array<std::uint32_t, 256>, 8> tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t sum = byte;
    for (int bit = 0; bit < 8; ++bit) sum = sum >> 1 ^ (sum & 1 ? 0xEDB88320u : 0);
    tables[0][byte] = sum;
  }
  for (std::size_t k = 1; k < 8; ++k)
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t sum = tables[k - 1][byte];
      tables[k][byte] = sum >> 8 ^ tables[0][sum & 255];
    }
  return tables;
}();

inline std::uint32_t crc32(std::span<const std::byte> data) {
  static_assert(std::endian::native == std::endian::little, "the first byte is the lowest below");
  const auto& t = kCrcTables;
  std::uint32_t sum = ~0u;
  std::size_t i = 0;
  for (; i + 8 <= data.size(); i += 8) {
    std::uint64_t word;
    std::memcpy(&word, data.data() + i, 8);
    word ^= sum;
    sum = t[7][word & 255] ^ t[6][word >> 8 & 255] ^ t[5][word >> 16 & 255] ^ t[4][word >> 24 & 255] ^
          t[3][word >> 32 & 255] ^ t[2][word >> 40 & 255] ^ t[1][word >> 48 & 255] ^ t[0][word >> 56];
  }
  for (; i < data.size(); ++i) sum = sum >> 8 ^ t[0][(sum ^ static_cast<std::uint32_t>(data[i])) & 255];
  return ~sum;
}

struct BlockSums {  // of one shard, one entry a block
  std::span<const std::uint32_t> crc32;
  std::span<bool> checked;  // those that were read and found good
};

inline std::span<const std::byte> bytes(const Shard& shard) {
  return std::visit([](auto view) { return std::as_bytes(view); }, shard.tokens);
}

// The first of `parts` that needs a block that is not as it was written; -1 where there is none. Raises where a part is
// not wholly inside its shard, or a shard has not one sum for every `block` bytes.
inline std::int64_t find_damaged(const std::vector<Shard>& shards, const std::vector<BlockSums>& sums,
                                 const Parts& parts, std::uint64_t block) {
  if (block == 0 || sums.size() != shards.size()) throw std::invalid_argument("one list of sums a shard is needed");
  for (std::size_t s = 0; s < shards.size(); ++s) {
    const std::uint64_t size = bytes(shards[s]).size(), blocks = size / block + (size % block != 0);
    if (sums[s].crc32.size() != blocks || sums[s].checked.size() != blocks)
      throw std::invalid_argument("shard " + std::to_string(s) + " has " + std::to_string(blocks) + " blocks and " +
                                  std::to_string(sums[s].crc32.size()) + " sums");
  }
  check_parts(shards, parts);
  const auto blocks_of = [&](std::size_t i) {  // the first block of a part, and the one behind its last
    const auto& shard = shards[static_cast<std::size_t>(parts.shard[i])];
    const std::uint64_t width = std::visit([](auto view) { return sizeof(view[0]); }, shard.tokens);
    const std::uint64_t begin = static_cast<std::uint64_t>(parts.start[i]) * width;
    const std::uint64_t end = begin + static_cast<std::uint64_t>(parts.length[i]) * width;
    return std::pair{begin / block, (end - 1) / block + 1};
  };

  std::vector<std::pair<std::size_t, std::uint64_t>> wanted;
  for (std::size_t i = 0; i < parts.length.size(); ++i) {
    const auto shard = static_cast<std::size_t>(parts.shard[i]);
    for (auto [at, end] = blocks_of(i); at < end; ++at)
      if (!sums[shard].checked[at]) wanted.emplace_back(shard, at);
  }
  if (wanted.empty()) return -1;
  std::sort(wanted.begin(), wanted.end());
  wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());

  std::atomic<std::size_t> turn = 0;
  const auto work = [&] {
    for (std::size_t k; (k = turn++) < wanted.size();) {
      const auto [shard, at] = wanted[k];
      const auto all = bytes(shards[shard]);
      const auto data = all.subspan(at * block, std::min<std::uint64_t>(block, all.size() - at * block));
      sums[shard].checked[at] = crc32(data) == sums[shard].crc32[at];  // no two threads have the same block
    }
  };
  {
    const std::size_t cores = std::max(1u, std::thread::hardware_concurrency());
    std::vector<std::jthread> team;
    for (std::size_t thread = 1; thread < std::min<std::size_t>({wanted.size(), cores, 8}); ++thread)
      team.emplace_back(work);
    work();
  }
  for (std::size_t i = 0; i < parts.length.size(); ++i)
    for (auto [at, end] = blocks_of(i); at < end; ++at)
      if (!sums[static_cast<std::size_t>(parts.shard[i])].checked[at]) return static_cast<std::int64_t>(i);
  return -1;
}

}  // namespace tokenmill

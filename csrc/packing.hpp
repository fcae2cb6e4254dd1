// Documents into packs of a fixed capacity by best fit, longest first: each goes where it leaves the least room, or
// into a new pack. At most 11/9 of the fewest packs possible (D. Johnson, 1973), in practice full to a fraction of a
// percent. A counting sort and a bitset over the room left make it near linear.
#pragma once

#include <bit>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace tokenmill {

// A set of integers below `size`, with the smallest member from a value on found in one step per factor of 64.
class BitSet {
 public:
  explicit BitSet(std::size_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(size, 0);
    } while (size > 1);
  }

  void insert(std::size_t value) {
    for (auto& level : levels_) {
      level[value / 64] |= bit(value);
      value /= 64;
    }
  }

  void erase(std::size_t value) {
    for (auto& level : levels_) {
      if ((level[value / 64] &= ~bit(value)) != 0) return;  // the word above still has a member below it
      value /= 64;
    }
  }

  static constexpr std::size_t kNone = ~std::size_t{0};

  std::size_t next(std::size_t value) const {
    for (std::size_t level = 0; level < levels_.size() && value / 64 < levels_[level].size(); ++level) {
      const std::uint64_t rest = levels_[level][value / 64] >> (value % 64);
      if (rest != 0) {
        value += std::countr_zero(rest);
        while (level > 0) value = value * 64 + std::countr_zero(levels_[--level][value]);
        return value;
      }
      value = value / 64 + 1;  // nothing left in this word: the next one, by the level above
    }
    return kNone;
  }

 private:
  static std::uint64_t bit(std::size_t value) { return std::uint64_t{1} << (value % 64); }
  std::vector<std::vector<std::uint64_t>> levels_;  // a bit for each value, then for each word of the level below
};

struct Packs {
  std::vector<std::int64_t> offsets;  // (K + 1,)
  std::vector<std::int64_t> items;    // (n,) pack k holds items[offsets[k]:offsets[k + 1]], in increasing order
};

inline Packs pack(std::span<const std::int64_t> lengths, std::int64_t capacity) {
  constexpr std::int64_t kLargest = std::int64_t{1} << 28;
  if (capacity < 1 || capacity > kLargest)
    throw std::invalid_argument("capacity must be between 1 and 2**28, got " + std::to_string(capacity));
  const std::size_t n = lengths.size();
  for (std::size_t i = 0; i < n; ++i)
    if (lengths[i] < 1 || lengths[i] > capacity)
      throw std::invalid_argument("lengths[" + std::to_string(i) + "] is " + std::to_string(lengths[i]) +
                                  ": expected 1 to the capacity " + std::to_string(capacity));

  std::vector<std::int64_t> begin(capacity + 2, 0);  // counting sort, longest first, equal ones in order of index
  for (const std::int64_t length : lengths) ++begin[capacity - length + 1];
  for (std::int64_t i = 0; i <= capacity; ++i) begin[i + 1] += begin[i];
  std::vector<std::int64_t> order(n);
  for (std::size_t i = 0; i < n; ++i) order[begin[capacity - lengths[i]]++] = static_cast<std::int64_t>(i);

  BitSet rooms(capacity + 1);                            // amounts of room that some pack has left
  std::vector<std::int64_t> newest(capacity + 1, -1);    // for each amount, a stack of the packs that have it:
  std::vector<std::int64_t> below;                       // ... for each pack, the one under it
  std::vector<std::int64_t> pack_of(n), counts;
  for (const std::int64_t item : order) {
    std::size_t room = rooms.next(lengths[item]);
    std::int64_t chosen;
    if (room == BitSet::kNone) {
      room = capacity;
      chosen = static_cast<std::int64_t>(counts.size());
      counts.push_back(0);
      below.push_back(-1);
    } else {
      chosen = newest[room];
      if ((newest[room] = below[chosen]) < 0) rooms.erase(room);
    }
    pack_of[item] = chosen;
    ++counts[chosen];
    room -= lengths[item];
    if (room == 0) continue;
    below[chosen] = newest[room];
    newest[room] = chosen;
    rooms.insert(room);
  }

  Packs packs{std::vector<std::int64_t>(counts.size() + 1, 0), std::vector<std::int64_t>(n)};
  for (std::size_t k = 0; k < counts.size(); ++k) packs.offsets[k + 1] = packs.offsets[k] + counts[k];
  std::vector<std::int64_t> cursor(packs.offsets.begin(), packs.offsets.end() - 1);
  for (std::size_t i = 0; i < n; ++i) packs.items[cursor[pack_of[i]]++] = static_cast<std::int64_t>(i);
  return packs;
}

}  // namespace tokenmill

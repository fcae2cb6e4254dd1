// A batch gathered from mapped shards: documents, or parts of them, laid end to end with what to predict at each row.
//
// The same as Batch.from_documents of the same tokens (data/batch.py). Nothing outside a shard is read, whatever the
// caller asks for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <variant>
#include <vector>

namespace tokenmill {

struct Shard {
  std::variant<std::span<const std::uint16_t>, std::span<const std::uint32_t>> tokens;
  std::span<const std::uint64_t> silent;  // begin, end, begin, end, ...: tokens without loss, sorted, not overlapping
  std::uint64_t size() const {
    return std::visit([](auto view) { return static_cast<std::uint64_t>(view.size()); }, tokens);
  }
};

struct Parts {  // one entry a part
  std::span<const std::int64_t> shard, start, length;
};

struct Rows {  // what is written
  std::span<std::int32_t> tokens;      // (T,)
  std::span<std::int64_t> targets;     // (T,)
  std::span<float> weights;            // (T,)
  std::span<std::int32_t> positions;   // (T,)
  std::span<std::int32_t> taught;      // (T,) first the rows with a weight, in order
  std::span<std::int32_t> cu_seqlens;  // (P + 1,)
};

// Raises where a part is not wholly inside its shard, or half a span is there; otherwise the number of rows in all.
inline std::int64_t check_parts(const std::vector<Shard>& shards, const Parts& parts) {
  const std::size_t n = parts.length.size();
  if (parts.shard.size() != n || parts.start.size() != n)
    throw std::invalid_argument("shard, start and length must have one entry a part, got " +
                                std::to_string(parts.shard.size()) + ", " + std::to_string(parts.start.size()) +
                                " and " + std::to_string(n));
  for (const Shard& shard : shards)
    if (shard.silent.size() % 2) throw std::invalid_argument("silent spans must be pairs of begin and end");
  std::int64_t rows = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const std::int64_t shard = parts.shard[i], start = parts.start[i], length = parts.length[i];
    if (shard < 0 || shard >= static_cast<std::int64_t>(shards.size()))
      throw std::invalid_argument("part " + std::to_string(i) + " names shard " + std::to_string(shard) + " of " +
                                  std::to_string(shards.size()));
    const auto size = static_cast<std::int64_t>(shards[shard].size());
    if (start < 0 || length < 1 || start > size || length > size - start)
      throw std::invalid_argument("part " + std::to_string(i) + " is tokens " + std::to_string(start) + " and " +
                                  std::to_string(length) + " on, outside shard " + std::to_string(shard) + " of " +
                                  std::to_string(size) + " tokens");
    if (length > std::numeric_limits<std::int32_t>::max() - rows)
      throw std::invalid_argument("a batch of more than 2**31 - 1 tokens");
    rows += length;
  }
  return rows;
}

inline void check_size(const char* name, std::size_t size, std::size_t expected) {
  if (size != expected)
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(size) + " entries, expected " +
                                std::to_string(expected));
}

// Row r of a part predicts token r + 1; the last row predicts nothing, nor does one whose next token is silent.
template <class Token>
void fill_part(std::span<const Token> tokens, std::span<const std::uint64_t> silent, std::uint64_t start,
               std::int64_t length, const Rows& rows, std::int64_t row) {
  constexpr std::int64_t kIgnore = -100;
  const Token* source = tokens.data() + start;
  for (std::int64_t i = 0; i < length; ++i) {
    rows.tokens[row + i] = static_cast<std::int32_t>(source[i]);
    rows.positions[row + i] = static_cast<std::int32_t>(i);
  }
  for (std::int64_t i = 0; i + 1 < length; ++i) {
    rows.targets[row + i] = source[i + 1];
    rows.weights[row + i] = 1.0f;
  }
  const auto ignore = [&](std::int64_t i) {
    rows.targets[row + i] = kIgnore;
    rows.weights[row + i] = 0.0f;
  };
  ignore(length - 1);

  std::size_t low = 0, high = silent.size() / 2;  // the first span that ends after the part's first token
  while (low < high) {
    const std::size_t middle = (low + high) / 2;
    if (silent[2 * middle + 1] <= start) low = middle + 1;
    else high = middle;
  }
  const std::uint64_t end = start + static_cast<std::uint64_t>(length);
  for (; low < silent.size() / 2 && silent[2 * low] < end; ++low) {
    const std::uint64_t first = std::max(silent[2 * low], start + 1), last = std::min(silent[2 * low + 1], end);
    for (std::uint64_t token = first; token < last; ++token) ignore(static_cast<std::int64_t>(token - start) - 1);
  }
}

// How many rows have a weight. Raises as check_parts does, and where the rows are of another size. Threads take runs of
// parts with about as many rows each.
inline std::int64_t assemble(const std::vector<Shard>& shards, const Parts& parts, const Rows& rows) {
  const auto total = check_parts(shards, parts);
  const std::size_t n = parts.length.size();
  check_size("out_tokens", rows.tokens.size(), static_cast<std::size_t>(total));
  check_size("targets", rows.targets.size(), static_cast<std::size_t>(total));
  check_size("weights", rows.weights.size(), static_cast<std::size_t>(total));
  check_size("positions", rows.positions.size(), static_cast<std::size_t>(total));
  check_size("target_rows", rows.taught.size(), static_cast<std::size_t>(total));
  check_size("cu_seqlens", rows.cu_seqlens.size(), n + 1);
  rows.cu_seqlens[0] = 0;
  for (std::size_t i = 0; i < n; ++i)
    rows.cu_seqlens[i + 1] = rows.cu_seqlens[i] + static_cast<std::int32_t>(parts.length[i]);

  const auto work = [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i)
      std::visit(
          [&](auto tokens) {
            fill_part(tokens, shards[parts.shard[i]].silent, static_cast<std::uint64_t>(parts.start[i]),
                      parts.length[i], rows, rows.cu_seqlens[i]);
          },
          shards[parts.shard[i]].tokens);
  };

  constexpr std::int64_t kRowsPerThread = 1 << 16, kMostThreads = 8;  // fewer rows are done before a thread starts
  const std::int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  const std::int64_t threads = std::clamp<std::int64_t>(total / kRowsPerThread, 1, std::min(cores, kMostThreads));
  const auto boundary = [&](std::int64_t thread) {
    const auto row = static_cast<std::int32_t>(total * thread / threads);
    const auto begin = rows.cu_seqlens.begin();
    return static_cast<std::size_t>(std::lower_bound(begin, begin + static_cast<std::ptrdiff_t>(n), row) - begin);
  };
  std::vector<std::jthread> team;
  for (std::int64_t thread = 1; thread < threads; ++thread)
    team.emplace_back(work, boundary(thread), boundary(thread + 1));
  work(0, boundary(1));
  team.clear();  // waits for all of them
  std::int64_t taught = 0;
  for (std::int64_t row = 0; row < total; ++row) {
    rows.taught[taught] = static_cast<std::int32_t>(row);
    taught += rows.weights[row] != 0.0f;
  }
  return taught;
}

}  // namespace tokenmill

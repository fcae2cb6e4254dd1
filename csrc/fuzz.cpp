// A fuzz target: bytes become arguments, sensible and hostile, of everything that the module binds. What comes out must
// be what a naive statement of it says, and what makes no sense must be refused.
//
// Clang's libFuzzer calls LLVMFuzzerTestOneInput with bytes of its own; elsewhere `fuzz SECONDS [FIRST]` makes inputs
// FIRST, FIRST + 1, ..., each from its number alone, and names the one that failed. Build it with sanitizers
// (csrc/CMakeLists.txt): they see what no comparison does.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <set>

#include "assemble.hpp"
#include "checksum.hpp"
#include "mixture.hpp"
#include "packing.hpp"
#include "permutation.hpp"
#include "philox.hpp"
#include "piece_cache.hpp"

using namespace tokenmill;

namespace {

__extension__ using Wide = __int128;
__extension__ using WideUnsigned = unsigned __int128;

unsigned long number = 0;  // of the input
void tell() { std::fprintf(stderr, "at input %lu\n", number); }

#define CHECK(truth) \
  if (!(truth)) std::fprintf(stderr, "fuzz.cpp:%d: not so: %s\n", __LINE__, #truth), tell(), std::abort()

// Whether a call raised what Python sees as a ValueError. Anything else that it raises ends the process.
template <class Call>
bool refused(Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

// Arguments taken from bytes; zeros where there are no more.
class Input {
 public:
  explicit Input(std::span<const std::uint8_t> data) : data_(data) {}

  std::uint64_t bits(int bytes = 8) {
    std::uint64_t value = 0;
    for (; bytes > 0; --bytes, data_ = data_.subspan(std::min<std::size_t>(1, data_.size())))
      value = value << 8 | (data_.empty() ? 0 : data_[0]);
    return value;
  }
  std::uint64_t below(std::uint64_t n) { return bits(n > 256 ? 8 : 1) % n; }
  std::int64_t between(std::int64_t least, std::int64_t most) {
    return least + static_cast<std::int64_t>(below(static_cast<std::uint64_t>(most - least) + 1));
  }
  bool one_in(std::uint64_t n) { return below(n) + 1 == n; }  // never, where there are no more bytes
  std::mt19937_64 generator() { return std::mt19937_64(bits()); }

  // A number near the edges of its type, signed or not, and of what makes sense.
  template <class T>
  T hostile(T sensible) {
    const auto here = static_cast<std::uint64_t>(sensible);
    constexpr auto kMost = ~std::uint64_t{0};
    const std::array edges{here, here, here, std::uint64_t{0}, kMost >> 1, kMost >> 2, kMost >> 32, kMost >> 33};
    const std::uint64_t edge = edges[below(edges.size())] + bits(1) % 5 - 2;
    return static_cast<T>(one_in(2) ? ~edge : edge);
  }

 private:
  std::span<const std::uint8_t> data_;
};

// Shards with arrays of exactly their size, so that a read beyond one is seen.
struct Shards {
  std::vector<std::vector<std::uint16_t>> narrow;
  std::vector<std::vector<std::uint32_t>> wide;
  std::vector<std::vector<std::uint64_t>> silent;
  std::vector<Shard> views;
  bool sorted = true, paired = true;  // the silent spans
};

Shards make_shards(Input& in) {
  Shards shards;
  const std::size_t count = in.below(4);
  shards.narrow.resize(count);
  shards.wide.resize(count);
  shards.silent.resize(count);
  for (std::size_t s = 0; s < count; ++s) {
    const std::size_t size = in.one_in(24) ? in.below(400'000) : in.below(150);
    auto random = in.generator();
    auto& silent = shards.silent[s];
    for (std::uint64_t at = in.below(9); at < size && in.below(4); at += in.below(9)) {
      silent.push_back(at);
      silent.push_back(at = std::min<std::uint64_t>(at + 1 + in.below(9), size));
    }
    if (in.one_in(8)) {
      for (auto n = in.below(9); n > 0; --n) silent.push_back(in.hostile(silent.size()));
      for (std::size_t i = 0; i < silent.size(); ++i)
        shards.sorted &= i % 2 ? silent[i - 1] < silent[i] && silent[i] <= size : i == 0 || silent[i - 1] <= silent[i];
      shards.paired &= silent.size() % 2 == 0;
    }
    if (in.below(2)) {
      for (std::size_t i = 0; i < size; ++i) shards.narrow[s].push_back(static_cast<std::uint16_t>(random()));
      shards.views.push_back({std::span<const std::uint16_t>(shards.narrow[s]), silent});
    } else {
      for (std::size_t i = 0; i < size; ++i) shards.wide[s].push_back(static_cast<std::uint32_t>(random()));
      shards.views.push_back({std::span<const std::uint32_t>(shards.wide[s]), silent});
    }
  }
  return shards;
}

struct PartList {
  std::vector<std::int64_t> shard, start, length;
  Parts view() const { return {shard, start, length}; }
};

PartList make_parts(Input& in, const std::vector<Shard>& shards) {
  PartList parts;
  for (auto n = in.below(12); n > 0; --n) {
    const auto shard = static_cast<std::int64_t>(in.below(shards.size() + 1));
    const bool there = shard < std::ssize(shards) && shards[static_cast<std::size_t>(shard)].size() > 0;
    const auto size = there ? static_cast<std::int64_t>(shards[static_cast<std::size_t>(shard)].size()) : 1;
    const std::int64_t start = in.between(0, size - 1);
    if (!there && !in.one_in(8)) continue;
    parts.shard.push_back(in.one_in(64) ? in.hostile(std::ssize(shards)) : shard);
    parts.start.push_back(in.one_in(64) ? in.hostile(size) : start);
    parts.length.push_back(in.one_in(64) ? in.hostile(size - start) : in.between(1, size - start));
  }
  if (in.one_in(64)) parts.start.push_back(0);
  return parts;
}

// The rows that parts have in all; -1 where one is not wholly inside its shard, or there are too many.
Wide rows_of(const std::vector<Shard>& shards, const PartList& parts) {
  Wide rows = 0;
  if (parts.start.size() != parts.length.size()) return -1;
  for (std::size_t i = 0; i < parts.length.size(); ++i) {
    if (parts.shard[i] < 0 || parts.shard[i] >= std::ssize(shards)) return -1;
    const Wide size = shards[static_cast<std::size_t>(parts.shard[i])].size();
    if (parts.start[i] < 0 || parts.length[i] < 1 || Wide{parts.start[i]} + parts.length[i] > size) return -1;
    rows += parts.length[i];
  }
  return rows < Wide{1} << 31 ? rows : -1;
}

void fuzz_assemble(Input& in) {
  const Shards shards = make_shards(in);
  PartList parts = make_parts(in, shards.views);
  if (const auto size = shards.views.empty() ? 0 : shards.views[0].size(); size > 270'000 && in.one_in(4)) {
    parts.shard.assign(8000, 0);  // more rows than an int32 counts
    parts.start.assign(8000, 0);
    parts.length.assign(8000, static_cast<std::int64_t>(size));
  }
  const Wide total = rows_of(shards.views, parts);
  std::array<std::size_t, 6> sizes;
  sizes.fill(static_cast<std::size_t>(std::max<Wide>(total, 0)));
  sizes[5] = parts.length.size() + 1;
  bool fits = total >= 0 && shards.paired;
  if (in.one_in(8)) {
    const std::size_t changed = in.below(6), size = sizes[changed];
    sizes[changed] = in.below(2) ? size + in.below(3) : size - std::min<std::size_t>(size, in.below(3));
    fits &= sizes[changed] == size;
  }
  std::vector<std::int32_t> tokens(sizes[0]), positions(sizes[3]), taught(sizes[4]), cu_seqlens(sizes[5]);
  std::vector<std::int64_t> targets(sizes[1]);
  std::vector<float> weights(sizes[2]);
  const Rows rows{tokens, targets, weights, positions, taught, cu_seqlens};
  std::int64_t count = 0;
  CHECK(refused([&] { count = assemble(shards.views, parts.view(), rows); }) == !fits);
  if (!fits) return;

  std::size_t row = 0, found = 0;
  for (std::size_t i = 0; i < parts.length.size(); ++i) {
    const auto s = static_cast<std::size_t>(parts.shard[i]);
    const auto token = [&](std::int64_t at) -> std::int64_t {
      const auto k = static_cast<std::size_t>(parts.start[i] + at);
      return shards.narrow[s].empty() ? shards.wide[s][k] : shards.narrow[s][k];
    };
    std::vector<bool> silent(static_cast<std::size_t>(parts.length[i]), false);
    for (std::size_t k = 0; shards.sorted && k < shards.silent[s].size(); k += 2)
      for (std::uint64_t at = shards.silent[s][k]; at < shards.silent[s][k + 1]; ++at)
        if (const auto offset = static_cast<std::int64_t>(at) - parts.start[i]; offset >= 0 && offset < parts.length[i])
          silent[static_cast<std::size_t>(offset)] = true;
    CHECK(cu_seqlens[i] == static_cast<std::int32_t>(row));
    for (std::int64_t at = 0; at < parts.length[i]; ++at, ++row) {
      CHECK(tokens[row] == static_cast<std::int32_t>(token(at)));
      CHECK(positions[row] == at);
      CHECK(weights[row] == (targets[row] == -100 ? 0.0f : 1.0f));
      if (targets[row] != -100) CHECK(taught[found++] == static_cast<std::int32_t>(row));
      const bool last = at + 1 == parts.length[i];
      if (targets[row] != -100) CHECK(!last && targets[row] == token(at + 1));
      if (shards.sorted) CHECK((targets[row] == -100) == (last || silent[static_cast<std::size_t>(at) + 1]));
    }
  }
  CHECK(cu_seqlens.back() == static_cast<std::int32_t>(row));
}

std::uint32_t slow_crc32(std::span<const std::byte> data) {
  std::uint32_t sum = ~0u;
  for (const std::byte byte : data) {
    sum ^= static_cast<std::uint32_t>(byte);
    for (int bit = 0; bit < 8; ++bit) sum = sum >> 1 ^ (sum & 1 ? 0xEDB88320u : 0);
  }
  return ~sum;
}

void fuzz_checksum(Input& in) {
  const Shards shards = make_shards(in);
  const PartList parts = make_parts(in, shards.views);
  const std::uint64_t block = in.one_in(32) ? in.hostile(std::uint64_t{1}) : 16 + in.below(200);
  std::vector<std::vector<std::uint32_t>> sums;
  std::vector<std::unique_ptr<bool[]>> checked;
  std::vector<BlockSums> views;
  std::vector<std::set<std::uint64_t>> bad(shards.views.size());
  bool fits = block > 0 && rows_of(shards.views, parts) >= 0 && shards.paired;
  for (std::size_t s = 0; s < shards.views.size(); ++s) {
    const auto all = bytes(shards.views[s]);
    sums.emplace_back();
    for (std::size_t at = 0; at < all.size() && block > 0; at += std::min<std::uint64_t>(block, all.size()))
      sums[s].push_back(slow_crc32(all.subspan(at, std::min<std::uint64_t>(block, all.size() - at))));
    if (!sums[s].empty() && in.one_in(2)) {
      const std::uint64_t at = in.below(sums[s].size());
      sums[s][at] ^= std::uint32_t{1} << in.below(32);
      bad[s].insert(at);
    }
    if (in.one_in(64)) sums[s].push_back(0), fits = false;
    const std::size_t size = sums[s].size() + in.one_in(64);
    fits &= size == sums[s].size();
    checked.push_back(std::make_unique<bool[]>(size));
    for (std::size_t k = 0; k < size; ++k)
      if (in.one_in(5) && !bad[s].contains(k)) checked[s][k] = true;
    views.push_back({sums[s], {checked[s].get(), size}});
  }
  if (in.one_in(64) && !views.empty()) views.pop_back(), fits = false;
  std::int64_t found = -2;
  CHECK(refused([&] { found = find_damaged(shards.views, views, parts.view(), block); }) == !fits);
  if (!fits) return;
  std::int64_t expected = -1;
  for (std::size_t i = 0; i < parts.length.size() && expected < 0; ++i) {
    const auto s = static_cast<std::size_t>(parts.shard[i]);
    const std::uint64_t width = shards.narrow[s].empty() ? 4 : 2;
    const std::uint64_t begin = static_cast<std::uint64_t>(parts.start[i]) * width;
    const std::uint64_t end = begin + static_cast<std::uint64_t>(parts.length[i]) * width;
    for (const std::uint64_t k : bad[s])
      if (k * block < end && (k + 1) * block > begin) expected = static_cast<std::int64_t>(i);
  }
  CHECK(found == expected);
  for (std::size_t s = 0; s < bad.size(); ++s)
    for (const std::uint64_t k : bad[s]) CHECK(!checked[s][k]);
}

void fuzz_packing(Input& in) {
  constexpr std::int64_t kLargest = std::int64_t{1} << 28;
  const std::int64_t sensible = in.between(1, in.one_in(8) ? 70'000 : 300);
  const std::int64_t capacity = in.one_in(64) ? in.hostile(kLargest) : sensible;
  if (capacity > 100'000 && capacity <= kLargest) return;  // sensible too, and gigabytes
  std::vector<std::int64_t> lengths(in.below(100));
  bool fits = capacity >= 1 && capacity <= kLargest;
  for (auto& length : lengths) {
    length = in.one_in(200) ? in.hostile(sensible) : in.between(1, sensible);
    fits &= length >= 1 && length <= capacity;
  }
  Packs packs;
  CHECK(refused([&] { packs = pack(lengths, capacity); }) == !fits);
  if (!fits) return;

  std::vector<std::int64_t> rooms, sorted = lengths, expected;  // the room left does not depend on how ties are broken
  std::vector<bool> seen(lengths.size(), false);
  CHECK(packs.offsets.front() == 0 && packs.offsets.back() == std::ssize(lengths));
  for (std::size_t k = 0; k + 1 < packs.offsets.size(); ++k) {
    CHECK(packs.offsets[k] < packs.offsets[k + 1]);
    rooms.push_back(capacity);
    std::int64_t before = -1;
    for (auto at = packs.offsets[k]; at < packs.offsets[k + 1]; ++at) {
      const std::int64_t item = packs.items[static_cast<std::size_t>(at)];
      CHECK(item > before && item < std::ssize(lengths) && !seen[static_cast<std::size_t>(item)]);
      seen[static_cast<std::size_t>(item)] = true;
      rooms[k] -= lengths[static_cast<std::size_t>(item)];
      before = item;
    }
    CHECK(rooms[k] >= 0);
  }
  std::sort(sorted.begin(), sorted.end(), std::greater{});
  for (const std::int64_t length : sorted) {
    auto best = expected.end();
    for (auto room = expected.begin(); room != expected.end(); ++room)
      if (*room >= length && (best == expected.end() || *room < *best)) best = room;
    if (best == expected.end()) best = expected.insert(best, capacity);
    *best -= length;
  }
  std::sort(rooms.begin(), rooms.end());
  std::sort(expected.begin(), expected.end());
  CHECK(rooms == expected);
}

void fuzz_mixture(Input& in) {
  constexpr std::uint64_t kWhole = Mixture::kWhole;
  const std::size_t phases = 1 + in.below(4);
  std::size_t sources = 1 + in.below(in.one_in(8) ? 64 : 6);
  std::vector<std::uint64_t> starts{0}, shares;
  while (starts.size() < phases) starts.push_back(starts.back() + 1 + (in.one_in(4) ? in.bits() >> 2 : in.below(200)));
  const bool ends = phases > 1 && in.one_in(4);
  for (std::size_t p = 0; p < phases; ++p) {
    std::uint64_t left = kWhole;
    for (std::size_t i = 0; i < sources; ++i) {
      const std::uint64_t share = i + 1 == sources ? left : std::min(left, in.one_in(4) ? in.below(9) : in.bits() >> 3);
      shares.push_back(ends && p + 1 == phases ? 0 : share);
      left -= share;
    }
  }
  bool fits = true;
  if (in.one_in(16)) {
    auto& any = in.below(2) ? starts : shares;
    auto& value = any[in.below(any.size())];
    value = in.hostile(value);
    if (in.one_in(4)) shares.pop_back();
    sources = shares.size() / phases;
    fits = starts[0] == 0 && sources > 0 && shares.size() % phases == 0;
    for (std::size_t p = 0; fits && p < phases; ++p) {
      WideUnsigned sum = 0;
      for (std::size_t i = 0; i < sources; ++i) sum += shares[p * sources + i];
      fits = (sum == kWhole || (sum == 0 && p > 0 && p + 1 == phases)) && (p == 0 || starts[p - 1] < starts[p]);
    }
  }
  std::unique_ptr<Mixture> mixture;
  CHECK(refused([&] { mixture = std::make_unique<Mixture>(starts, shares); }) == !fits);
  if (!fits) return;

  bool over = true;  // whether the last phase shares out nothing
  for (std::size_t i = 0; i < sources; ++i) over &= phases > 1 && shares[(phases - 1) * sources + i] == 0;
  const std::uint64_t end = over ? starts.back() : ~std::uint64_t{0};
  const std::uint64_t count = std::min<std::uint64_t>(in.below(600), end);
  std::vector<std::uint16_t> from(count);
  std::vector<std::uint64_t> draws(count);
  mixture->draw(0, count, from.data(), draws.data());
  std::vector<Wide> due(sources, 0);
  std::vector<std::uint64_t> given(sources, 0), middle;
  const std::uint64_t stop = in.below(count + 1);
  for (std::uint64_t k = 0, p = 0; k <= count; ++k) {
    if (k == stop) middle = given;
    if (k == count) break;
    while (p + 1 < phases && starts[p + 1] <= k) ++p;
    CHECK(from[k] < sources && draws[k] == given[from[k]]);
    ++given[from[k]];
    for (std::size_t i = 0; i < sources; ++i) {
      due[i] += shares[p * sources + i];
      const Wide off = due[i] - Wide{given[i]} * kWhole;
      CHECK(off < Wide{kWhole} && off > -Wide{kWhole});  // within 1 of the exact share
    }
  }
  CHECK(mixture->counts() == given);
  Mixture resumed(starts, shares);
  resumed.seek(stop, middle);
  for (Mixture* some : {&resumed, mixture.get()}) {  // from its counts alone, and by going back
    std::vector<std::uint16_t> again(count - stop);
    some->draw(stop, count - stop, again.data(), draws.data());
    CHECK(std::equal(again.begin(), again.end(), from.begin() + static_cast<std::ptrdiff_t>(stop)));
  }
  if (over) CHECK(refused([&] { mixture->draw(end, 1 + in.below(9), from.data(), draws.data()); }));
  // Counts that cannot be, or are: memory stays safe, and a refusal changes nothing.
  const std::uint64_t position = in.one_in(2) ? in.hostile(stop) : stop;
  for (auto& value : middle)
    if (in.one_in(4)) value = in.hostile(value);
  if (in.one_in(8)) middle.push_back(0);
  if (refused([&] { resumed.seek(position, middle); })) {
    CHECK(resumed.counts() == given);
  } else {
    CHECK(std::accumulate(middle.begin(), middle.end(), WideUnsigned{0}) == position && position <= end);
    std::array<std::uint16_t, 9> some;
    std::array<std::uint64_t, 9> some_draws;
    const auto more = std::min<std::uint64_t>(end - position, some.size());
    resumed.draw(position, more, some.data(), some_draws.data());
    for (std::uint64_t k = 0; k < more; ++k) CHECK(some[k] < sources);
  }
}

void fuzz_permutation(Input& in) {
  const std::uint64_t n = in.one_in(8) ? in.hostile(std::uint64_t{1}) : in.below(in.one_in(8) ? 5000 : 200);
  const std::uint64_t key = in.bits();
  std::unique_ptr<Permutation> permutation;
  CHECK(refused([&] { permutation = std::make_unique<Permutation>(n, key); }) == (n == 0));
  if (n == 0) return;
  std::vector<std::uint64_t> images(std::min<std::uint64_t>(n, in.below(3000)));
  const std::uint64_t first = n - images.size();  // for all of them to be there
  const std::uint64_t start = in.one_in(8) ? in.hostile(n) : first < ~0ull ? in.below(first + 1) : in.bits();
  const bool fits = WideUnsigned{start} + images.size() <= n;
  CHECK(refused([&] { permutation->fill(start, images.size(), images.data()); }) == !fits);
  CHECK(refused([&] { (*permutation)(start); }) == (start >= n));
  if (!fits) return;
  for (std::size_t i = 0; i < images.size(); ++i) CHECK(images[i] < n && images[i] == (*permutation)(start + i));
  std::sort(images.begin(), images.end());
  CHECK(std::adjacent_find(images.begin(), images.end()) == images.end());
}

// With a toy for a tokenizer: the ids of a word are its bytes.
void fuzz_piece_cache(Input& in) {
  const bool adds_space = in.below(2);
  std::vector<std::uint8_t> joins(in.one_in(64) ? in.below(70'000) : 65536);
  auto random = in.generator();
  const std::uint64_t density = in.below(101), alphabet = 1 + in.below(256);
  for (auto& join : joins) join = random() % 100 < density;
  const std::size_t limit = in.one_in(32) ? in.hostile(std::size_t{4096}) : std::size_t{4096} << in.below(10);
  const bool fits = joins.size() == 65536 && limit >= 4096 && limit < std::size_t{1} << 31;
  std::unique_ptr<PieceCache> cache;
  CHECK(refused([&] { cache = std::make_unique<PieceCache>(joins, adds_space, limit); }) == !fits);
  if (!fits) return;
  for (auto batches = in.below(6); batches > 0; --batches) {
    std::vector<std::vector<char>> store(in.below(8));
    std::vector<std::string_view> texts;
    for (auto& text : store) {
      text.resize(in.one_in(16) ? in.below(20'000) : in.below(100));
      for (char& c : text) c = static_cast<char>(random() % alphabet);
      texts.emplace_back(text.data(), text.size());
    }
    const bool few = in.one_in(32), raises = in.one_in(32), short_offsets = in.one_in(64);
    const bool long_batch = !texts.empty() && texts[0].size() > 2000 && in.one_in(4);
    if (long_batch) texts.assign((std::size_t{1} << 31) / texts[0].size() + 1, texts[0]);
    bool asked = false;
    std::vector<std::int64_t> offsets(texts.size() + !short_offsets);
    std::vector<std::int32_t> ids;
    const auto encode = [&](const std::vector<std::string_view>& words) {
      asked = true;
      if (raises) throw std::invalid_argument("no tokenizer today");
      std::vector<std::vector<std::int32_t>> encoded;
      for (const std::string_view word : words) {
        CHECK(!word.empty());
        encoded.emplace_back();
        for (const char c : word) encoded.back().push_back(static_cast<unsigned char>(c));
      }
      if (few) encoded.pop_back();
      return encoded;
    };
    const auto allocate = [&](std::int64_t count) {
      ids.resize(static_cast<std::size_t>(count));
      return ids.data();
    };
    const bool failed = refused([&] { cache->encode(texts, offsets, encode, allocate); });
    CHECK(failed == (short_offsets || long_batch || (asked && (raises || few))));
    if (failed) continue;
    for (std::size_t i = 0; i < texts.size(); ++i) {
      auto at = static_cast<std::size_t>(offsets[i]);
      if (adds_space && !texts[i].empty()) CHECK(ids[at++] == ' ');
      for (const char c : texts[i]) CHECK(ids[at++] == static_cast<unsigned char>(c));
      CHECK(at == static_cast<std::size_t>(offsets[i + 1]));
    }
    CHECK(offsets.back() == std::ssize(ids));
  }
}

void fuzz_philox(Input& in) {
  const std::uint64_t seed = in.bits(), step = in.bits();
  const auto document = static_cast<std::int64_t>(in.bits());
  const auto position = static_cast<std::uint32_t>(in.bits(4));
  const std::int64_t count = in.between(-1, 9), dim = in.between(-1, 40);
  const std::size_t size = count < 0 || dim < 0 ? 0 : static_cast<std::size_t>(count * dim);
  std::vector<float> all(size), row(static_cast<std::size_t>(std::max<std::int64_t>(dim, 0)));
  neftune_uniform(seed, step, document, position, count, dim, all.data());
  for (std::int64_t r = 0; r < count && dim >= 0; ++r) {  // a row does not depend on those before it
    neftune_uniform(seed, step, document, position + static_cast<std::uint32_t>(r), 1, dim, row.data());
    CHECK(std::equal(row.begin(), row.end(), all.begin() + r * dim));
    for (const float value : row) CHECK(value > -1.0f && value < 1.0f && value != 0.0f);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input in({data, size});
  constexpr std::array kTargets{fuzz_assemble,    fuzz_checksum,    fuzz_packing, fuzz_mixture,
                                fuzz_permutation, fuzz_piece_cache, fuzz_philox};
  kTargets[in.below(kTargets.size())](in);
  return 0;
}

#ifndef TOKENMILL_LIBFUZZER
#include <sanitizer/common_interface_defs.h>

int main(int count, char** arguments) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(count > 1 ? std::atof(arguments[1]) : 1.0);
  const unsigned long first = number = count > 2 ? std::strtoul(arguments[2], nullptr, 10) : 0;
  __sanitizer_set_death_callback(tell);
  do {
    std::mt19937_64 random(number);
    std::vector<std::uint8_t> data(random() % 1024);
    for (auto& byte : data) byte = static_cast<std::uint8_t>(random());
    LLVMFuzzerTestOneInput(data.data(), data.size());
    ++number;
  } while (Clock::now() < end);
  std::printf("%lu inputs\n", number - first);
}
#endif

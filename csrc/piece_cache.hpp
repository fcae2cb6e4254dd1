// An exact cache in front of a tokenizer: texts are cut into words, and a word that was encoded before is not again.
//
// A text is cut between any two bytes that no piece of the vocabulary holds side by side: before most spaces, and
// around line ends and punctuation. Exact for a tokenizer whose ids of a text are then those of its words, one after
// the other; which ones are is for the caller to know (data/tokenizer.py).
//
// A batch asks the tokenizer once at most: each word is looked up, those that were not met are encoded together, and
// then the ids of all words are laid out.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tokenmill {

class PieceCache {
 public:
  // `joins` (256 * 256): whether some piece holds byte i / 256 before byte i % 256; a text is cut between two others.
  // `adds_space`: each text is encoded behind a space. About `limit` bytes are kept: beyond, words go uncached, and the
  // next batch begins afresh.
  PieceCache(std::span<const std::uint8_t> joins, bool adds_space, std::size_t limit)
      : adds_space_(adds_space), limit_(limit) {
    if (joins.size() != 256 * 256)
      throw std::invalid_argument("joins must have an entry for each of 256 * 256 pairs of bytes, got " +
                                  std::to_string(joins.size()));
    for (std::size_t pair = 0; pair < joins.size(); ++pair)
      joins_[pair / 64] |= std::uint64_t{joins[pair] != 0} << (pair % 64);
    if (limit < kSmallest || limit > kLargest)
      throw std::invalid_argument("limit must be between " + std::to_string(kSmallest) + " and " +
                                  std::to_string(kLargest) + " bytes, got " + std::to_string(limit));
    clear();
  }

  // The ids of texts laid end to end, text i from offsets[i] to offsets[i + 1]. `encode_words` is asked for the ids of
  // words that are not cached, a list each; `allocate` for room for as many ids as there are in all. Calls take turns.
  template <class Encode, class Allocate>
  void encode(std::span<const std::string_view> texts, std::span<std::int64_t> offsets, Encode&& encode_words,
              Allocate&& allocate) {
    if (offsets.size() != texts.size() + 1)
      throw std::invalid_argument("offsets must have one entry more than there are texts");
    const std::lock_guard lock(mutex_);
    Words found = find(texts);
    if (!found.missing.empty()) fill(found, encode_words(found.missing));
    count(found, offsets.data());
    write(found, allocate(offsets.back()));
  }

  std::size_t size() const { return words_.size(); }

 private:
  static constexpr std::uint32_t kOnce = std::uint32_t{1} << 31;  // not cached, or no room to
  static constexpr std::size_t kLongest = 64;  // bytes; longer ones hardly come twice (text without spaces, base64)
  static constexpr std::size_t kSmallest = 1 << 12, kLargest = (std::size_t{1} << 31) - 1;

  struct Word {  // offsets into texts_ and ids_
    std::uint32_t text, size, ids, count;
  };
  struct Slot {  // of the hash table: half of the hash, and the number of a word, kOnce where there is none
    std::uint32_t tag, word;
  };

  // The words of a batch. Views are into its texts, and into `openings`.
  struct Words {
    std::vector<std::uint32_t> words;       // in order: a cached word, or kOnce + i for ids[i]
    std::vector<std::size_t> ends;          // where the words of each text end
    std::vector<std::string_view> missing;  // to be encoded
    std::vector<std::uint32_t> homes;       // of each missing word: the cached word it becomes, or kOnce
    std::deque<std::string> openings;       // missing words that begin a text, behind the space they get
    std::vector<std::vector<std::int32_t>> ids;  // of the missing words, from the tokenizer
  };

  Words find(std::span<const std::string_view> texts) {
    std::size_t bytes = 0;
    for (const std::string_view text : texts) {
      if (text.size() >= kLargest - bytes)
        throw std::invalid_argument("a batch of 2**31 bytes of text or more: pass fewer texts at once");
      bytes += text.size() + 1;
    }
    if (full_ || unfilled_) clear();
    unfilled_ = true;  // until all of it has ids: a batch that fails in between leaves a cache that begins afresh
    Words found;
    found.ends.reserve(texts.size());
    found.words.reserve(bytes / 4);
    for (const std::string_view text : texts) {
      const char *begin = text.data(), *const end = begin + text.size();
      if (adds_space_ && begin < end) begin = find_opening(text, found);
      while (begin < end) {
        const char* const stop = word_end(begin, end);
        find_word({begin, static_cast<std::size_t>(stop - begin)}, found);
        begin = stop;
      }
      found.ends.push_back(found.words.size());
    }
    unfilled_ = !found.missing.empty();
    return found;
  }

  void fill(Words& found, std::vector<std::vector<std::int32_t>> ids) {
    if (ids.size() != found.missing.size())
      throw std::invalid_argument("the ids of " + std::to_string(ids.size()) + " words came back for " +
                                  std::to_string(found.missing.size()));
    for (std::size_t i = 0; i < ids.size(); ++i)
      if (found.homes[i] != kOnce) set_ids(found.homes[i], ids[i]);
    found.ids = std::move(ids);
    unfilled_ = false;
  }

  // offsets (texts + 1,): where the ids of each text begin.
  void count(const Words& found, std::int64_t* offsets) const {
    std::int64_t total = *offsets = 0;
    std::size_t word = 0;
    for (const std::size_t end : found.ends) {
      for (; word < end; ++word) total += static_cast<std::int64_t>(ids_of(found, found.words[word]).size());
      *++offsets = total;
    }
  }

  void write(const Words& found, std::int32_t* out) const {
    for (const std::uint32_t word : found.words)
      for (const std::int32_t id : ids_of(found, word)) *out++ = id;
  }

  void clear() {
    words_.clear();
    texts_.clear();
    ids_.clear();
    slots_.assign(1 << 10, {0, kOnce});
    used_ = 0;
    full_ = unfilled_ = false;
  }

  bool joined(char left, char right) const {
    const std::size_t pair = std::size_t{static_cast<unsigned char>(left)} << 8 | static_cast<unsigned char>(right);
    return joins_[pair / 64] >> (pair % 64) & 1;
  }

  const char* word_end(const char* p, const char* end) const {
    for (++p; p < end && joined(p[-1], *p);) ++p;
    return p;
  }

  // The first word of a text behind a space; where the rest of the text begins.
  const char* find_opening(std::string_view text, Words& found) {
    const char* const begin = text.data();
    const char* const stop = joined(' ', *begin) ? word_end(begin, begin + text.size()) : begin;
    std::string opening = " ";
    opening.append(begin, stop);
    const std::size_t missing = found.missing.size();
    find_word(opening, found);
    if (found.missing.size() > missing) found.missing.back() = found.openings.emplace_back(std::move(opening));
    return stop;
  }

  static std::uint64_t hash(std::string_view text) {
    constexpr std::uint64_t kOdd = 0x9e3779b97f4a7c15;
    const auto mix = [](std::uint64_t value) { return (value ^ (value >> 32)) * kOdd; };
    const char* p = text.data();
    std::size_t left = text.size();
    std::uint64_t h = left, part;
    for (; left >= 8; left -= 8, p += 8) {
      std::memcpy(&part, p, 8);
      h = mix(h ^ part);
    }
    part = 0;
    for (std::size_t i = 0; i < left; ++i) part = part << 8 | static_cast<unsigned char>(p[i]);
    h = mix(mix(h ^ part));
    return h ^ (h >> 32);
  }

  // The slot of a text, or the empty one where it would go.
  std::size_t probe(std::string_view text, std::uint64_t h) const {
    const auto tag = static_cast<std::uint32_t>(h >> 32);
    std::size_t slot = h & (slots_.size() - 1);
    for (; slots_[slot].word != kOnce; slot = (slot + 1) & (slots_.size() - 1))
      if (slots_[slot].tag == tag && text_of(words_[slots_[slot].word]) == text) break;
    return slot;
  }

  void find_word(std::string_view text, Words& found) {
    if (text.size() > kLongest) return miss(text, kOnce, found);
    const std::uint64_t h = hash(text);
    const std::size_t slot = probe(text, h);
    if (slots_[slot].word != kOnce) found.words.push_back(slots_[slot].word);
    else miss(text, insert(slot, text, h), found);
  }

  static void miss(std::string_view text, std::uint32_t home, Words& found) {
    found.words.push_back(home == kOnce ? kOnce + static_cast<std::uint32_t>(found.missing.size()) : home);
    found.homes.push_back(home);
    found.missing.push_back(text);
  }

  // A new word, still without ids; kOnce where there is no room.
  std::uint32_t insert(std::size_t slot, std::string_view text, std::uint64_t h) {
    // At most as many ids as bytes, but three where a space is unknown; up to four slots a word, six while they grow.
    used_ += sizeof(Word) + 6 * sizeof(Slot) + text.size() + 3 * text.size() * sizeof(std::int32_t);
    if (used_ > limit_) {
      full_ = true;
      return kOnce;
    }
    const auto word = static_cast<std::uint32_t>(words_.size());
    words_.push_back({static_cast<std::uint32_t>(texts_.size()), static_cast<std::uint32_t>(text.size()), 0, 0});
    texts_.append(text);
    slots_[slot] = {static_cast<std::uint32_t>(h >> 32), word};
    if (2 * words_.size() > slots_.size()) grow();
    return word;
  }

  void grow() {
    slots_.assign(2 * slots_.size(), {0, kOnce});
    for (std::uint32_t word = 0; word < words_.size(); ++word) {
      const std::uint64_t h = hash(text_of(words_[word]));
      slots_[probe(text_of(words_[word]), h)] = {static_cast<std::uint32_t>(h >> 32), word};
    }
  }

  void set_ids(std::uint32_t word, std::span<const std::int32_t> ids) {
    words_[word].ids = static_cast<std::uint32_t>(ids_.size());
    words_[word].count = static_cast<std::uint32_t>(ids.size());
    ids_.insert(ids_.end(), ids.begin(), ids.end());
  }

  std::string_view text_of(const Word& word) const { return {texts_.data() + word.text, word.size}; }

  std::span<const std::int32_t> ids_of(const Words& found, std::uint32_t word) const {
    if (word & kOnce) return found.ids[word - kOnce];
    return {ids_.data() + words_[word].ids, words_[word].count};
  }

  std::array<std::uint64_t, 256 * 256 / 64> joins_{};
  bool adds_space_;
  std::size_t limit_, used_ = 0;
  bool full_ = false, unfilled_ = false;
  std::vector<Slot> slots_;  // open addressing; a power of two, at most half of them taken
  std::vector<Word> words_;
  std::string texts_;
  std::vector<std::int32_t> ids_;
  std::mutex mutex_;
};

}  // namespace tokenmill

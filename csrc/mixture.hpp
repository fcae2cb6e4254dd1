// Which source each sample comes from: at every prefix, each source's count is within 1 of its exact share, also where
// the shares change on the way.
//
// The chairman assignment of R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): a source
// is owed the sum of its shares so far less the samples that it gave. Among the sources that are owed at least
// 1 / (2m - 2), take the one that would be the first to be owed more than 1 - 1 / (2m - 2). No count is then further
// than that from its share, for m sources. All in integers, so it is exact at any length and on any machine. The counts
// are its whole state: with them it goes on from anywhere at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace tokenmill {

class Mixture {
 public:
  static constexpr std::uint64_t kWhole = std::uint64_t{1} << 62;  // a share of 1

  // From sample starts[p] on, source i has the share shares[p * m + i] / kWhole. Where a last phase shares out nothing,
  // the samples end.
  Mixture(std::span<const std::uint64_t> starts, std::span<const std::uint64_t> shares)
      : starts_(starts.begin(), starts.end()), shares_(shares.begin(), shares.end()) {
    const std::size_t phases = starts_.size();
    if (phases == 0 || starts_[0] != 0 || std::adjacent_find(starts_.begin(), starts_.end(), std::greater_equal{}) !=
                                              starts_.end())
      throw std::invalid_argument("the phases of a mixture must start at sample 0 and then later and later");
    m_ = shares_.size() / phases;
    if (m_ < 1 || m_ > 65535 || shares_.size() % phases)
      throw std::invalid_argument("a mixture needs 1 to 65535 sources in every phase");
    due_.assign(shares_.size(), 0);
    for (std::size_t p = 0; p < phases; ++p) {
      Wide sum = 0;
      for (std::size_t i = 0; i < m_; ++i) {
        sum += share(p, i);
        if (p > 0) due_[p * m_ + i] = due_[(p - 1) * m_ + i] + Wide{share(p - 1, i)} * (starts_[p] - starts_[p - 1]);
      }
      if (sum == 0 && p > 0 && p + 1 == phases) end_ = starts_[p];
      else if (sum != kWhole)
        throw std::invalid_argument("the shares of phase " + std::to_string(p) + " do not add up to the whole");
    }
    slack_ = m_ > 1 ? kWhole / (2 * m_ - 2) : 0;
    counts_.assign(m_, 0);
    releases_.resize(m_);
    deadlines_.resize(m_);
    for (std::size_t i = 0; i < m_; ++i) plan(i);
  }

  std::size_t sources() const { return m_; }
  const std::vector<std::uint64_t>& counts() const { return counts_; }

  // Go on from sample `position`, before which source i gave counts[i]: as a draw from there on would leave it.
  void seek(std::uint64_t position, std::span<const std::uint64_t> counts) {
    bool near = counts.size() == m_ && position <= end_;
    const std::size_t p = phase(position);
    Wide total = 0;
    for (std::size_t i = 0; near && i < m_; ++i) {
      const Wide due = due_[p * m_ + i] + Wide{share(p, i)} * (position - starts_[p]), given = Wide{counts[i]} * kWhole;
      near = given < due + kWhole && due < given + kWhole;
      total += counts[i];
    }
    if (!near || total != position)
      throw std::invalid_argument("these counts are not those of the mixture at sample " + std::to_string(position));
    std::copy(counts.begin(), counts.end(), counts_.begin());
    position_ = position;
    for (std::size_t i = 0; i < m_; ++i) plan(i);
  }

  // Sample `start` and the `count - 1` after it: the source of each, and how many samples of that source came before.
  // Where it stands is remembered, so going on is cheap; any other start is reached by going through what is before.
  void draw(std::uint64_t start, std::uint64_t count, std::uint16_t* sources, std::uint64_t* draws) {
    if (start > end_ || count > end_ - start)
      throw std::invalid_argument("the sources run out at sample " + std::to_string(end_));
    if (start < position_) {
      position_ = 0;
      std::fill(counts_.begin(), counts_.end(), 0);
      for (std::size_t i = 0; i < m_; ++i) plan(i);
    }
    while (position_ < start) next();
    for (std::uint64_t i = 0; i < count; ++i) {
      const std::size_t source = next();
      sources[i] = static_cast<std::uint16_t>(source);
      draws[i] = counts_[source] - 1;
    }
  }

 private:
  __extension__ using Wide = unsigned __int128;
  static constexpr std::uint64_t kNever = std::numeric_limits<std::uint64_t>::max();

  std::uint64_t share(std::size_t p, std::size_t i) const { return shares_[p * m_ + i]; }

  // The phase that the sample after the first `position` is in.
  std::size_t phase(std::uint64_t position) const {
    return static_cast<std::size_t>(std::upper_bound(starts_.begin(), starts_.end(), position) - starts_.begin()) - 1;
  }

  // After how many samples source i is due `wanted`, in shares of kWhole.
  std::uint64_t reach(std::size_t i, Wide wanted) const {
    std::size_t p = starts_.size() - 1;
    while (p > 0 && due_[p * m_ + i] >= wanted) --p;
    if (share(p, i) == 0) return kNever;  // only the last phase: any other one reaches beyond `wanted`
    const Wide left = wanted - due_[p * m_ + i];
    const Wide after = left / share(p, i) + (left % share(p, i) != 0);
    return after < kNever - starts_[p] ? starts_[p] + static_cast<std::uint64_t>(after) : kNever;
  }

  // When source i may give its next sample, and when it would be owed too much without.
  void plan(std::size_t i) {
    const Wide given = Wide{counts_[i]} * kWhole;
    releases_[i] = reach(i, given + std::max<std::uint64_t>(slack_, 1));
    deadlines_[i] = std::min(reach(i, given + kWhole - slack_ + 1), kNever - 1);
  }

  std::size_t next() {
    ++position_;
    std::size_t first = 0;
    std::uint64_t earliest = kNever;
    for (std::size_t i = 0; i < m_; ++i) {
      const std::uint64_t deadline = releases_[i] <= position_ ? deadlines_[i] : kNever;  // one of them has to be chosen
      first = deadline < earliest ? i : first;
      earliest = std::min(deadline, earliest);
    }
    ++counts_[first];
    plan(first);
    return first;
  }

  std::vector<std::uint64_t> starts_, shares_;  // (P,), (P, m)
  std::vector<Wide> due_;                       // (P, m) what each source is due before each phase
  std::uint64_t slack_ = 0, end_ = kNever, position_ = 0;
  std::size_t m_ = 0;
  std::vector<std::uint64_t> counts_, releases_, deadlines_;  // (m,)
};

}  // namespace tokenmill

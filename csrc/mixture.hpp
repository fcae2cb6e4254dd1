// Which source each sample comes from: at every prefix, each source's count is within 1 of its exact share.
//
// The chairman assignment of R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): among
// the sources that are owed at least 1 / (2m - 2) of a sample, take the one that would be the first to be owed too
// much. No count is then further than 1 - 1 / (2m - 2) from its share, for m sources.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace tokenmill {

class Mixture {
 public:
  explicit Mixture(std::vector<double> weights) : shares_(std::move(weights)), counts_(shares_.size(), 0) {
    if (shares_.empty() || shares_.size() > 65535)
      throw std::invalid_argument("a mixture needs 1 to 65535 sources, got " + std::to_string(shares_.size()));
    for (const double weight : shares_)
      if (!std::isfinite(weight) || weight <= 0)
        throw std::invalid_argument("the weight of a source must be positive and finite, got " +
                                    std::to_string(weight));
    const double total = std::accumulate(shares_.begin(), shares_.end(), 0.0);
    for (double& share : shares_)
      if (!((share /= total) > 0)) throw std::invalid_argument("the weights of the sources are too far apart");
  }

  // Sample `start` and the `count - 1` after it: the source of each, and how many samples of that source came before.
  // Where it stands is remembered, so going on is cheap; any other start is reached by going through what is before.
  void draw(std::uint64_t start, std::uint64_t count, std::uint16_t* sources, std::uint64_t* draws) {
    if (start < position_) {
      std::fill(counts_.begin(), counts_.end(), 0);
      position_ = 0;
    }
    while (position_ < start) ++counts_[next()];
    for (std::uint64_t i = 0; i < count; ++i) {
      const std::size_t source = next();
      sources[i] = static_cast<std::uint16_t>(source);
      draws[i] = counts_[source]++;
    }
  }

 private:
  std::size_t next() {
    const double n = static_cast<double>(++position_), m = static_cast<double>(shares_.size());
    const double slack = shares_.size() > 1 ? 1 / (2 * m - 2) : 0.0;
    const double enough = slack - 1e-6;  // below the bound by more than fp64 rounds, so that some source has it
    std::size_t first = 0;
    double earliest = std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < shares_.size(); ++i) {
      const double owed = shares_[i] * n - static_cast<double>(counts_[i]);
      const double deadline = (1 - slack - owed) / shares_[i];
      if (owed >= enough && deadline < earliest) {
        earliest = deadline;
        first = i;
      }
    }
    return first;
  }

  std::vector<double> shares_;
  std::vector<std::uint64_t> counts_;
  std::uint64_t position_ = 0;
};

}  // namespace tokenmill

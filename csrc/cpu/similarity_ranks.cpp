// diffgap::similarity_ranks on the CPU; diffgap/ops/similarity.py has the definition.
//
// The best positive's score is found first, then one pass over all pairs counts the scores above and equal to it.
// Both take their scores from the same micro-kernel, in which a score depends on its two rows alone, so that equal
// rows tie and the positives themselves can be told from the other rows by counting.
#include <numeric>

#include "cpu/pairs.h"

namespace diffgap {
namespace {

// NaN ranks last.
DIFFGAP_HD float ordered(float score) { return score == score ? score : -kInfinity; }

struct Ranks {
  float* target;   // score of the best positive
  int64_t* above;  // scores higher than it
  int64_t* tied;   // other rows that score the same
  int64_t* best;   // positives that score the same
};

// Rows of a matrix in an order of their own.
template <typename T>
struct Gathered {
  Rows<T> rows;
  const int64_t* order;
  DIFFGAP_HD const T* operator()(int i) const { return rows.row(order[i]); }
};

// Positions of rows in the order of their ids.
std::vector<int64_t> order_by(const int64_t* ids, int64_t count) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return ids[x] < ids[y]; });
  return order;
}

// At most kLeft queries of one id, and the gallery rows of that id: ranges of the two orders.
struct Answers {
  int64_t query, gallery;
  int queries;
  int64_t rows;
};

std::vector<Answers> answers_of(const int64_t* ids_q, const std::vector<int64_t>& queries, const int64_t* ids_g,
                                const std::vector<int64_t>& gallery) {
  std::vector<Answers> found;
  const int64_t n = queries.size(), m = gallery.size();
  for (int64_t i = 0, j = 0; i < n;) {
    const int64_t id = ids_q[queries[i]];
    int64_t last = i, end;
    while (last < n && ids_q[queries[last]] == id) ++last;
    while (j < m && ids_g[gallery[j]] < id) ++j;
    for (end = j; end < m && ids_g[gallery[end]] == id;) ++end;
    for (; i < last; i += kLeft) {
      found.push_back({i, j, static_cast<int>(std::min<int64_t>(kLeft, last - i)), end - j});
    }
    i = last;
    j = end;
  }
  return found;
}

template <typename T>
struct FindTargets {
  template <int lanes>
  static DIFFGAP_HD void run(const Rows<T>& q, const Rows<T>& g, const Answers* answers, const int64_t* queries,
                             const int64_t* gallery, const Ranks& ranks, float* left, float* right, int64_t begin,
                             int64_t end) {
    alignas(64) float tile[kLeft * kRight];
    for (int64_t job = begin; job < end; ++job) {
      const Answers& of = answers[job];
      const int64_t* rows = queries + of.query;
      pack_transposed<kLeft>(Gathered<T>{q, rows}, of.queries, q.depth, left);
      for (int i = 0; i < of.queries; ++i) {
        ranks.target[rows[i]] = -kInfinity;
        ranks.best[rows[i]] = 0;
      }
      for (int64_t first = 0; first < of.rows; first += kRight) {
        const int columns = static_cast<int>(of.rows - first < kRight ? of.rows - first : kRight);
        pack_transposed<kRight>(Gathered<T>{g, gallery + of.gallery + first}, columns, g.depth, right);
        multiply_tile<lanes>(left, right, q.depth, false, tile, kRight);
        for (int i = 0; i < of.queries; ++i) {
          float& target = ranks.target[rows[i]];
          int64_t& best = ranks.best[rows[i]];
          for (int j = 0; j < columns; ++j) {
            const float score = ordered(tile[i * kRight + j]);
            if (score > target) best = 0;
            if (score >= target) {
              target = score;
              ++best;
            }
          }
        }
      }
    }
  }
};

struct CountEpilogue {
  Ranks ranks;

  DIFFGAP_HD void tile(const Place& at, const float* __restrict scores) const {
    for (int i = 0; i < at.rows; ++i) {
      const float* __restrict row = scores + i * kColumns;
      const float target = ranks.target[at.row + i];
      int32_t above = 0, equal = 0;
      if (at.columns == kColumns) {
        for (int j = 0; j < kColumns; ++j) {
          const float score = ordered(row[j]);
          above += score > target;
          equal += score == target;
        }
      } else {
        for (int j = 0; j < at.columns; ++j) {
          const float score = ordered(row[j]);
          above += score > target;
          equal += score == target;
        }
      }
      ranks.above[at.row + i] += above;
      ranks.tied[at.row + i] += equal;
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> similarity_ranks(const Tensor& q, const Tensor& g, const Tensor& ids_q,
                                                    const Tensor& ids_g) {
  const int64_t n = q.size(0), m = g.size(0);
  const Tensor own = index_of("ids_q", ids_q, n), other = index_of("ids_g", ids_g, m);
  const Tensor above = zeros_of(own, ScalarType::Long), tied = zeros_of(own, ScalarType::Long);
  const Tensor best = zeros_of(own, ScalarType::Long);
  const Buffer<float> target(n);
  const Ranks ranks{target.data(), mutable_data_of<int64_t>(above), mutable_data_of<int64_t>(tied),
                    mutable_data_of<int64_t>(best)};
  const std::vector<int64_t> queries = order_by(data_of<int64_t>(own), n);
  const std::vector<int64_t> gallery = order_by(data_of<int64_t>(other), m);
  const std::vector<Answers> answers = answers_of(data_of<int64_t>(own), queries, data_of<int64_t>(other), gallery);
  for_rows(q, g, [&](const auto& x, const auto& y) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(x.data)>>;
    constexpr int64_t kGrain = 16;
    torch::stable::parallel_for(0, answers.size(), kGrain, [&](int64_t begin, int64_t end) {
      const Buffer<float> left(int64_t{kLeft} * x.depth), right(int64_t{kRight} * x.depth);
      run_lanes<FindTargets<T>>(x, y, answers.data(), queries.data(), gallery.data(), ranks, left.data(),
                                right.data(), begin, end);
    });
    visit_pairs(x, y, CountEpilogue{ranks}, [](int64_t, int) {});
  });
  for (int64_t i = 0; i < n; ++i) ranks.tied[i] -= ranks.best[i];
  return {above, tied, best};
}

}  // namespace
}  // namespace diffgap

STABLE_TORCH_LIBRARY_IMPL(diffgap, CPU, m) { m.impl("similarity_ranks", TORCH_BOX(&diffgap::similarity_ranks)); }

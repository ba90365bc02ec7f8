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

// The queries in the order of their ids, the gallery rows that answer any of them in that order too, and each
// query's range of the latter. Ranges of neighbours are the same or adjacent.
struct Answers {
  std::vector<int64_t> queries, gallery, begin, end;

  Answers(const int64_t* ids_q, int64_t n, const int64_t* ids_g, int64_t m) : queries(order_by(ids_q, n)) {
    const std::vector<int64_t> all = order_by(ids_g, m);
    begin.resize(n);
    end.resize(n);
    for (int64_t i = 0, j = 0; i < n; ++i) {
      const int64_t id = ids_q[queries[i]];
      const bool repeated = i > 0 && ids_q[queries[i - 1]] == id;
      begin[i] = repeated ? begin[i - 1] : static_cast<int64_t>(gallery.size());
      while (j < m && ids_g[all[j]] <= id) {
        if (ids_g[all[j]] == id) gallery.push_back(all[j]);
        ++j;
      }
      end[i] = gallery.size();
    }
  }
};

// The best positive of each query, a panel of queries at a time against all gallery rows that answer one of them.
template <typename T>
struct FindTargets {
  template <typename Width>
  static DIFFGAP_HD void run(const Rows<T>& q, const Rows<T>& g, const Answers& answers, const Ranks& ranks,
                             void* left_scratch, void* right_scratch, int64_t first_panel, int64_t last_panel) {
    using Operand = OperandOf<Width, T>;
    auto* left = as_operand<Operand>(left_scratch);
    auto* right = as_operand<Operand>(right_scratch);
    alignas(64) float tile[kLeft * kRight];
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const int64_t first = panel * kLeft;
      const int count = static_cast<int>(q.count - first < kLeft ? q.count - first : kLeft);
      pack_transposed<Operand, kLeft>(Gathered<T>{q, answers.queries.data() + first}, count, q.depth, left);
      for (int i = 0; i < count; ++i) ranks.target[answers.queries[first + i]] = -kInfinity;
      const int64_t stop = answers.end[first + count - 1];
      for (int64_t row = answers.begin[first]; row < stop; row += kRight) {
        const int columns = static_cast<int>(stop - row < kRight ? stop - row : kRight);
        pack_transposed<Operand, kRight>(Gathered<T>{g, answers.gallery.data() + row}, columns, g.depth, right);
        multiply_tile<Width, Operand>(left, right, q.depth, false, tile, kRight);
        for (int i = 0; i < count; ++i) {
          const int from = static_cast<int>(std::max<int64_t>(answers.begin[first + i] - row, 0));
          const int to = static_cast<int>(std::min<int64_t>(answers.end[first + i] - row, columns));
          best_of(tile + i * kRight, from, to, ranks, answers.queries[first + i]);
        }
      }
    }
  }

  static void best_of(const float* scores, int from, int to, const Ranks& ranks, int64_t query) {
    float& target = ranks.target[query];
    int64_t& best = ranks.best[query];
    for (int j = from; j < to; ++j) {
      const float score = ordered(scores[j]);
      if (score > target) best = 0;
      if (score >= target) {
        target = score;
        ++best;
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
  const Answers answers(data_of<int64_t>(own), n, data_of<int64_t>(other), m);
  for_rows(q, g, [&](const auto& x, const auto& y) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(x.data)>>;
    constexpr int64_t kGrain = 16;
    torch::stable::parallel_for(0, (n + kLeft - 1) / kLeft, kGrain, [&](int64_t begin, int64_t end) {
      const Buffer<float> left(int64_t{kLeft} * x.depth), right(int64_t{kRight} * x.depth);
      run_blocked<FindTargets<T>>(x, y, answers, ranks, static_cast<void*>(left.data()),
                                  static_cast<void*>(right.data()), begin, end);
    });
    visit_pairs(x, y, CountEpilogue{ranks}, [](int64_t, int) {});
  });
  for (int64_t i = 0; i < n; ++i) ranks.tied[i] -= ranks.best[i];
  return {above, tied, best};
}

}  // namespace
}  // namespace diffgap

STABLE_TORCH_LIBRARY_IMPL(diffgap, CPU, m) { m.impl("similarity_ranks", TORCH_BOX(&diffgap::similarity_ranks)); }

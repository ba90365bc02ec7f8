// diffgap::similarity_topk on the CPU; diffgap/ops/similarity.py has the definition.
//
// Each query keeps a list of candidates. A score enters if it is above the query's threshold; a full list is cut to
// its best k, whose last score is the next threshold. The gallery goes by in ascending order, so a later row of the
// threshold's score ranks behind what is there and need not enter.
#include "cpu/pairs.h"

namespace diffgap {
namespace {

struct Candidate {
  float score;
  int32_t index;
};

inline bool precedes(const Candidate& x, const Candidate& y) {
  return x.score != y.score ? x.score > y.score : x.index < y.index;
}

struct Candidates {
  int k;
  int capacity;  // of a list; a tile's scores fit in behind k
  Candidate* lists;
  int* counts;
  float* thresholds;

  // Keeps the best k of query `row`'s list, unordered but for the last.
  void cut(int64_t row) const {
    Candidate* list = lists + row * capacity;
    std::nth_element(list, list + k - 1, list + counts[row], precedes);
    counts[row] = k;
    thresholds[row] = list[k - 1].score;
  }
};

struct SelectEpilogue {
  Candidates candidates;

  DIFFGAP_HD void tile(const Place& at, const float* __restrict scores) const {
    for (int i = 0; i < at.rows; ++i) {
      const int64_t row = at.row + i;
      const float* __restrict values = scores + i * kColumns;
      int& count = candidates.counts[row];
      const float threshold = candidates.thresholds[row];
      int32_t found = count < candidates.k;  // until then, everything enters, NaN and -inf too
      for (int j = 0; j < kColumns; ++j) found |= values[j] > threshold;
      if (!found) continue;
      Candidate* list = candidates.lists + row * candidates.capacity;
      for (int j = 0; j < at.columns; ++j) {
        const float score = values[j] == values[j] ? values[j] : -kInfinity;
        if (score > threshold || count < candidates.k) {
          list[count++] = {score, static_cast<int32_t>(at.column + j)};
        }
      }
      if (count > candidates.capacity - kColumns) candidates.cut(row);
    }
  }
};

std::tuple<Tensor, Tensor> similarity_topk(const Tensor& q, const Tensor& g, int64_t k) {
  const int64_t n = q.size(0), m = g.size(0);
  STD_TORCH_CHECK(k >= 1 && k <= m, "k: expected 1 to ", m, ", got ", k);
  STD_TORCH_CHECK(m <= std::numeric_limits<int32_t>::max(), "g: more than 2**31 - 1 rows");
  const Tensor values = empty_of(q, {n, k}, ScalarType::Float), indices = empty_of(q, {n, k}, ScalarType::Long);
  // Twice k, so that a list is cut once in k entries. As many queries at a time as keep the lists within 16 MiB,
  // but enough to share the work of packing the gallery among them.
  const int64_t capacity = 2 * k + 2 * kColumns;
  const int64_t fitting = (int64_t{16} << 20) / (capacity * static_cast<int64_t>(sizeof(Candidate)));
  const int64_t most = std::max<int64_t>(fitting / kGroup * kGroup, int64_t{kGroup} * torch::stable::get_num_threads());
  const int64_t step = std::min(std::max<int64_t>(most, 4 * kGroup), std::max<int64_t>(n, 1));
  const Buffer<Candidate> lists(step * capacity);
  const Buffer<int> counts(step);
  const Buffer<float> thresholds(step);
  const Candidates candidates{static_cast<int>(k), static_cast<int>(capacity), lists.data(), counts.data(),
                              thresholds.data()};
  float* out = mutable_data_of<float>(values);
  int64_t* out_index = mutable_data_of<int64_t>(indices);
  for_rows(q, g, [&](const auto& x, const auto& y) {
    for (int64_t first = 0; first < n; first += step) {
      const auto queries = x.slice(first, std::min(step, n - first));
      std::fill_n(counts.data(), queries.count, 0);
      std::fill_n(thresholds.data(), queries.count, -kInfinity);
      visit_pairs(queries, y, SelectEpilogue{candidates}, [](int64_t, int) {});
      torch::stable::parallel_for(0, queries.count, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          candidates.cut(i);
          Candidate* list = lists.data() + i * capacity;
          std::sort(list, list + k, precedes);
          for (int64_t j = 0; j < k; ++j) {
            out[(first + i) * k + j] = list[j].score;
            out_index[(first + i) * k + j] = list[j].index;
          }
        }
      });
    }
  });
  return {values, indices};
}

}  // namespace
}  // namespace diffgap

STABLE_TORCH_LIBRARY_IMPL(diffgap, CPU, m) { m.impl("similarity_topk", TORCH_BOX(&diffgap::similarity_topk)); }

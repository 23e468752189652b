// Drafts of a small model, token after token in one call: a forward of such a model takes less time
// than the interpreter between two of them.
#include <cmath>
#include <limits>
#include <vector>

#include "decoder.h"
#include "linear.h"
#include "stages.h"
#include "truncation.h"

using namespace native;

extern "C" {

// Mirror of the structure in `chain.py`. Rows are the sequences that draft: the first rows of `step`,
// which reads the last token of each. Arrays hold one entry a row, those of parameters one a slot.
struct NativeChain {
    const NativeProjection* head;
    const int64_t* slot;
    const int64_t* length;  // known tokens: the position of the first draft
    const int64_t* most;    // drafts, at least 1
    const float* temperature;
    const float* log_min_p;
    const int64_t* top_k;
    const double* top_p;
    const int64_t* seed;
    const int64_t* choice;
    const int32_t* page_table;  // [rows, table_stride], up to the last draft
    int64_t table_stride;
    int64_t rows, width;  // width: of `tokens` and `confidence`
    int64_t vocab;        // ids from here on are not drawn
    double least;         // the product of confidences down to which a row drafts on
    int64_t* tokens;      // [rows, width]
    float* confidence;    // [rows, width]
    int64_t* others;      // [rows, width], or null: what would be drawn if the draft could not be
    int64_t* counts;      // drafts made
};
}

namespace {

// exp(x[token] - log(sum(exp(x)))).
float probability(const float* x, int64_t vocab, int64_t token, float top) {
    Floats sum{};
    int64_t i = 0;
    for (; i + kLanes <= vocab; i += kLanes) sum += native::exp(load(x + i) - top);
    float total = 0;
    for (int j = 0; j < kLanes; j++) total += sum[j];
    for (; i < vocab; i++) total += std::exp(x[i] - top);
    return std::exp(x[token] - top) / total;
}

template <class T>
class Chain {
  public:
    Chain(const NativeModel& model, const NativeStep& first, const NativeChain& chain, int threads)
        : model_(model), chain_(chain), threads_(threads), head_{(const uint32_t*)chain.head->packed,
          chain.head->bias, chain.head->columns, chain.head->inner, chain.head->type != 0},
          vocab_(std::min(chain.vocab, chain.head->columns)), belief_(chain.rows, 1.0),
          logits_(chain.rows * chain.head->columns) {
        for (int64_t r = 0; r < chain.rows; r++) {
            chain.counts[r] = 0;
            alive_.push_back(r);
        }
        native_decoder_step(&model, &first, threads);
        draw((const T*)first.out);
        hidden_.resize(chain.rows * model.hidden);
        while (!alive_.empty()) {
            feed(first);
            draw(hidden_.data());
        }
    }

  private:
    // A draft for each row that is alive, from its hidden state; those that are done leave.
    void draw(const T* hidden) {
        const int64_t rows = alive_.size(), columns = head_.columns;
        parallel_pieces(
            threads_, columns * head_.inner, head_.pieces(rows, threads_),
            [&](Share piece) { linear(head_, hidden, logits_.data(), rows, piece); });
        size_t staying = 0;  // these move up, over those that were read already
        for (int64_t i = 0; i < rows; i++) {
            const int64_t r = alive_[i], count = chain_.counts[r]++;
            float* x = logits_.data() + i * columns;
            const TiledRow row(x, vocab_, maxima_);
            const int64_t slot = chain_.slot[r];
            const Draw by{chain_.temperature[slot], chain_.log_min_p[slot], chain_.top_k[slot],
                          chain_.top_p[slot], (uint64_t)chain_.seed[slot],
                          (uint32_t)chain_.choice[slot], (uint32_t)(chain_.length[r] + count)};
            const int64_t token = choose(row, vocab_, by, found_);
            const float sure = row.usable ? probability(x, vocab_, token, row.top) : 0;
            chain_.tokens[r * chain_.width + count] = token;
            chain_.confidence[r * chain_.width + count] = sure;
            if (chain_.others) {
                x[token] = -std::numeric_limits<float>::infinity();
                const TiledRow rest(x, vocab_, maxima_);
                chain_.others[r * chain_.width + count] = choose(rest, vocab_, by, found_);
            }
            belief_[r] *= sure;
            if (count + 1 < chain_.most[r] && belief_[r] >= chain_.least) alive_[staying++] = r;
        }
        alive_.resize(staying);
    }

    // The last draft of each row that is alive goes through the model.
    void feed(const NativeStep& first) {
        const int64_t rows = alive_.size(), stride = chain_.table_stride, size = model_.page_size;
        ids_.resize(rows), positions_.resize(rows), slots_.resize(rows);
        starts_.resize(rows + 1), table_.resize(rows * stride);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t r = alive_[i], last = chain_.counts[r] - 1;
            const int64_t position = chain_.length[r] + last;
            const int32_t* pages = chain_.page_table + r * stride;
            ids_[i] = chain_.tokens[r * chain_.width + last];
            positions_[i] = position;
            slots_[i] = (int64_t)pages[position / size] * size + position % size;
            starts_[i] = (int32_t)i;
            std::copy(pages, pages + position / size + 1, table_.data() + i * stride);
        }
        starts_[rows] = (int32_t)rows;
        const NativeStep step{ids_.data(), positions_.data(), slots_.data(), starts_.data(),
                              table_.data(), rows, rows, stride, first.workspace, hidden_.data(),
                              nullptr, -1, nullptr, nullptr, 0};
        native_decoder_step(&model_, &step, threads_);
    }

    const NativeModel& model_;
    const NativeChain& chain_;
    const int threads_;
    const Linear head_;
    const int64_t vocab_;
    std::vector<int64_t> alive_;
    std::vector<double> belief_;  // as exact as single steps have it, to stop where they do
    std::vector<float> logits_, maxima_;
    std::vector<T> hidden_;
    std::vector<int64_t> ids_, positions_, slots_;
    std::vector<int32_t> starts_, table_;
    Candidates found_;
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void native_draft_chain(const NativeModel* model, const NativeStep* first, const NativeChain* chain,
                        int threads) {
    if (model->type) Chain<bf16>(*model, *first, *chain, threads);
    else Chain<float>(*model, *first, *chain, threads);
}

}  // extern "C"
#pragma GCC visibility pop

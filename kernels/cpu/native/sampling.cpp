// The C interface of the sampler. Arrays hold one entry a row; see draw.h.
#include "truncation.h"

using namespace native;

namespace {

// logits: [rows, vocab]; draws: one a row, or null for the argmax. A row without a finite maximum
// gives 0. usable: [rows] 0 or 1, whether the maximum is finite and nothing is NaN.
void sample(const float* logits, const Draw* draws, int64_t* tokens, uint8_t* usable, int64_t rows,
            int64_t vocab, Share share) {
    thread_local std::vector<float> maxima;
    thread_local Candidates found;
    const Range range = part(rows, share);
    for (int64_t r = range.begin; r < range.end; r++) {
        const TiledRow row(logits + r * vocab, vocab, maxima);
        tokens[r] = choose(row, vocab, draws ? draws[r] : Draw{}, found);
        usable[r] = row.usable;
    }
}

// Elements of logits that are worth a second thread: to look at them is fast, and whoever forks waits
// for a core that another process may have.
constexpr int64_t kWorthLooking = 1 << 19, kWorthDrawing = 1 << 16;

template <class Work>
void by_row(int threads, int64_t elements, int64_t worth, Work work) {
    parallel(elements < worth ? 1 : threads, elements, work);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// temperature null: all rows are greedy, and nothing below it is read; 0: that row is. log_min_p
// null: no truncation, and top_k and top_p are not read.
void native_sample(const float* logits, int64_t* tokens, uint8_t* usable, int64_t rows,
                   int64_t vocab, const float* temperature, const int64_t* seed,
                   const int64_t* choice, const int64_t* position, const float* log_min_p,
                   const int64_t* top_k, const double* top_p, int threads) {
    std::vector<Draw> draws(temperature ? rows : 0);
    for (int64_t r = 0; r < (int64_t)draws.size(); r++)
        draws[r] = {temperature[r],
                    log_min_p ? log_min_p[r] : kNothing,
                    log_min_p ? top_k[r] : vocab,
                    log_min_p ? top_p[r] : 1.0,
                    (uint64_t)seed[r],
                    (uint32_t)choice[r],
                    (uint32_t)position[r]};
    const int64_t worth = temperature ? kWorthDrawing : kWorthLooking;
    by_row(threads, rows * vocab, worth, [&](Share share) {
        sample(logits, temperature ? draws.data() : nullptr, tokens, usable, rows, vocab, share);
    });
}

// usable: as in `sample`.
void native_usable(const float* logits, uint8_t* usable, int64_t rows, int64_t vocab,
                   int threads) {
    by_row(threads, rows * vocab, kWorthLooking, [&](Share share) {
        thread_local std::vector<float> maxima;
        const Range range = part(rows, share);
        for (int64_t r = range.begin; r < range.end; r++)
            usable[r] = TiledRow(logits + r * vocab, vocab, maxima).usable;
    });
}

}  // extern "C"
#pragma GCC visibility pop

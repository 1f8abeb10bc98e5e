/* Sums of m ln m over the joint bins of two units, m the rows in a bin, for all pairs of units and over several sets of rows.

   One unit meets a block of units at a time. The rows of a small set are compared with the earlier ones in the same bin of the unit:
   the k-th row of a joint bin adds k ln k - (k - 1) ln (k - 1). In a large set, bins are masks of rows, and the bits that two have
   in common are counted. */

#include <stdint.h>
#include <string.h>

typedef int64_t whole;

#if defined __AVX512BW__
enum { LANES = 64 }; /* units of a block: bytes that one instruction compares */
#elif defined __AVX2__
enum { LANES = 32 };
#else
enum { LANES = 16 };
#endif
enum { FEW = 255, PER_BIN = 10 }; /* most rows of a small set, of which counts fit in a byte */
typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

/* Comparing takes the square of the rows in a bin, so that few of them pay. */
static int small(whole rows, whole bins) { return rows <= FEW && rows <= PER_BIN * bins; }

static whole masked(whole rows, whole bins, whole width) { return small(rows, bins) ? 0 : (rows + 63) / 64 * bins * width; }

/* Numbers of the masks of all sets; ends: the row after the last one of each set. */
whole mask_numbers(const whole *ends, whole sets, whole bins, whole width) {
    whole sum = 0, first = 0;
    for (whole s = 0; s < sets; first = ends[s++]) sum += masked(ends[s] - first, bins, width);
    return sum;
}

/* The rows of the small sets, each in the order of the unit's bins, and how many rows of the same set and bin come before each. */
static whole arrange(const uint8_t *of, const whole *ends, whole sets, whole width, whole bins, int32_t *order, int32_t *before) {
    whole placed = 0, first = 0;
    for (whole s = 0; s < sets; first = ends[s++]) {
        if (!small(ends[s] - first, bins)) continue;
        for (whole bin = 0; bin < bins; bin++)
            for (whole r = first, k = 0; r < ends[s]; r++)
                if (of[r * width] == bin) order[placed] = (int32_t)r, before[placed++] = (int32_t)k++;
    }
    return placed;
}

/* Adds the terms of rows that are the second, third, ... of their joint bins, as many as found says, and empties it. */
static void empty(bytes *found, whole levels, const double *terms, double *sums) {
    for (whole k = 1; k < levels; k++) {
        double step = terms[k + 1] - terms[k];
        const uint8_t *count = (const uint8_t *)&found[k];
        for (int lane = 0; lane < LANES; lane++) sums[lane] += step * count[lane];
        memset(&found[k], 0, sizeof found[k]);
    }
}

static void compare(const uint8_t *of, whole width, const int32_t *order, const int32_t *before, whole rows, const double *terms, double *sums) {
    bytes found[FEW + 1];
    whole levels = 1, since = 0;
    memset(found, 0, sizeof found);
    for (whole t = 0; t < rows; t++, since++) {
        if (since == FEW) empty(found, levels, terms, sums), levels = 1, since = 0;
        bytes own = *(const bytes *)(of + order[t] * width), same = {0};
        for (whole back = 1; back <= before[t]; back++) same -= (bytes)(own == *(const bytes *)(of + order[t - back] * width));
        for (int k = 1; k <= before[t]; k++) found[k] -= (bytes)(same == (uint8_t)k);
        if (before[t] >= levels) levels = before[t] + 1;
    }
    empty(found, levels, terms, sums);
}

/* A unit's masks (words, bins, width), from its own column on, against those of a block. */
static void count(const uint64_t *own, const uint64_t *block, whole words, whole bins, whole width, const double *terms, double *sums) {
    for (whole a = 0; a < bins; a++)
        for (whole b = 0; b < bins; b++) {
            uint64_t both[LANES] = {0};
            for (whole w = 0; w < words; w++) {
                uint64_t bits = own[(w * bins + a) * width];
                const uint64_t *other = block + (w * bins + b) * width;
                for (int lane = 0; lane < LANES; lane++) both[lane] += __builtin_popcountll(bits & other[lane]);
            }
            for (int lane = 0; lane < LANES; lane++) sums[lane] += terms[both[lane]];
        }
}

/* Adds to sums (width, width), from the diagonal to the right. of: bins (rows, width), rows of a set one after another, the width a
   multiple of 64. terms: m ln m. masks: as many as mask_numbers says; scratch (threads, 2, rows). */
void add_terms(const uint8_t *of, const whole *ends, whole sets, whole width, whole bins, const double *terms, uint64_t *masks,
               int32_t *scratch, double *sums, int threads) {
    whole rows = sets ? ends[sets - 1] : 0, first = 0;
    uint64_t *next = masks;
    memset(masks, 0, mask_numbers(ends, sets, bins, width) * sizeof *masks);
    for (whole s = 0; s < sets; next += masked(ends[s] - first, bins, width), first = ends[s++])
        for (whole r = first; r < ends[s] && !small(ends[s] - first, bins); r++)
            for (whole j = 0; j < width; j++)
                next[((r - first) / 64 * bins + of[r * width + j]) * width + j] |= (uint64_t)1 << (r - first) % 64;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        int32_t *order = scratch + 2 * rows * thread, *before = order + rows;
        for (whole i = thread; i < width; i += threads) {
            whole few = arrange(of + i, ends, sets, width, bins, order, before);
            for (whole j = i / LANES * LANES; j < width; j += LANES) {
                double *out = sums + i * width + j;
                compare(of + j, width, order, before, few, terms, out);
                const uint64_t *at = masks;
                for (whole s = 0, from = 0; s < sets; at += masked(ends[s] - from, bins, width), from = ends[s++])
                    if (!small(ends[s] - from, bins)) count(at + i, at + j, (ends[s] - from + 63) / 64, bins, width, terms, out);
            }
        }
    }
}

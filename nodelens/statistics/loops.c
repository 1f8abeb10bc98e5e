/* The sums of reductions.py over rows on a CPU, each from one read. NUMBER is float or double.

   Rows are arrays without gaps: maps (samples, width, positions), where ``tokens`` is 0, or tokens (samples, positions, width).
   keep (samples, positions) is NULL where all rows count. Terms are added in the dtype of the rows within a block, blocks in double. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 256 /* positions whose terms are added in the dtype of the rows */
#define TILE 256  /* units of tokens whose sums stay in the cache */
#define UNITS 16  /* units of tokens that are counted at once, of so many rows */
#define ROWS 256

typedef NUMBER number;
typedef int64_t whole;

enum { SUMS, SQUARES, CUBES, FOURTHS, ABSOLUTES, NONZEROS, LARGEST, TABLES };

/* The larger one; NaN if one of them is. */
static inline number larger(number a, number b) { return a > b || a != a ? a : b; }

static void add_row(const number *row, const number *plain, number shift, whole n, int higher, int sizes, double *total) {
    number t1 = 0, t2 = 0, t3 = 0, t4 = 0, t5 = 0, t6 = 0, most = (number)total[LARGEST];
    if (higher) {
#pragma omp simd reduction(+ : t1, t2, t3, t4)
        for (whole p = 0; p < n; p++) {
            number c = row[p] - shift, q = c * c;
            t1 += c, t2 += q, t3 += q * c, t4 += q * q;
        }
    } else {
#pragma omp simd reduction(+ : t1, t2)
        for (whole p = 0; p < n; p++) {
            number c = row[p] - shift;
            t1 += c, t2 += c * c;
        }
    }
    if (sizes) {
#pragma omp simd reduction(+ : t5, t6) reduction(max : most)
        for (whole p = 0; p < n; p++) {
            number size = plain[p] < 0 ? -plain[p] : plain[p];
            t5 += size, t6 += size != 0 ? (number)1 : (number)0, most = size > most ? size : most;
        }
        if (t5 != t5) most = t5;
    }
    total[SUMS] += t1, total[SQUARES] += t2, total[CUBES] += t3, total[FOURTHS] += t4;
    total[ABSOLUTES] += t5, total[NONZEROS] += t6, total[LARGEST] = larger(total[LARGEST], most);
}

static void sums_of_maps(const number *raw, const uint8_t *keep, const number *shift, whole samples, whole width, whole positions,
                         int higher, int sizes, number *out) {
#pragma omp for collapse(2)
    for (whole s = 0; s < samples; s++)
        for (whole w = 0; w < width; w++) {
            const number *row = raw + (s * width + w) * positions;
            number about[BLOCK], plain[BLOCK];
            double total[TABLES] = {0};
            for (whole first = 0; first < positions; first += BLOCK) {
                whole n = positions - first < BLOCK ? positions - first : BLOCK;
                if (keep) {
                    const uint8_t *kept = keep + s * positions + first;
                    for (whole p = 0; p < n; p++) {
                        about[p] = kept[p] ? row[first + p] : shift[w];
                        plain[p] = kept[p] ? row[first + p] : (number)0;
                    }
                    add_row(about, plain, shift[w], n, higher, sizes, total);
                } else
                    add_row(row + first, row + first, shift[w], n, higher, sizes, total);
            }
            for (int k = 0; k < TABLES; k++) out[(k * samples + s) * width + w] = (number)total[k];
        }
}

static void sums_of_tokens(const number *raw, const uint8_t *keep, const number *shift, whole samples, whole width, whole positions,
                           int higher, int sizes, number *out) {
#pragma omp for collapse(2)
    for (whole s = 0; s < samples; s++)
        for (whole first = 0; first < width; first += TILE) {
            whole n = width - first < TILE ? width - first : TILE;
            number part[LARGEST][TILE], most[TILE];
            double total[LARGEST][TILE];
            memset(total, 0, sizeof total), memset(most, 0, sizeof most);
            for (whole begin = 0; begin < positions; begin += 32) {
                whole end = begin + 32 < positions ? begin + 32 : positions;
                memset(part, 0, sizeof part);
                for (whole p = begin; p < end; p++) {
                    if (keep && !keep[s * positions + p]) continue;
                    const number *row = raw + (s * positions + p) * width + first, *about = shift + first;
                    if (higher)
                        for (whole w = 0; w < n; w++) {
                            number c = row[w] - about[w], q = c * c;
                            part[SUMS][w] += c, part[SQUARES][w] += q, part[CUBES][w] += q * c, part[FOURTHS][w] += q * q;
                        }
                    else
                        for (whole w = 0; w < n; w++) {
                            number c = row[w] - about[w];
                            part[SUMS][w] += c, part[SQUARES][w] += c * c;
                        }
                    if (sizes)
                        for (whole w = 0; w < n; w++) {
                            number size = row[w] < 0 ? -row[w] : row[w];
                            part[ABSOLUTES][w] += size, part[NONZEROS][w] += size != 0 ? (number)1 : (number)0;
                            most[w] = larger(most[w], size);
                        }
                }
                for (int k = 0; k < LARGEST; k++)
                    for (whole w = 0; w < n; w++) total[k][w] += part[k][w];
            }
            for (int k = 0; k < LARGEST; k++)
                for (whole w = 0; w < n; w++) out[(k * samples + s) * width + first + w] = (number)total[k][w];
            for (whole w = 0; w < n; w++) out[(LARGEST * samples + s) * width + first + w] = most[w] >= 0 ? most[w] : (number)total[ABSOLUTES][w];
        }
}

static void norms_of_maps(const number *raw, const uint8_t *keep, const number *shift, whole samples, whole width, whole positions,
                          number *norms) {
#pragma omp for collapse(2)
    for (whole s = 0; s < samples; s++)
        for (whole first = 0; first < positions; first += BLOCK) {
            whole n = positions - first < BLOCK ? positions - first : BLOCK;
            number found[BLOCK] = {0};
            for (whole w = 0; w < width; w++) {
                const number *row = raw + (s * width + w) * positions + first;
                number about = shift[w];
#pragma omp simd
                for (whole p = 0; p < n; p++) {
                    number c = row[p] - about;
                    found[p] += c * c;
                }
            }
            for (whole p = 0; p < n; p++)
                norms[s * positions + first + p] = !keep || keep[s * positions + first + p] ? found[p] : (number)0;
        }
}

static void norms_of_tokens(const number *raw, const uint8_t *keep, const number *shift, whole samples, whole width,
                            whole positions, number *norms) {
#pragma omp for
    for (whole k = 0; k < samples * positions; k++) {
        const number *row = raw + k * width;
        double total = 0;
        for (whole first = 0; first < width && (!keep || keep[k]); first += BLOCK) {
            whole end = first + BLOCK < width ? first + BLOCK : width;
            number t = 0;
#pragma omp simd reduction(+ : t)
            for (whole w = first; w < end; w++) {
                number c = row[w] - shift[w];
                t += c * c;
            }
            total += t;
        }
        norms[k] = (number)total;
    }
}

static void skews_of_maps(const number *raw, const uint8_t *keep, const number *shift, whole samples, whole width, whole positions,
                          const number *norms, number *skews) {
#pragma omp for collapse(2)
    for (whole s = 0; s < samples; s++)
        for (whole w = 0; w < width; w++) {
            const number *row = raw + (s * width + w) * positions, *weights = norms + s * positions;
            const uint8_t *kept = keep ? keep + s * positions : NULL;
            number about = shift[w];
            double total = 0;
            for (whole first = 0; first < positions; first += BLOCK) {
                whole end = first + BLOCK < positions ? first + BLOCK : positions;
                number t = 0;
                if (kept)
                    for (whole p = first; p < end; p++) t += kept[p] ? (row[p] - about) * weights[p] : (number)0;
                else {
#pragma omp simd reduction(+ : t)
                    for (whole p = first; p < end; p++) t += (row[p] - about) * weights[p];
                }
                total += t;
            }
            skews[s * width + w] = (number)total;
        }
}

static void skews_of_tokens(const number *raw, const uint8_t *keep, const number *shift, whole samples, whole width,
                            whole positions, const number *norms, number *skews) {
#pragma omp for collapse(2)
    for (whole s = 0; s < samples; s++)
        for (whole first = 0; first < width; first += TILE) {
            whole n = width - first < TILE ? width - first : TILE;
            double total[TILE] = {0};
            for (whole begin = 0; begin < positions; begin += 32) {
                whole end = begin + 32 < positions ? begin + 32 : positions;
                number part[TILE] = {0};
                for (whole p = begin; p < end; p++) {
                    if (keep && !keep[s * positions + p]) continue;
                    const number *row = raw + (s * positions + p) * width + first, *about = shift + first;
                    number weight = norms[s * positions + p];
                    for (whole w = 0; w < n; w++) part[w] += (row[w] - about[w]) * weight;
                }
                for (whole w = 0; w < n; w++) total[w] += part[w];
            }
            for (whole w = 0; w < n; w++) skews[s * width + first + w] = (number)total[w];
        }
}

/* out (7, samples, width), norms (samples, positions), skews (samples, width): NULL for those that are not wanted. */
void reduce(const number *raw, const uint8_t *keep, const number *shift, whole samples, whole width, whole positions, int tokens,
            int higher, int sizes, number *out, number *norms, number *skews, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (out) (tokens ? sums_of_tokens : sums_of_maps)(raw, keep, shift, samples, width, positions, higher, sizes, out);
        if (norms) (tokens ? norms_of_tokens : norms_of_maps)(raw, keep, shift, samples, width, positions, norms);
        if (skews) (tokens ? skews_of_tokens : skews_of_maps)(raw, keep, shift, samples, width, positions, norms, skews);
    }
}

/* The smallest of the sizes from least on, INT32_MAX if there is none, and the largest of all: bits of floats. */
void ends(const int32_t *bits, const uint8_t *keep, whole samples, whole width, whole positions, int tokens, int32_t least,
          int32_t *found, int threads) {
    int32_t low = INT32_MAX, high = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(min : low) reduction(max : high)
    for (whole k = 0; k < (tokens ? samples * positions : samples * width); k++) {
        whole n = tokens ? width : positions;
        const int32_t *row = bits + k * n;
        const uint8_t *kept = keep && !tokens ? keep + k / width * positions : NULL;
        if (tokens && keep && !keep[k]) continue;
        if (kept)
            for (whole p = 0; p < n; p++) {
                int32_t size = kept[p] ? row[p] & INT32_MAX : 0;
                high = size > high ? size : high, low = size >= least && size < low ? size : low;
            }
        else {
#pragma omp simd reduction(min : low) reduction(max : high)
            for (whole p = 0; p < n; p++) {
                int32_t size = row[p] & INT32_MAX, other = size >= least ? size : INT32_MAX;
                high = size > high ? size : high, low = other < low ? other : low;
            }
        }
    }
    found[0] = low, found[1] = high;
}

/* The column of a float, given its bits: the leading ones are a piecewise linear logarithm of its size. */
static inline int32_t column(int32_t bits, int dropped, int32_t before, int32_t columns) {
    int32_t place = ((bits & INT32_MAX) >> dropped) - before;
    place = place > 0 ? place : 0;
    return place < columns ? place : columns - 1;
}

static inline void increase(void *counts, int bytes, whole place, int32_t by) {
    if (bytes == 2)
        ((int16_t *)counts)[place] += (int16_t)by;
    else if (bytes == 4)
        ((int32_t *)counts)[place] += by;
    else
        ((int64_t *)counts)[place] += by;
}

/* Neighbours often lie in the same bin, and would wait for each other: two tables take turns, unless there are few values. */
static void count_maps(const int32_t *bits, const uint8_t *keep, whole samples, whole width, whole positions, int dropped,
                       int32_t before, int32_t columns, void *counts, int bytes) {
    int32_t *even = calloc(2 * (size_t)columns, sizeof *even), *odd = even + columns, place[BLOCK];
    int few = samples * positions < 4 * columns;
#pragma omp for
    for (whole w = 0; w < width; w++) {
        for (whole s = 0; s < samples; s++)
            for (whole first = 0; first < positions; first += BLOCK) {
                whole n = positions - first < BLOCK ? positions - first : BLOCK, kept = 0;
                const int32_t *row = bits + (s * width + w) * positions + first;
#pragma omp simd
                for (whole p = 0; p < n; p++) place[p] = column(row[p], dropped, before, columns);
                if (keep) {
                    const uint8_t *known = keep + s * positions + first;
                    for (whole p = 0; p < n; p++) place[kept] = place[p], kept += known[p] != 0;
                    n = kept;
                }
                if (few)
                    for (whole p = 0; p < n; p++) increase(counts, bytes, w * columns + place[p], 1);
                else {
                    for (whole p = 0; p + 1 < n; p += 2) even[place[p]]++, odd[place[p + 1]]++;
                    if (n % 2) even[place[n - 1]]++;
                }
            }
        if (!few) {
            for (whole k = 0; k < columns; k++)
                if (even[k] + odd[k]) increase(counts, bytes, w * columns + k, even[k] + odd[k]);
            memset(even, 0, 2 * (size_t)columns * sizeof *even);
        }
    }
    free(even);
}

/* The columns of some rows are sorted by unit first, so that the counts of one unit at a time are read. */
static void count_tokens(const int32_t *bits, const uint8_t *keep, whole samples, whole width, whole positions, int dropped,
                         int32_t before, int32_t columns, void *counts, int bytes) {
    int32_t place[UNITS][ROWS];
#pragma omp for
    for (whole tile = 0; tile < (width + UNITS - 1) / UNITS; tile++) {
        whole first = tile * UNITS, n = width - first < UNITS ? width - first : UNITS;
        for (whole begin = 0; begin < samples * positions; begin += ROWS) {
            whole rows = 0;
            for (whole k = begin; k < begin + ROWS && k < samples * positions; k++) {
                if (keep && !keep[k]) continue;
                const int32_t *row = bits + k * width + first;
                for (whole w = 0; w < n; w++) place[w][rows] = column(row[w], dropped, before, columns);
                rows++;
            }
            for (whole w = 0; w < n; w++)
                for (whole k = 0; k < rows; k++) increase(counts, bytes, (first + w) * columns + place[w][k], 1);
        }
    }
}

/* Adds to counts (width, columns), whole numbers of so many bytes. before: the place of the bin of the first column. */
void count(const int32_t *bits, const uint8_t *keep, whole samples, whole width, whole positions, int tokens, int dropped,
           int32_t before, int32_t columns, void *counts, int bytes, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    (tokens ? count_tokens : count_maps)(bits, keep, samples, width, positions, dropped, before, columns, counts, bytes);
}

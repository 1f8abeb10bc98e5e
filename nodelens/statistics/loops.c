/* The sums of reductions.py over rows on a CPU, each from one read. NUMBER is float or double.

   Rows are arrays without gaps: maps (samples, width, positions), where ``tokens`` is 0, or tokens (samples, positions, width).
   keep (samples, positions) is NULL where all rows count. Terms are added in the dtype of the rows within a block, blocks in
   double. */

#include <stdint.h>
#include <string.h>

#define BLOCK 256 /* positions whose terms are added in the dtype of the rows */
#define TILE 256  /* units of tokens whose sums stay in the cache */
#define UNITS 16  /* units of tokens that are counted at once, of so many rows */
#define ROWS 256
#define COLUMNS 4096 /* at most, of counts */
#define PACKED 131072 /* values that are multiplied at once, so that they stay in the cache */

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
            for (whole w = 0; w < n; w++)
                out[(LARGEST * samples + s) * width + first + w] = most[w] >= 0 ? most[w] : (number)total[ABSOLUTES][w];
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
    int32_t even[COLUMNS] = {0}, odd[COLUMNS] = {0}, place[BLOCK];
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
            memset(even, 0, sizeof *even * (size_t)columns), memset(odd, 0, sizeof *odd * (size_t)columns);
        }
    }
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

/* Products of units: rows of A times columns of B values are in registers while a run of positions is read. */
#ifdef __AVX512F__
enum { BYTES = 64, A = 6, B = 4 };
#else
enum { BYTES = 32, A = 4, B = 3 };
#endif
enum { LANES = BYTES / sizeof(number) };
typedef number vector __attribute__((vector_size(BYTES), may_alias));

/* How many numbers ``packed`` of products needs: of positions, and of all. */
whole packed_positions(whole width) { return (PACKED / width < 128 ? 128 : PACKED / width) / LANES * LANES; }
whole packed_numbers(whole width) { return (width + A + B) * (packed_positions(width) + LANES); }

static inline void multiply(const number *x, const number *y, whole stride, whole positions, double found[A][B]) {
    vector sums[A][B];
    for (int i = 0; i < A; i++)
        for (int j = 0; j < B; j++) sums[i][j] = (vector){0};
    for (whole p = 0; p < positions; p += LANES) {
        vector right[B];
        for (int j = 0; j < B; j++) right[j] = *(const vector *)(y + j * stride + p);
        for (int i = 0; i < A; i++) {
            vector left = *(const vector *)(x + i * stride + p);
            for (int j = 0; j < B; j++) sums[i][j] += left * right[j];
        }
    }
    for (int i = 0; i < A; i++)
        for (int j = 0; j < B; j++) {
            found[i][j] = 0;
            for (int k = 0; k < LANES; k++) found[i][j] += sums[i][j][k];
        }
}

/* The place of row i, column 0 of a symmetric matrix, held as bands of ``step`` rows, each from the diagonal to the right. */
static inline whole place_of(whole i, whole width, whole step) {
    whole band = i / step, first = band * step;
    return step * band * width - step * step * band * (band - 1) / 2 + (i - first) * (width - first) - first;
}

/* Adds to out the sum of x x' over all positions of maps about the shift, times scale (samples, positions). out holds a symmetric
   matrix (width, width) as bands of ``step`` rows.

   chosen: the numbers of samples, NULL for the first ones; keep and scale are those of all samples, or NULL. packed: aligned to
   BYTES. A run of positions is copied there, sample after sample, and its products are formed in the dtype of the rows; the runs
   are added in double. */
void products(const number *raw, const uint8_t *keep, const number *shift, const number *scale, const whole *chosen, whole samples,
              whole width, whole positions, number *packed, double *out, whole step, int threads) {
    const whole most = packed_positions(width), stride = most + LANES, total = samples * positions;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp single
        memset(packed + width * stride, 0, sizeof *packed * (size_t)((A + B) * stride));
        for (whole begin = 0; begin < total; begin += most) {
            whole n = total - begin < most ? total - begin : most, padded = (n + LANES - 1) / LANES * LANES;
#pragma omp for
            for (whole w = 0; w < width; w++) {
                number *to = packed + w * stride, about = shift ? shift[w] : (number)0;
                for (whole done = 0; done < n;) {
                    whole k = (begin + done) / positions, first = (begin + done) % positions, s = chosen ? chosen[k] : k;
                    whole run = positions - first < n - done ? positions - first : n - done, place = s * positions + first;
                    const number *row = raw + (s * width + w) * positions + first;
                    if (!keep && !scale && !shift)
                        memcpy(to + done, row, (size_t)run * sizeof *row);
                    else
                        for (whole p = 0; p < run; p++) {
                            number x = !keep || keep[place + p] ? row[p] - about : (number)0;
                            to[done + p] = scale ? x * scale[place + p] : x;
                        }
                    done += run;
                }
                for (whole p = n; p < padded; p++) to[p] = 0;
            }
#pragma omp for schedule(dynamic)
            for (whole i = 0; i < width; i += A)
                for (whole j = i / B * B; j < width; j += B) {
                    double found[A][B];
                    multiply(packed + i * stride, packed + j * stride, stride, padded, found);
                    for (int a = 0; a < A && i + a < width; a++) {
                        double *to = out + place_of(i + a, width, step);
                        for (int b = 0; b < B && j + b < width; b++)
                            if (j + b >= i + a) to[j + b] += found[a][b];
                    }
                }
        }
#pragma omp for
        for (whole i = 0; i < width; i++)
            for (whole j = i / step * step; j < i; j++)
                out[place_of(i, width, step) + j] = out[place_of(j, width, step) + i];
    }
}

/* Sums over positions of rows times weights (samples, positions), (samples, width). */
void weighted(const number *raw, const uint8_t *keep, const number *shift, const number *weights, whole samples, whole width,
              whole positions, int tokens, number *out, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    (tokens ? skews_of_tokens : skews_of_maps)(raw, keep, shift, samples, width, positions, weights, out);
}

/* Adds maps about the shift, (samples, numbers) with numbers = width * positions, and their squares to those of their group:
   sums and squares (groups, numbers). */
void add_maps(const number *raw, const number *shift, const whole *group, whole samples, whole width, whole positions, number *sums,
              number *squares, int threads) {
    const whole numbers = width * positions;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (whole first = 0; first < numbers; first += TILE) {
        whole end = first + TILE < numbers ? first + TILE : numbers;
        number about[TILE];
        for (whole k = first; k < end; k++) about[k - first] = shift ? shift[k / positions] : (number)0;
        for (whole s = 0; s < samples; s++) {
            const number *row = raw + s * numbers;
            number *sum = sums + group[s] * numbers, *square = squares + group[s] * numbers;
#pragma omp simd
            for (whole k = first; k < end; k++) {
                number c = row[k] - about[k - first];
                sum[k] += c, square[k] += c * c;
            }
        }
    }
}

/* Sums of maps about the shift and of their squares over what each offset of a kernel reads, (2, samples, width, tall, wide).

   maps (samples, width, height, columns). down (tall, height) and across (wide, columns) say how often an offset reads a place. */
void patches(const number *raw, const number *shift, whole samples, whole width, whole height, whole columns, const number *down,
             whole tall, const number *across, whole wide, number *out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (whole m = 0; m < samples * width; m++) {
        const number *map = raw + m * height * columns;
        number about = shift ? shift[m % width] : (number)0;
        for (whole i = 0; i < tall; i++)
            for (whole first = 0; first < columns; first += TILE) {
                whole n = columns - first < TILE ? columns - first : TILE;
                number sum[TILE], square[TILE];
                for (whole k = 0; k < n; k++) sum[k] = square[k] = 0;
                for (whole r = 0; r < height; r++) {
                    number times = down[i * height + r];
                    const number *row = map + r * columns + first;
                    if (times == 0) continue;
#pragma omp simd
                    for (whole k = 0; k < n; k++) {
                        number c = row[k] - about, t = times * c;
                        sum[k] += t, square[k] += t * c;
                    }
                }
                for (whole j = 0; j < wide; j++) {
                    const number *times = across + j * columns + first;
                    number t1 = 0, t2 = 0;
#pragma omp simd reduction(+ : t1, t2)
                    for (whole k = 0; k < n; k++) t1 += times[k] * sum[k], t2 += times[k] * square[k];
                    number *to = out + (m * tall + i) * wide + j;
                    *to = first ? *to + t1 : t1;
                    to += samples * width * tall * wide;
                    *to = first ? *to + t2 : t2;
                }
            }
    }
}

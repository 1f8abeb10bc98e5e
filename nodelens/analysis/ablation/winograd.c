/* Convolutions with kernels of 3 by 3, stride 1 and a border of one zero, over maps that lie channels last, NUMBER float or double.

   Winograd's F(2 x 2, 3 x 3), as in Lavin & Gray 2016 (doi 10.1109/CVPR.2016.435, sec. 4.1): an input tile d of 4 by 4 values becomes
   B' d B, which is multiplied by the kernel in the same form, G g G', and A' (...) A are 2 by 2 outputs. These are 16 multiplications
   for 36, each a product of matrices (tiles x channels read) (channels read x channels made). */

#include <stdint.h>

typedef NUMBER number;
typedef int64_t whole;

#ifdef __AVX512F__
enum { BYTES = 64, ROWS = 12 };
#else
enum { BYTES = 32, ROWS = 6 };
#endif
enum { LANES = BYTES / sizeof(number), TILES = 48, FORMS = 16, GAP = 16 };
typedef number vector __attribute__((vector_size(BYTES), aligned(sizeof(number)), may_alias));

/* Channels made at once: kernels come as panels (FORMS, panels, channels read, so many), filled up with zeros. */
whole panel(void) { return 2 * LANES; }

/* Numbers between two forms of a block of tiles: not a power of two, or they would fall into the same lines of the cache. */
static inline whole apart(whole channels) { return TILES * channels + GAP; }

/* How many numbers a thread needs for its tiles; made counts the channels of all panels. */
whole held(whole read, whole made) { return FORMS * (apart(read) + apart(made)); }

/* ROWS tiles times a panel. */
static inline void multiply(const number *tiles, const number *kernels, whole read, number *out, whole made) {
    vector sums[ROWS][2];
    for (int i = 0; i < ROWS; i++) sums[i][0] = sums[i][1] = (vector){0};
    for (whole k = 0; k < read; k++) {
        const vector *row = (const vector *)(kernels + k * 2 * LANES);
        vector first = row[0], second = row[1];
        for (int i = 0; i < ROWS; i++) {
            number x = tiles[i * read + k];
            sums[i][0] += first * x;
            sums[i][1] += second * x;
        }
    }
    for (int i = 0; i < ROWS; i++) {
        vector *to = (vector *)(out + i * made);
        to[0] = sums[i][0], to[1] = sums[i][1];
    }
}

/* B' d B of a tile, whose 16 values of each channel start at ``from``. */
static inline void read_tile(const number *from[FORMS], whole channels, number *to, whole gap) {
#pragma omp simd
    for (whole k = 0; k < channels; k++) {
        number d[FORMS];
        for (int j = 0; j < 4; j++) {
            number a = from[j][k], b = from[4 + j][k], c = from[8 + j][k], e = from[12 + j][k];
            d[j] = a - c, d[4 + j] = b + c, d[8 + j] = c - b, d[12 + j] = b - e;
        }
        for (int i = 0; i < FORMS; i += 4) {
            number a = d[i], b = d[i + 1], c = d[i + 2], e = d[i + 3];
            to[i * gap + k] = a - c, to[(i + 1) * gap + k] = b + c;
            to[(i + 2) * gap + k] = c - b, to[(i + 3) * gap + k] = b - e;
        }
    }
}

/* A' m A and the bias, the 2 by 2 outputs of a tile; those outside of the map go to a place that nobody reads. */
static inline void write_tile(const number *from, whole gap, const number *bias, whole channels, number *to[4]) {
#pragma omp simd
    for (whole k = 0; k < channels; k++) {
        number upper[4], lower[4];
        for (int j = 0; j < 4; j++) {
            number a = from[j * gap + k], b = from[(4 + j) * gap + k], c = from[(8 + j) * gap + k], d = from[(12 + j) * gap + k];
            upper[j] = a + b + c, lower[j] = b - c - d;
        }
        to[0][k] = upper[0] + upper[1] + upper[2] + bias[k], to[1][k] = upper[1] - upper[2] - upper[3] + bias[k];
        to[2][k] = lower[0] + lower[1] + lower[2] + bias[k], to[3][k] = lower[1] - lower[2] - lower[3] + bias[k];
    }
}

/* maps (samples, height, width, read) -> out (samples, height, width, made).

   kernels: see ``panel``; padded: made, in whole panels. zeros: as many as read. scratch: for each thread, ``held`` numbers and as
   many as made. */
void convolve(const number *maps, const number *kernels, const number *bias, const number *zeros, whole samples, whole height,
              whole width, whole read, whole made, whole padded, number *scratch, number *out, int threads) {
    const whole down = (height + 1) / 2, across = (width + 1) / 2, tiles = samples * down * across;
    const whole in = apart(read), gap = apart(padded);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
    for (int part = 0; part < threads; part++) {
        number *given = scratch + part * (held(read, padded) + made), *found = given + FORMS * in, *nowhere = found + FORMS * gap;
        for (whole first = part * TILES; first < tiles; first += threads * TILES) {
            const whole n = tiles - first < TILES ? tiles - first : TILES;
            for (whole t = 0; t < n; t++) {
                whole place = first + t, s = place / (down * across), y = place / across % down * 2 - 1, x = place % across * 2 - 1;
                const number *from[FORMS];
                for (int i = 0; i < FORMS; i++) {
                    whole v = y + i / 4, h = x + i % 4, inside = v >= 0 && v < height && h >= 0 && h < width;
                    from[i] = inside ? maps + ((s * height + v) * width + h) * read : zeros;
                }
                read_tile(from, read, given + t * read, in);
            }
            for (whole i = 0; i < FORMS; i++)
                for (whole o = 0; o < padded; o += 2 * LANES)
                    for (whole t = 0; t < n; t += ROWS) /* rows behind the last tile are never read */
                        multiply(given + i * in + t * read, kernels + (i * padded + o) * read, read, found + i * gap + t * padded + o,
                                 padded);
            for (whole t = 0; t < n; t++) {
                whole place = first + t, s = place / (down * across), y = place / across % down * 2, x = place % across * 2;
                number *to[4];
                for (int i = 0; i < 4; i++) {
                    whole v = y + i / 2, h = x + i % 2;
                    to[i] = v < height && h < width ? out + ((s * height + v) * width + h) * made : nowhere;
                }
                write_tile(found + t * padded, gap, bias, made, to);
            }
        }
    }
}

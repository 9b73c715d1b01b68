/* What stands between a decoder's matrix products, a pass over memory each: norms, rotary positions, gates, attention of
 * a decoding step and of packed rows, log-probabilities, sampling. The functions of `gruppo/models/ops` that call them say
 * what each computes, and have the same in torch.
 *
 * Compiled where it runs (`build.py`). Sums may be taken in another order than written, NaN and infinities are kept. Rows
 * are shared out to threads in equal stretches, so results are a function of the input and the number of threads, and a
 * row's of the row alone, but for sums over rows.
 *
 * `narrow` is the dtype of products: this file is compiled for bfloat16 and for float.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ROWS(threads) _Pragma("omp parallel for schedule(static) num_threads(threads)")

#ifdef BFLOAT16
typedef uint16_t narrow;
static inline float wide(narrow bits) {
    uint32_t whole = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &whole, 4);
    return value;
}
static inline narrow narrowed(float value) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (narrow)(value != value ? 0x7fc0 : rounded);
}
#else
typedef float narrow;
static inline float wide(narrow value) { return value; }
static inline narrow narrowed(float value) { return value; }
#endif

/* LANES floats fill a vector register. Of wider vectors, gcc keeps every sum in memory. WIDE vectors of each of four
 * rows are summed at a time, as many as the registers hold: there are 32 with AVX-512, and 16 without. */
#if defined(__AVX512F__)
enum { LANES = 16, WIDE = 4 };
#elif defined(__AVX__)
enum { LANES = 8, WIDE = 2 };
#else
enum { LANES = 4, WIDE = 2 };
#endif
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* exp to a relative 1e-7; 0 below e^-87. */
static inline float exponential(float x) {
    float power = x * 1.44269504088896341f;
    power = power < -126.0f ? -126.0f : power;
    float whole = __builtin_rintf(power), f = power - whole;
    float p = 1.52527338e-5f;
    p = p * f + 1.54035304e-4f;
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    int32_t bits = ((int32_t)(whole > 127.0f ? 127.0f : whole) + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    float made = whole > 127.0f ? INFINITY : p * scale;
    return x < -87.0f ? 0.0f : made;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* The most of a row; a NaN counts as more, or less, than everything. By integers that rise as floats do: sums of floats can be
 * split among lanes, but a maximum only where there are no NaN. */
static inline float largest(const narrow *row, int64_t size) {
    int32_t most = INT32_MIN;
    for (int64_t i = 0; i < size; i++) {
        float value = wide(row[i]);
        int32_t bits;
        memcpy(&bits, &value, 4);
        bits ^= (bits >> 31) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    most ^= (most >> 31) & 0x7fffffff;
    float made;
    memcpy(&made, &most, 4);
    return made;
}

static inline float inverse_size(const float *row, int64_t size, float epsilon) {
    float sum = 0;
    for (int64_t i = 0; i < size; i++) sum += row[i] * row[i];
    return 1.0f / sqrtf(sum / (float)size + epsilon);
}

/* sum = hidden + delta; normed = weight · sum / √(mean sum² + ε). `delta` and `normed` may be left out. */
void add_norm(int64_t rows, int64_t size, const float *hidden, const narrow *delta, const float *weight, float epsilon,
              float *sum, narrow *normed, int threads) {
    ROWS(threads)
    for (int64_t r = 0; r < rows; r++) {
        const float *row = hidden + r * size;
        if (delta) {
            const narrow *own = delta + r * size;
            float *made = sum + r * size;
            for (int64_t i = 0; i < size; i++) made[i] = row[i] + wide(own[i]);
            row = made;
        }
        if (normed) {
            narrow *out = normed + r * size;
            float scale = inverse_size(row, size, epsilon);
            for (int64_t i = 0; i < size; i++) out[i] = narrowed(row[i] * weight[i] * scale);
        }
    }
}

/* Gradient of the rows of a norm, plus `more` where it is given; `weight_grad` [threads, size] sums up that of the weight.
 * With n = x·s, s = 1 / √(mean x² + ε): s · (g·w - n · mean(g·w·n)). */
void norm_backward(int64_t rows, int64_t size, const narrow *grad, const float *hidden, const float *weight, float epsilon,
                   const float *more, float *made, float *weight_grad, int threads) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int t = 0; t < threads; t++) {
        float *own = weight_grad + (int64_t)t * size;
        memset(own, 0, sizeof(float) * size);
        for (int64_t r = rows * t / threads; r < rows * (t + 1) / threads; r++) {
            const narrow *g = grad + r * size;
            const float *x = hidden + r * size, *add = more ? more + r * size : 0;
            float *out = made + r * size, scale = inverse_size(x, size, epsilon), joint = 0;
            for (int64_t i = 0; i < size; i++) {
                float part = wide(g[i]) * x[i] * scale;
                own[i] += part;
                joint += part * weight[i];
            }
            float share = joint / (float)size * scale;
            if (add)
                for (int64_t i = 0; i < size; i++) out[i] = add[i] + scale * (wide(g[i]) * weight[i] - x[i] * share);
            else
                for (int64_t i = 0; i < size; i++) out[i] = scale * (wide(g[i]) * weight[i] - x[i] * share);
        }
    }
}

/* silu(gate) · up of rows [gate, up]. */
void gate(int64_t rows, int64_t size, const narrow *gated, narrow *made, int threads) {
    ROWS(threads)
    for (int64_t r = 0; r < rows; r++) {
        const narrow *a = gated + 2 * r * size, *b = a + size;
        narrow *out = made + r * size;
        for (int64_t i = 0; i < size; i++) {
            float x = wide(a[i]);
            out[i] = narrowed(x * sigmoid(x) * wide(b[i]));
        }
    }
}

/* Its gradient with respect to [gate, up]. */
void gate_backward(int64_t rows, int64_t size, const narrow *gated, const narrow *grad, narrow *made, int threads) {
    ROWS(threads)
    for (int64_t r = 0; r < rows; r++) {
        const narrow *a = gated + 2 * r * size, *b = a + size, *g = grad + r * size;
        narrow *of_gate = made + 2 * r * size, *of_up = of_gate + size;
        for (int64_t i = 0; i < size; i++) {
            float x = wide(a[i]), s = sigmoid(x), own = wide(g[i]);
            of_gate[i] = narrowed(own * wide(b[i]) * s * (1.0f + x * (1.0f - s)));
            of_up[i] = narrowed(own * x * s);
        }
    }
}

/* One head's rotary position, after a norm of its own where it has a weight; `out` may not be `head`. */
static inline void turn(int64_t width, const narrow *head, const float *norm, float epsilon, const float *cosine,
                        const float *sine, float *out) {
    int64_t half = width / 2;
    float row[width];
    for (int64_t i = 0; i < width; i++) row[i] = wide(head[i]);
    if (norm) {
        float scale = inverse_size(row, width, epsilon);
        for (int64_t i = 0; i < width; i++) row[i] *= norm[i] * scale;
    }
    for (int64_t i = 0; i < half; i++) {
        out[i] = row[i] * cosine[i] - row[half + i] * sine[i];
        out[half + i] = row[half + i] * cosine[half + i] + row[i] * sine[half + i];
    }
}

/* Rows [queries, keys, values] of products to float, queries and keys turned. */
void turn_heads(int64_t rows, int64_t queries, int64_t keys, int64_t width, const narrow *projected, const float *cosine,
                const float *sine, const float *query_norm, const float *key_norm, float epsilon, float *query, float *key,
                float *value, int threads) {
    ROWS(threads)
    for (int64_t r = 0; r < rows; r++) {
        const narrow *head = projected + r * (queries + 2 * keys) * width;
        const float *c = cosine + r * width, *s = sine + r * width;
        for (int64_t h = 0; h < queries; h++, head += width)
            turn(width, head, query_norm, epsilon, c, s, query + (r * queries + h) * width);
        for (int64_t h = 0; h < keys; h++, head += width)
            turn(width, head, key_norm, epsilon, c, s, key + (r * keys + h) * width);
        for (int64_t i = 0; i < keys * width; i++) value[r * keys * width + i] = wide(head[i]);
    }
}

/* The gradient of what `turn_heads` read, where no head has a norm of its own. */
void turn_heads_backward(int64_t rows, int64_t queries, int64_t keys, int64_t width, const float *query, const float *key,
                         const float *value, const float *cosine, const float *sine, narrow *made, int threads) {
    int64_t half = width / 2;
    ROWS(threads)
    for (int64_t r = 0; r < rows; r++) {
        narrow *out = made + r * (queries + 2 * keys) * width;
        const float *c = cosine + r * width, *s = sine + r * width;
        for (int64_t h = 0; h < queries + keys; h++, out += width) {
            const float *g = h < queries ? query + (r * queries + h) * width : key + (r * keys + h - queries) * width;
            for (int64_t i = 0; i < half; i++) {
                out[i] = narrowed(g[i] * c[i] + g[half + i] * s[half + i]);
                out[half + i] = narrowed(g[half + i] * c[half + i] - g[i] * s[i]);
            }
        }
        for (int64_t i = 0; i < keys * width; i++) out[i] = narrowed(value[r * keys * width + i]);
    }
}

static inline float total(lanes v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

/* scores[q, k] of `count` queries and `keys` keys, both [., D]. */
static inline __attribute__((always_inline)) void score_keys(const int D, int64_t count, const float *query, int64_t keys,
                                                             const float *key, float scale, float *scores, int64_t stride) {
    for (int64_t k = 0; k < keys; k++) {
        const float *own = key + k * D;
        for (int64_t q = 0; q < count; q++) {
            lanes sum = *(const lanes *)own * *(const lanes *)(query + q * D);
            for (int d = LANES; d < D; d += LANES) sum += *(const lanes *)(own + d) * *(const lanes *)(query + q * D + d);
            scores[q * stride + k] = scale * total(sum);
        }
    }
}

/* out[d] += Σ_k weights[k] · value[k, d]. */
static inline __attribute__((always_inline)) void add_values(const int D, int64_t keys, const float *weights,
                                                             const float *value, float *out) {
    for (int d = 0; d < D; d += 4 * LANES) {
        int many = D - d < 4 * LANES ? (D - d) / LANES : 4;
        lanes sum[4];
        for (int i = 0; i < many; i++) sum[i] = *(const lanes *)(out + d + i * LANES);
        for (int64_t k = 0; k < keys; k++)
            for (int i = 0; i < many; i++) sum[i] += weights[k] * *(const lanes *)(value + k * D + d + i * LANES);
        for (int i = 0; i < many; i++) *(lanes *)(out + d + i * LANES) = sum[i];
    }
}

/* A decoding step of one layer: each row's new key and value go to its store, and its queries see the last `window`
 * positions of its prompt and of its own tokens. */
struct decoding {
    int64_t rows, queries, keys, own_room, prefix_room, window;
    const narrow *projected;
    const float *cosine, *sine, *query_norm, *key_norm;
    float epsilon, scale;
    float *own_keys, *own_values;             /* [slots, keys, own_room, D] */
    const float *prefix_keys, *prefix_values; /* [places, keys, prefix_room, D] */
    const int64_t *order, *place, *prefix_length, *position; /* rows by place; for each row: where it is and writes */
    narrow *made;                             /* [rows, queries, D] */
};

static inline __attribute__((always_inline)) void attend_row(const int D, const struct decoding *s, int64_t row, int64_t head,
                                                             float *scores, int64_t stride) {
    int64_t shared = s->queries / s->keys, all = s->queries + 2 * s->keys;
    int64_t prefix = s->prefix_length[row], own = s->position[row] + 1;
    int64_t hidden = prefix + own > s->window ? prefix + own - s->window : 0;
    int64_t skip = hidden < prefix ? hidden : prefix, skip_own = hidden - skip;
    const narrow *projected = s->projected + row * all * D;
    const float *cosine = s->cosine + row * D, *sine = s->sine + row * D;
    float *keys = s->own_keys + (row * s->keys + head) * s->own_room * D;
    float *values = s->own_values + (row * s->keys + head) * s->own_room * D;
    const float *prefix_keys = s->prefix_keys + (s->place[row] * s->keys + head) * s->prefix_room * D;
    const float *prefix_values = s->prefix_values + (s->place[row] * s->keys + head) * s->prefix_room * D;
    float query[shared * D];
    for (int64_t q = 0; q < shared; q++)
        turn(D, projected + (head * shared + q) * D, s->query_norm, s->epsilon, cosine, sine, query + q * D);
    turn(D, projected + (s->queries + head) * D, s->key_norm, s->epsilon, cosine, sine, keys + (own - 1) * D);
    const narrow *value = projected + (s->queries + s->keys + head) * D;
    for (int d = 0; d < D; d++) values[(own - 1) * D + d] = wide(value[d]);
    int64_t seen = prefix - skip, seen_own = own - skip_own;
    score_keys(D, shared, query, seen, prefix_keys + skip * D, s->scale, scores, stride);
    score_keys(D, shared, query, seen_own, keys + skip_own * D, s->scale, scores + seen, stride);
    for (int64_t q = 0; q < shared; q++) {
        float *weights = scores + q * stride, most = -INFINITY, sum = 0, out[D];
        for (int64_t k = 0; k < seen + seen_own; k++) most = weights[k] > most ? weights[k] : most;
        for (int64_t k = 0; k < seen + seen_own; k++) {
            weights[k] = exponential(weights[k] - most);
            sum += weights[k];
        }
        memset(out, 0, sizeof(out));
        add_values(D, seen, weights, prefix_values + skip * D, out);
        add_values(D, seen_own, weights + seen, values + skip_own * D, out);
        narrow *made = s->made + (row * s->queries + head * shared + q) * D;
        for (int d = 0; d < D; d++) made[d] = narrowed(out[d] / sum);
    }
}

static inline __attribute__((always_inline)) int attend_all(const int D, const struct decoding *s, int threads) {
    int failed = 0;
    int64_t stride = s->prefix_room + s->own_room, shared = s->queries / s->keys;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *scores = malloc(sizeof(float) * stride * shared);
        failed = !scores;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s->rows * s->keys; task++) /* a head's rows of a place one after another */
            if (scores) attend_row(D, s, s->order[task % s->rows], task / s->rows, scores, stride);
        free(scores);
    }
    return failed;
}

/* Returns 0; 1 where memory lacks. D is a multiple of 16. */
int attend(int64_t width, const struct decoding *step, int threads) {
    switch (width) {
    case 64: return attend_all(64, step, threads);
    case 128: return attend_all(128, step, threads);
    default: return attend_all((int)width, step, threads);
    }
}

/* Of a part of the vocabulary, for each row of logits [rows, size], divided by the temperature: log Σ exp, the mean of the
 * logits under their softmax, and the target's logit, where the target is in this part. */
void logprobs_of_part(int64_t rows, int64_t size, const narrow *logits, float inverse_temperature, const int64_t *targets,
                      int64_t start, float *normaliser, float *mean, float *target, int threads) {
    ROWS(threads)
    for (int64_t r = 0; r < rows; r++) {
        const narrow *row = logits + r * size;
        float most = largest(row, size), sum = 0, weighted = 0;
        for (int64_t i = 0; i < size; i++) {
            float x = (wide(row[i]) - most) * inverse_temperature;
            x = x < -100.0f ? -100.0f : x; /* where exp is 0, which -inf may not be multiplied with */
            float e = exponential(x);
            sum += e;
            weighted += e * x;
        }
        most *= inverse_temperature;
        normaliser[r] = most + logf(sum);
        mean[r] = most + weighted / sum;
        int64_t place = targets[r] - start;
        if (place >= 0 && place < size) target[r] = wide(row[place]) * inverse_temperature;
    }
}

/* Logits to their gradient, in place: scale · (onehot(target) - exp(logit / temperature - normaliser)). */
void logprobs_backward(int64_t rows, int64_t size, narrow *logits, float inverse_temperature, const int64_t *targets,
                       int64_t start, const float *normaliser, const float *scale, int threads) {
    ROWS(threads)
    for (int64_t r = 0; r < rows; r++) {
        narrow *row = logits + r * size;
        int64_t place = targets[r] - start;
        float from = normaliser[r], by = scale[r];
        int inside = place >= 0 && place < size;
        float at = inside ? by - by * exponential(wide(row[place]) * inverse_temperature - from) : 0;
        for (int64_t i = 0; i < size; i++)
            row[i] = narrowed(-by * exponential(wide(row[i]) * inverse_temperature - from));
        if (inside) row[place] = narrowed(at);
    }
}

/* A token a row, by inverting the distribution function of softmax(logits / temperature) at a uniform number, and its
 * log-probability; -1 where the logits are not finite. Weights are summed in blocks, blocks in double. */
enum { BLOCK = 256 };
void sample(int64_t rows, int64_t size, const narrow *logits, float inverse_temperature, const double *uniforms,
            int64_t *tokens, float *logprobs, int threads) {
    int64_t blocks = (size + BLOCK - 1) / BLOCK;
    ROWS(threads)
    for (int64_t r = 0; r < rows; r++) {
        const narrow *row = logits + r * size;
        float most = largest(row, size), sums[blocks];
        double all = 0;
        for (int64_t b = 0; b < blocks; b++) {
            int64_t end = (b + 1) * BLOCK < size ? (b + 1) * BLOCK : size;
            float sum = 0;
            for (int64_t i = b * BLOCK; i < end; i++) sum += exponential((wide(row[i]) - most) * inverse_temperature);
            sums[b] = sum;
            all += sum;
        }
        double goal = uniforms[r] * all, below = 0;
        int64_t block = -1, token = -1;
        for (int64_t b = 0; b < blocks && block < 0; b++) {
            if (below + sums[b] > goal) block = b;
            else below += sums[b];
        }
        if (block < 0) goal = INFINITY; /* rounding at the upper end: the last token with weight */
        for (int64_t b = blocks - 1; block < 0 && b >= 0; b--)
            if (sums[b] > 0) block = b;
        if (block >= 0) {
            int64_t end = (block + 1) * BLOCK < size ? (block + 1) * BLOCK : size;
            for (int64_t i = block * BLOCK; i < end; i++) {
                float weight = exponential((wide(row[i]) - most) * inverse_temperature);
                if (weight > 0) token = i; /* the last one with weight, if none is beyond the goal */
                below += weight;
                if (weight > 0 && below > goal) break;
            }
        }
        tokens[r] = token < 0 ? 0 : token;
        logprobs[r] = token < 0 ? NAN : (float)((wide(row[token]) - most) * inverse_temperature - log(all));
    }
}

/* Attention of packed groups, each a prompt and the completions that see it: float, forward and backward. A group's rows
 * of one key head are one task: keys (and values) are laid out in tiles of LANES once, then blocks of queries are
 * multiplied with them. Full rows of scores are held, of one block at a time. */
struct packing {
    int64_t groups, queries, keys, window;
    const int64_t *first;                     /* [groups + 1]: which sequences are a group's, the first its prompt */
    const int64_t *start, *length;            /* of each sequence, in rows */
    const float *query, *key, *value;         /* [rows, heads, D] */
    float scale;
    float *made, *normaliser;                 /* [rows, queries, D], [rows, queries] */
    const float *grad;                        /* as made; the following are as query, key and value, the latter begin as 0 */
    float *of_query, *of_key, *of_value;
};

enum { BLOCK_ROWS = 8 };

/* What one thread works with: `rows` queries of a block, `places` keys in tiles. */
struct bench {
    float *key_tiles, *value_tiles, *query, *grad, *made, *scores, *slopes;
    int64_t *tile_of; /* the first tile of each sequence of the group */
};

/* scores[8, LANES] of eight rows and a tile [D, LANES]. */
static inline void score_tile(int64_t D, const float *rows, const float *tile, float *scores,
                                                             int64_t stride) {
    lanes sum[BLOCK_ROWS] = {0};
    for (int64_t d = 0; d < D; d++) {
        lanes column = *(const lanes *)(tile + d * LANES);
#pragma GCC unroll 8
        for (int q = 0; q < BLOCK_ROWS; q++) sum[q] += rows[q * D + d] * column;
    }
#pragma GCC unroll 8
    for (int q = 0; q < BLOCK_ROWS; q++) *(lanes *)(scores + q * stride) = sum[q];
}

/* out[R, W · LANES] += Σ_k a[r · down + k · along] · matrix[k, :], both constants. */
static inline __attribute__((always_inline)) void combine_some(const int R, const int W, int64_t inner, const float *a,
                                                               int64_t down, int64_t along, const float *matrix,
                                                               int64_t stride, float *out, int64_t out_stride) {
    lanes sum[4][4] = {0};
    for (int64_t k = 0; k < inner; k++)
#pragma GCC unroll 4
        for (int i = 0; i < W; i++) {
            lanes column = *(const lanes *)(matrix + k * stride + i * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sum[r][i] += a[r * down + k * along] * column;
        }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int i = 0; i < W; i++) *(lanes *)(out + r * out_stride + i * LANES) += sum[r][i];
}

/* out[r, :] += Σ_k a[r · down + k · along] · matrix[k, :], of width D. */
static __attribute__((noinline)) void combine(int64_t D, int64_t rows, int64_t inner, const float *a, int64_t down, int64_t along,
                                              const float *matrix, int64_t stride, float *out, int64_t out_stride) {
    for (int64_t d = 0; d < D;) {
        int64_t r = 0, wide_enough = D - d >= WIDE * LANES;
        for (; r + 4 <= rows; r += 4) {
            const float *own = a + r * down;
            float *to = out + r * out_stride + d;
            if (wide_enough) combine_some(4, WIDE, inner, own, down, along, matrix + d, stride, to, out_stride);
            else combine_some(4, 1, inner, own, down, along, matrix + d, stride, to, out_stride);
        }
        for (; r < rows; r++) {
            const float *own = a + r * down;
            float *to = out + r * out_stride + d;
            if (wide_enough) combine_some(1, WIDE, inner, own, down, along, matrix + d, stride, to, out_stride);
            else combine_some(1, 1, inner, own, down, along, matrix + d, stride, to, out_stride);
        }
        d += wide_enough ? WIDE * LANES : LANES;
    }
}

static inline int64_t tiles(int64_t length) { return (length + LANES - 1) / LANES; }

static void lay_out(int64_t D, int64_t length, const float *rows, int64_t stride, float *tile) {
    for (int64_t k = 0; k < tiles(length) * LANES; k++)
        for (int64_t d = 0; d < D; d++)
            tile[(k / LANES * D + d) * LANES + k % LANES] = k < length ? rows[k * stride + d] : 0.0f;
}

/* A block's product with the tiles of `count` keys, into columns from `column` on. */
static __attribute__((noinline)) void score_block(int64_t D, int64_t rows, const float *block, int64_t count,
                                                              const float *tile, float *scores, int64_t stride) {
    for (int64_t t = 0; t < tiles(count); t++)
        for (int64_t r = 0; r < rows; r += BLOCK_ROWS)
            score_tile(D, block + r * D, tile + t * D * LANES, scores + r * stride + t * LANES, stride);
}

static void packed_sequence(int64_t D, const struct packing *p, const struct bench *own,
                                                                  int64_t head, int64_t prompt, int64_t sequence, int64_t tile,
                                                                  int backward) {
    int64_t shared = p->queries / p->keys, tokens = shared == 1 ? 16 : 8, row_stride = p->queries * D, key_stride = p->keys * D;
    int64_t prefix = prompt == sequence ? 0 : p->length[prompt], length = p->length[sequence], start = p->start[sequence];
    int64_t own_from = tiles(prefix) * LANES, stride = own_from + tiles(length) * LANES;
    int64_t prefix_at = p->start[prompt] * key_stride + head * D, own_at = start * key_stride + head * D;
    for (int64_t t0 = 0; t0 < length; t0 += tokens) {
        int64_t many = length - t0 < tokens ? length - t0 : tokens, rows = many * shared;
        int64_t padded = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS, seen = t0 + many;
        const float *query = p->query + (start + t0) * row_stride + head * shared * D;
        memset(own->query + rows * D, 0, sizeof(float) * (padded - rows) * D);
        for (int64_t t = 0; t < many; t++)
            for (int64_t i = 0; i < shared * D; i++) own->query[t * shared * D + i] = query[t * row_stride + i] * p->scale;
        if (prefix) score_block(D, padded, own->query, prefix, own->key_tiles, own->scores, stride);
        score_block(D, padded, own->query, seen, own->key_tiles + tile * D * LANES, own->scores + own_from, stride);
        if (backward) {
            const float *grad = p->grad + (start + t0) * row_stride + head * shared * D;
            memset(own->grad + rows * D, 0, sizeof(float) * (padded - rows) * D);
            for (int64_t t = 0; t < many; t++) memcpy(own->grad + t * shared * D, grad + t * row_stride, sizeof(float) * shared * D);
            if (prefix) score_block(D, padded, own->grad, prefix, own->value_tiles, own->slopes, stride);
            score_block(D, padded, own->grad, seen, own->value_tiles + tile * D * LANES, own->slopes + own_from, stride);
        }
        memset(own->made, 0, sizeof(float) * padded * D);
        for (int64_t r = 0; r < rows; r++) {
            int64_t position = t0 + r / shared, all = prefix + position + 1, hidden = all > p->window ? all - p->window : 0;
            int64_t from = hidden < prefix ? hidden : prefix, own_begin = own_from + hidden - from;
            int64_t end = own_from + position + 1, last = own_from + seen;
            int64_t at = (start + t0 + r / shared) * p->queries + head * shared + r % shared;
            float *row = own->scores + r * stride;
            if (!backward) {
                float most = -INFINITY, sum = 0;
                for (int64_t k = from; k < prefix; k++) most = row[k] > most ? row[k] : most;
                for (int64_t k = own_begin; k < end; k++) most = row[k] > most ? row[k] : most;
                for (int64_t k = from; k < prefix; k++) sum += row[k] = exponential(row[k] - most);
                for (int64_t k = own_begin; k < end; k++) sum += row[k] = exponential(row[k] - most);
                p->normaliser[at] = most + logf(sum);
                float share = 1.0f / sum;
                for (int64_t k = from; k < end; k++) row[k] *= share;
            } else {
                const float *made = p->made + at * D, *grad = own->grad + r * D;
                float *slope = own->slopes + r * stride, from_all = p->normaliser[at], joint = 0;
                for (int d = 0; d < D; d++) joint += made[d] * grad[d];
                for (int64_t k = from; k < end; k++) row[k] = exponential(row[k] - from_all);
                for (int64_t k = from; k < end; k++) slope[k] = row[k] * (slope[k] - joint);
                memset(slope, 0, sizeof(float) * from);
                memset(slope + prefix, 0, sizeof(float) * (own_begin - prefix));
                memset(slope + end, 0, sizeof(float) * (last - end));
            }
            memset(row, 0, sizeof(float) * from);
            memset(row + prefix, 0, sizeof(float) * (own_begin - prefix));
            memset(row + end, 0, sizeof(float) * (last - end));
        }
        if (!backward) {
            if (prefix) combine(D, rows, prefix, own->scores, stride, 1, p->value + prefix_at, key_stride, own->made, D);
            combine(D, rows, seen, own->scores + own_from, stride, 1, p->value + own_at, key_stride, own->made, D);
        } else {
            if (prefix) {
                combine(D, rows, prefix, own->slopes, stride, 1, p->key + prefix_at, key_stride, own->made, D);
                combine(D, prefix, rows, own->slopes, 1, stride, own->query, D, p->of_key + prefix_at, key_stride);
                combine(D, prefix, rows, own->scores, 1, stride, own->grad, D, p->of_value + prefix_at, key_stride);
            }
            combine(D, rows, seen, own->slopes + own_from, stride, 1, p->key + own_at, key_stride, own->made, D);
            combine(D, seen, rows, own->slopes + own_from, 1, stride, own->query, D, p->of_key + own_at, key_stride);
            combine(D, seen, rows, own->scores + own_from, 1, stride, own->grad, D, p->of_value + own_at, key_stride);
        }
        float *out = (backward ? p->of_query : p->made) + (start + t0) * row_stride + head * shared * D;
        float by = backward ? p->scale : 1.0f;
        for (int64_t t = 0; t < many; t++)
            for (int64_t i = 0; i < shared * D; i++) out[t * row_stride + i] = own->made[t * shared * D + i] * by;
    }
}

static void packed_group(int64_t D, const struct packing *p, const struct bench *own,
                                                               int64_t group, int64_t head, int backward) {
    int64_t tile = 0, key_stride = p->keys * D;
    for (int64_t s = p->first[group]; s < p->first[group + 1]; s++) {
        int64_t at = p->start[s] * key_stride + head * D;
        own->tile_of[s - p->first[group]] = tile;
        lay_out(D, p->length[s], p->key + at, key_stride, own->key_tiles + tile * D * LANES);
        if (backward) lay_out(D, p->length[s], p->value + at, key_stride, own->value_tiles + tile * D * LANES);
        tile += tiles(p->length[s]);
    }
    for (int64_t s = p->first[group]; s < p->first[group + 1]; s++)
        packed_sequence(D, p, own, head, p->first[group], s, own->tile_of[s - p->first[group]], backward);
}

/* Returns 0; 1 where memory lacks. D is a multiple of 16. */
int attend_packed(int64_t width, const struct packing *p, int backward, int threads) {
    int64_t shared = p->queries / p->keys, rows = (shared == 1 ? 16 : 8) * shared + BLOCK_ROWS;
    int64_t most_tiles = 0, most_places = 0, most_sequences = 0;
    int failed = 0;
    for (int64_t g = 0; g < p->groups; g++) {
        int64_t sum = 0, prompt = tiles(p->length[p->first[g]]) * LANES;
        for (int64_t s = p->first[g]; s < p->first[g + 1]; s++) {
            int64_t places = (s == p->first[g] ? 0 : prompt) + tiles(p->length[s]) * LANES;
            sum += tiles(p->length[s]);
            most_places = places > most_places ? places : most_places;
        }
        most_tiles = sum > most_tiles ? sum : most_tiles;
        most_sequences = p->first[g + 1] - p->first[g] > most_sequences ? p->first[g + 1] - p->first[g] : most_sequences;
    }
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        int64_t laid = most_tiles * LANES * width, block = rows * width, held = rows * most_places;
        float *room = malloc(sizeof(float) * (2 * laid + 3 * block + 2 * held));
        int64_t *tile_of = malloc(sizeof(int64_t) * most_sequences);
        struct bench own = {room, room + laid, room + 2 * laid, room + 2 * laid + block, room + 2 * laid + 2 * block,
                            room + 2 * laid + 3 * block, room + 2 * laid + 3 * block + held, tile_of};
        failed = !room || !tile_of;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < p->groups * p->keys; task++) {
            if (!room || !tile_of) continue;
            packed_group(width, p, &own, task / p->keys, task % p->keys, backward);
        }
        free(room);
        free(tile_of);
    }
    return failed;
}

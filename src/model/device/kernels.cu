// What lies between matrix products on an NVIDIA GPU, each in one pass over its rows: norms, rotations, gates, attention's softmax, losses.
//
// In: f32 matrices, row-major and without gaps. Out: others. `cuda.rs` compiles this by NVRTC when a device is opened and launches it: one
// block of threads for each row, threads in steps of the block over its elements. Nothing but loops, barriers and shared memory is used,
// so that `host.cpp` can run the same source on the processor, by threads of its own, against candle's operations.
//
// Lengths are 32 bits and offsets 64: a matrix of logits has more than 2^31 bytes.

#ifndef THREADS
#define THREADS 256 // of a block; a power of two
#endif

typedef long long offset;

#define LOWEST -3.402823466e+38f // of all finite f32

// Sum of all threads' x, known to each of them. Every thread of the block calls it.
__device__ float block_sum(float x) {
    __shared__ float parts[THREADS];
    parts[threadIdx.x] = x;
    for (unsigned half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    }
    __syncthreads();
    float sum = parts[0];
    __syncthreads();
    return sum;
}

// Largest of all threads' x, likewise.
__device__ float block_max(float x) {
    __shared__ float parts[THREADS];
    parts[threadIdx.x] = x;
    for (unsigned half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) parts[threadIdx.x] = fmaxf(parts[threadIdx.x], parts[threadIdx.x + half]);
    }
    __syncthreads();
    float top = parts[0];
    __syncthreads();
    return top;
}

// y = w x / sqrt(mean(x^2) + epsilon); scale keeps 1 / sqrt(...) of each row. x, y: rows x width; w: width; scale: rows.
extern "C" __global__ void norm_forward(const float *x, const float *w, float epsilon, int width, float *y, float *scale) {
    x += (offset)blockIdx.x * width;
    y += (offset)blockIdx.x * width;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += THREADS) squares += x[i] * x[i];
    float s = 1.0f / sqrtf(block_sum(squares) / width + epsilon);
    for (int i = threadIdx.x; i < width; i += THREADS) y[i] = w[i] * (x[i] * s);
    if (threadIdx.x == 0) scale[blockIdx.x] = s;
}

// dx = s g - s^3 x mean(g x), with g = w dy and s the row's scale.
extern "C" __global__ void norm_backward(const float *dy, const float *x, const float *w, const float *scale, int width, float *dx) {
    dy += (offset)blockIdx.x * width;
    x += (offset)blockIdx.x * width;
    dx += (offset)blockIdx.x * width;
    float products = 0.0f;
    for (int i = threadIdx.x; i < width; i += THREADS) products += w[i] * dy[i] * x[i];
    float s = scale[blockIdx.x];
    float pull = s * s * s * (block_sum(products) / width);
    for (int i = threadIdx.x; i < width; i += THREADS) dx[i] = s * w[i] * dy[i] - pull * x[i];
}

struct gate {
    float value, slope;
};

// SiLU, z s with s = 1 / (1 + e^-z), or GELU by tanh; with the derivative.
__device__ gate act(float z, int is_gelu) {
    gate g;
    if (is_gelu) {
        const float root = 0.7978845608028654f, cubic = 0.044715f; // sqrt(2 / pi)
        float t = tanhf(root * (z + cubic * z * z * z));
        g.value = 0.5f * z * (1.0f + t);
        g.slope = 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * root * (1.0f + 3.0f * cubic * z * z);
    } else {
        float s = 1.0f / (1.0f + expf(-z));
        g.value = z * s;
        g.slope = s * (1.0f + z * (1.0f - s));
    }
    return g;
}

// a = act(gate) up. gate_up: rows x 2 width, the gate first; a: rows x width.
extern "C" __global__ void glu_forward(const float *gate_up, int is_gelu, int width, float *a) {
    gate_up += (offset)blockIdx.x * 2 * width;
    a += (offset)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += THREADS) a[i] = act(gate_up[i], is_gelu).value * gate_up[width + i];
}

// d gate = da up act'(gate), d up = da act(gate); d as gate_up.
extern "C" __global__ void glu_backward(const float *da, const float *gate_up, int is_gelu, int width, float *d) {
    da += (offset)blockIdx.x * width;
    gate_up += (offset)blockIdx.x * 2 * width;
    d += (offset)blockIdx.x * 2 * width;
    for (int i = threadIdx.x; i < width; i += THREADS) {
        gate g = act(gate_up[i], is_gelu);
        d[i] = da[i] * gate_up[width + i] * g.slope;
        d[width + i] = da[i] * g.value;
    }
}

// Turns the first 2 half dimensions of each row of x (heads x tokens, each dim) by its token's angles, times sign; the rest stays. Pairs are i and
// i + half, or neighbors. cos, sin: tokens x half.
extern "C" __global__ void turn(const float *x, const float *cos, const float *sin, float sign, int are_neighbors, int tokens, int half, int dim, float *out) {
    int token = blockIdx.x % tokens;
    x += (offset)blockIdx.x * dim;
    out += (offset)blockIdx.x * dim;
    cos += (offset)token * half;
    sin += (offset)token * half;
    for (int i = threadIdx.x; i < half; i += THREADS) {
        int first = are_neighbors ? 2 * i : i, second = are_neighbors ? 2 * i + 1 : i + half;
        float a = x[first], b = x[second], s = sign * sin[i];
        out[first] = a * cos[i] - b * s;
        out[second] = b * cos[i] + a * s;
    }
    for (int i = 2 * half + threadIdx.x; i < dim; i += THREADS) out[i] = x[i];
}

// The score of a product of query and key: times scale, then cap tanh(x / cap) if there is a cap above 0.
__device__ float score(float product, float scale, float cap) {
    float s = scale * product;
    return cap > 0.0f ? cap * tanhf(s / cap) : s;
}

// p = softmax(score(product) + mask) of each row. products, p: heads x queries rows of keys; mask: queries x keys.
extern "C" __global__ void attention_forward(const float *products, const float *mask, float scale, float cap, int queries, int keys, float *p) {
    products += (offset)blockIdx.x * keys;
    p += (offset)blockIdx.x * keys;
    mask += (offset)(blockIdx.x % queries) * keys;
    float top = LOWEST;
    for (int i = threadIdx.x; i < keys; i += THREADS) top = fmaxf(top, score(products[i], scale, cap) + mask[i]);
    top = block_max(top);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < keys; i += THREADS) {
        p[i] = expf(score(products[i], scale, cap) + mask[i] - top);
        sum += p[i];
    }
    float share = 1.0f / block_sum(sum);
    for (int i = threadIdx.x; i < keys; i += THREADS) p[i] *= share;
}

// The gradient with respect to products, given dp, that with respect to p: p (dp - sum(dp p)), times 1 - tanh^2 under a cap, times scale.
extern "C" __global__ void attention_backward(const float *products, const float *p, const float *dp, float scale, float cap, int keys, float *d) {
    products += (offset)blockIdx.x * keys;
    p += (offset)blockIdx.x * keys;
    dp += (offset)blockIdx.x * keys;
    d += (offset)blockIdx.x * keys;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < keys; i += THREADS) sum += dp[i] * p[i];
    float drift = block_sum(sum);
    for (int i = threadIdx.x; i < keys; i += THREADS) {
        float slope = scale;
        if (cap > 0.0f) {
            float t = tanhf(scale * products[i] / cap);
            slope *= 1.0f - t * t;
        }
        d[i] = p[i] * (dp[i] - drift) * slope;
    }
}

// d = softmax(row) - onehot(token) of each row of logits; parts of its loss: the largest logit, the sum of e^(x - that), the token's logit.
// logits, d: rows x vocab; parts: rows x 3.
extern "C" __global__ void next_token(const float *logits, const unsigned *tokens, int vocab, float *parts, float *d) {
    logits += (offset)blockIdx.x * vocab;
    d += (offset)blockIdx.x * vocab;
    int token = tokens[blockIdx.x];
    float top = LOWEST;
    for (int i = threadIdx.x; i < vocab; i += THREADS) top = fmaxf(top, logits[i]);
    top = block_max(top);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < vocab; i += THREADS) sum += expf(logits[i] - top);
    sum = block_sum(sum);
    for (int i = threadIdx.x; i < vocab; i += THREADS) d[i] = expf(logits[i] - top) / sum - (i == token ? 1.0f : 0.0f);
    if (threadIdx.x == 0) {
        parts[3 * blockIdx.x] = top;
        parts[3 * blockIdx.x + 1] = sum;
        parts[3 * blockIdx.x + 2] = logits[token];
    }
}

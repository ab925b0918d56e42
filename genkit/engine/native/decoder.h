// The step of a decoder, run by all threads together; included after kernels.h, as that is.

// ---- parts of a layer

inline void normalize(const Norm& norm, float epsilon, int64_t width, const float* x, float* y) {
    Floats totals = {};
    float mean = 0, rest = 0;
    int64_t whole = width / LANES * LANES;
    if (norm.bias) {
        for (int64_t i = 0; i < whole; i += LANES) totals += load(x + i);
        for (int64_t i = whole; i < width; ++i) rest += x[i];
        mean = (sum(totals) + rest) / width;
        totals = Floats{}, rest = 0;
    }
    for (int64_t i = 0; i < whole; i += LANES) {
        Floats distance = load(x + i) - mean;
        totals = multiply_add(distance, distance, totals);
    }
    for (int64_t i = whole; i < width; ++i) rest += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / std::sqrt((sum(totals) + rest) / width + epsilon);
    for (int64_t i = 0; i < width; ++i)
        y[i] = (x[i] - mean) * scale * norm.weight[i] + (norm.bias ? norm.bias[i] : 0);
}

// Rotate pairs (i, i + half) of a head by its position (Su et al. 2021, as Llama pairs them).
inline void rotate(float* x, const float* rotation, int64_t half) {
    const float *cosine = rotation, *sine = rotation + half;
    for (int64_t i = 0; i < half; ++i) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

// SiLU of the gate times the value, in place of the gate (Shazeer 2020).
inline void gated(float* gate, const float* up, int64_t first, int64_t last) {
    int64_t i = first;
    for (; i + LANES <= last; i += LANES) {
        Floats x = load(gate + i);
        store(gate + i, x / (1.0f + exponential(-x)) * load(up + i));
    }
    float rest[LANES] = {}, values[LANES] = {};
    std::copy(gate + i, gate + last, rest);
    std::copy(up + i, up + last, values);
    Floats x = load(rest);
    store(rest, x / (1.0f + exponential(-x)) * load(values));
    std::copy(rest, rest + (last - i), gate + i);
}

// GELU by its approximation with tanh (Hendrycks and Gimpel 2016), as GPT-2 has it.
inline Floats gelu(Floats x) {
    Floats inner = 0.7978845608f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exponential(-2.0f * inner));  // (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z))
}

inline void apply_gelu(float* x, int64_t first, int64_t last) {
    int64_t i = first;
    for (; i + LANES <= last; i += LANES) store(x + i, gelu(load(x + i)));
    float rest[LANES] = {};
    std::copy(x + i, x + last, rest);
    store(rest, gelu(load(rest)));
    std::copy(rest, rest + (last - i), x + i);
}

inline float dot(const float* a, const float* b, int64_t width) {
    Floats total = {};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) total = multiply_add(load(a + i), load(b + i), total);
    float rest = sum(total);
    for (; i < width; ++i) rest += a[i] * b[i];
    return rest;
}

inline void add_scaled(float* to, const float* x, float factor, int64_t width) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES)
        store(to + i, multiply_add(load(x + i), all(factor), load(to + i)));
    for (; i < width; ++i) to[i] += x[i] * factor;
}

// Softmax attention of one head of one token over the slots that it sees.
inline void attend(const float* query, const float* keys, const float* values, int64_t width,
                   const std::vector<int32_t>& slots, float scale, std::vector<float>& weights,
                   float* out) {
    size_t padded = (slots.size() + LANES - 1) / LANES * LANES;
    weights.assign(std::max(weights.size(), padded), -INFINITY);
    float largest = -INFINITY, total = 0;
    for (size_t i = 0; i < slots.size(); ++i) {
        weights[i] = dot(query, keys + slots[i] * width, width) * scale;
        largest = std::max(largest, weights[i]);
    }
    for (size_t i = 0; i < padded; i += LANES)
        store(&weights[i], exponential(load(&weights[i]) - largest));
    for (size_t i = 0; i < slots.size(); ++i) total += weights[i];
    std::fill(out, out + width, 0.0f);
    for (size_t i = 0; i < slots.size(); ++i)
        add_scaled(out, values + slots[i] * width, weights[i] / total, width);
}

// A row of an embedding of any kind.
void embed(const Matrix& matrix, int64_t token, float* out) {
    int64_t panel = token / PANEL, lane = token % PANEL;
    for (int64_t i = 0; i < matrix.inputs; ++i) {
        int64_t block = panel * matrix.groups() + i / GROUP, at = i % GROUP;
        switch (matrix.kind) {
            case Kind::float32:
                out[i] = static_cast<const float*>(matrix.weights)[token * matrix.inputs + i];
                break;
            case Kind::bfloat16:
                out[i] = widen_bfloat16(static_cast<const uint16_t*>(matrix.weights) +
                                        (panel * matrix.inputs + i) * PANEL)[lane];
                break;
            case Kind::int8: {
                const auto& own = static_cast<const Int8Block*>(matrix.weights)[block];
                const int64_t order[] = {0, 2, 1, 3};
                out[i] = own.levels[at / 4][lane][order[at % 4]] * widen_float16(own.scales)[lane];
                break;
            }
            case Kind::int4: {
                const auto& own = static_cast<const Int4Block*>(matrix.weights)[block];
                int code = (own.codes[at / 8][lane][at % 2] >> (at % 8 / 2 * 4)) & 15;
                out[i] = widen_float16(own.minima)[lane] + code * widen_float16(own.scales)[lane];
                break;
            }
        }
    }
}

// ---- the step

// What all threads write their shares of: (rows, …).
struct Shared {
    std::vector<float> query, key, value, attended, added, inner, gate;
    std::vector<std::vector<int32_t>> slots;  // that each row sees
};

// One thread's part of a step. Rows of the residual are every thread's own: each adds and
// normalises all of them, which costs less than to wait for the others.
class Part {
  public:
    Part(const Decoder& decoder, const Step& step, const Worker& worker, Shared& shared)
        : d_(decoder), s_(step), worker_(worker), shared_(shared), rows_(step.texts * step.tokens),
          x_(rows_ * d_.width), normal_(x_.size()) {}

    void run() {
        begin();
        for (size_t layer = 0; layer < d_.layers.size(); ++layer) {
            attention(d_.layers[layer], s_.keys[layer], s_.values[layer]);
            mlp(d_.layers[layer]);
        }
        finish();
    }

  private:
    int64_t query_width() const { return d_.heads * d_.head_width; }
    int64_t key_width() const { return d_.key_heads * d_.head_width; }
    bool together() const { return !d_.layers[0].key.weights; }
    int64_t query_stride() const { return query_width() + (together() ? 2 * key_width() : 0); }

    void begin() {
        for (int64_t row = 0; row < rows_; ++row) {
            float* own = &x_[row * d_.width];
            embed(d_.embedding, s_.ids[row], own);
            if (d_.positions)
                add_scaled(own, d_.positions + s_.positions[row] * d_.width, 1, d_.width);
        }
        for (int64_t row = worker_.first(rows_); row < worker_.last(rows_); ++row) {
            auto& slots = shared_.slots[row];
            slots.clear();
            for (int64_t slot = 0; slot < s_.slots; ++slot)
                if (s_.seen[row * s_.slots + slot]) slots.push_back(int32_t(slot));
        }
    }

    void normalize_rows(const Norm& norm) {
        for (int64_t row = 0; row < rows_; ++row)
            normalize(norm, d_.epsilon, d_.width, &x_[row * d_.width], &normal_[row * d_.width]);
        inputs_.set(normal_.data(), rows_, d_.width);
    }

    void add_rows() {
        for (size_t i = 0; i < x_.size(); ++i) x_[i] += shared_.added[i];
    }

    void multiply(const Matrix& matrix, std::vector<float>& y, int64_t stride) {
        inputs_.multiply(worker_, matrix, y.data(), stride);
    }

    void attention(const Layer& layer, float* keys, float* values) {
        normalize_rows(layer.before_attention);
        multiply(layer.query, shared_.query, query_stride());
        if (!together()) {
            multiply(layer.key, shared_.key, key_width());
            multiply(layer.value, shared_.value, key_width());
        }
        worker_.meet();
        place(keys, values);
        worker_.meet();
        attend_rows(keys, values);
        worker_.meet();
        inputs_.set(shared_.attended.data(), rows_, query_width());
        multiply(layer.output, shared_.added, d_.width);
        worker_.meet();
        add_rows();
    }

    float* key_of(int64_t row) {
        return together() ? &shared_.query[row * query_stride() + query_width()]
                          : &shared_.key[row * key_width()];
    }

    float* value_of(int64_t row) {
        return together() ? key_of(row) + key_width() : &shared_.value[row * key_width()];
    }

    // Rotate queries and keys, and put keys and values into their slots.
    void place(float* keys, float* values) {
        int64_t width = d_.head_width, heads = d_.heads + d_.key_heads, items = rows_ * heads;
        for (int64_t item = worker_.first(items); item < worker_.last(items); ++item) {
            int64_t row = item / heads, head = item % heads, own = head - d_.heads;
            float* x = own < 0 ? &shared_.query[row * query_stride() + head * width]
                               : key_of(row) + own * width;
            if (d_.rotations) rotate(x, d_.rotations + s_.positions[row] * width, width / 2);
            if (own < 0) continue;
            int64_t text = row / s_.tokens;
            int64_t at = ((text * d_.key_heads + own) * s_.slots + s_.places[row]) * width;
            std::copy(x, x + width, keys + at);
            std::copy(value_of(row) + own * width, value_of(row) + (own + 1) * width, values + at);
        }
    }

    void attend_rows(const float* keys, const float* values) {
        int64_t width = d_.head_width, items = rows_ * d_.heads, group = d_.heads / d_.key_heads;
        for (int64_t item = worker_.first(items); item < worker_.last(items); ++item) {
            int64_t row = item / d_.heads, head = item % d_.heads, text = row / s_.tokens;
            int64_t at = (text * d_.key_heads + head / group) * s_.slots * width;
            attend(&shared_.query[row * query_stride() + head * width], keys + at, values + at,
                   width, shared_.slots[row], d_.attention_scale, weights_,
                   &shared_.attended[row * query_width() + head * width]);
        }
    }

    void mlp(const Layer& layer) {
        normalize_rows(layer.before_mlp);
        int64_t inner = layer.up.outputs, panels = layer.up.panels();
        multiply(layer.up, shared_.inner, inner);
        if (layer.gate.weights) multiply(layer.gate, shared_.gate, inner);
        int64_t first = worker_.first(panels) * PANEL;
        int64_t last = std::min(worker_.last(panels) * PANEL, inner);
        for (int64_t row = 0; row < rows_; ++row) {
            float* up = &shared_.inner[row * inner];
            if (!layer.gate.weights) {
                apply_gelu(up, first, last);
                continue;
            }
            gated(&shared_.gate[row * inner], up, first, last);
        }
        worker_.meet();
        inputs_.set(layer.gate.weights ? shared_.gate.data() : shared_.inner.data(), rows_, inner);
        multiply(layer.down, shared_.added, d_.width);
        worker_.meet();
        add_rows();
    }

    void finish() {
        normalize_rows(d_.last);
        if (worker_.index == 0) std::copy(normal_.begin(), normal_.end(), s_.states);
        for (int64_t text = 0; text < s_.texts; ++text) {
            const float* last = &normal_[((text + 1) * s_.tokens - s_.kept) * d_.width];
            std::copy(last, last + s_.kept * d_.width, &x_[text * s_.kept * d_.width]);
        }
        inputs_.set(x_.data(), s_.texts * s_.kept, d_.width);
        inputs_.multiply(worker_, d_.head, s_.logits, d_.vocabulary);
    }

    const Decoder& d_;
    const Step& s_;
    const Worker& worker_;
    Shared& shared_;
    const int64_t rows_;
    std::vector<float> x_, normal_, weights_;
    Inputs inputs_;
};

void run(const Decoder& decoder, const Step& step, int64_t threads) {
    size_t rows = step.texts * step.tokens, keys = decoder.key_heads * decoder.head_width;
    size_t queries = decoder.heads * decoder.head_width, inner = decoder.layers[0].up.outputs;
    Shared shared;
    shared.query.resize(rows * (queries + 2 * keys));
    shared.key.resize(rows * keys);
    shared.value.resize(rows * keys);
    shared.attended.resize(rows * queries);
    shared.added.resize(rows * decoder.width);
    shared.inner.resize(rows * inner);
    shared.gate.resize(rows * inner);
    shared.slots.resize(rows);
    run_together(threads, [&](const Worker& worker) { Part(decoder, step, worker, shared).run(); });
}

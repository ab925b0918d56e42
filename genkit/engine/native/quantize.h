// Weights to blocks; included after kernels.h, as that is.

inline float from_half(uint16_t half) {
    uint16_t halves[PANEL] = {half};
    return widen_float16(halves)[0];
}

// To the nearest float16, ties to even; what is too large is infinite.
inline uint16_t to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x477ff000) return sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00);
    if (bits < 0x38800000) {  // below 2^-14 in steps of 2^-24
        std::memcpy(&value, &bits, 4);
        return sign | uint16_t(std::nearbyint(value * 0x1p24f));
    }
    return sign | uint16_t(((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10));
}

// Weights of a group of one output; those that fill it up repeat the last one.
struct Group {
    float values[GROUP];

    // Least and largest.
    std::pair<float, float> range() const {
        Floats low = load(values), high = low;
        for (int64_t i = LANES; i < GROUP; i += LANES) {
            Floats value = load(values + i);
            low = value < low ? value : low;
            high = value > high ? value : high;
        }
        std::pair<float, float> ends = {low[0], high[0]};
        for (int64_t i = 1; i < LANES; ++i)
            ends = {std::min(ends.first, low[i]), std::max(ends.second, high[i])};
        return ends;
    }
};

inline void set_group(Int8Block& block, int64_t lane, const Group& group) {
    auto [low, high] = group.range();
    float scale = std::max(-low, high) / 127;
    uint16_t half = to_half(scale);
    if (from_half(half) < scale * (1 - 1e-6f)) ++half;  // so that no level is beyond the last
    block.scales[lane] = half;
    float factor = half ? 1 / from_half(half) : 0;
    for (int64_t i = 0; i < GROUP; i += LANES) {
        Floats level = load(group.values + i) * factor;
        Ints whole = __builtin_convertvector(
            level + (level < 0.0f ? all(-0.5f) : all(0.5f)), Ints);
        int8_t own[LANES];
        const int64_t order[] = {0, 2, 1, 3, 4, 6, 5, 7};
        for (int64_t k = 0; k < LANES; ++k) own[order[k]] = int8_t(whole[k]);
        std::memcpy(block.levels[i / 4][lane], own, 4);
        std::memcpy(block.levels[i / 4 + 1][lane], own + 4, 4);
    }
}

// Codes on the line minimum + scale * code, and their squared error.
struct Line {
    uint16_t scale, minimum;  // float16
    float codes[GROUP], error;

    Line(const Group& group, float slope, float low)
        : scale(to_half(std::max(slope, 0.0f))), minimum(to_half(low)) {
        float step = from_half(scale), first = from_half(minimum), factor = scale ? 1 / step : 0;
        Floats total = {};
        for (int64_t i = 0; i < GROUP; i += LANES) {
            Floats value = load(group.values + i) - first, code = value * factor;
            code = code > 0.0f ? code : Floats{};
            code = code < 15.0f ? code : all(15.0f);
            code = __builtin_convertvector(__builtin_convertvector(code + 0.5f, Ints), Floats);
            store(codes + i, code);
            Floats distance = value - code * step;
            total = multiply_add(distance, distance, total);
        }
        error = sum(total);
    }

    // The line with the least squared error for these codes.
    Line fitted(const Group& group) const {
        Floats c = {}, w = {}, cc = {}, cw = {};
        for (int64_t i = 0; i < GROUP; i += LANES) {
            Floats code = load(codes + i), weight = load(group.values + i);
            c += code, w += weight;
            cc = multiply_add(code, code, cc);
            cw = multiply_add(code, weight, cw);
        }
        float mean = sum(c) / GROUP, spread = sum(cc) - mean * sum(c);
        float slope = spread > 0 ? (sum(cw) - mean * sum(w)) / spread : 0;
        return Line(group, slope, sum(w) / GROUP - slope * mean);
    }
};

// From the line through a group's extremes, lines are fitted to codes and codes to lines, in turns
// (Lloyd 1982), while the error falls.
inline void set_group(Int4Block& block, int64_t lane, const Group& group) {
    auto [low, high] = group.range();
    Line best(group, (high - low) / 15, low);
    for (Line next = best.fitted(group); next.error < best.error; next = best.fitted(group))
        best = next;
    block.scales[lane] = best.scale;
    block.minima[lane] = best.minimum;
    for (int64_t i = 0; i < GROUP; ++i)
        block.codes[i / 8][lane][i % 2] |= uint16_t(uint16_t(best.codes[i]) << i % 8 / 2 * 4);
}

inline Group read_group(const Weights& weights, const float* row, int64_t first, int64_t inputs) {
    Group group;
    if (weights.by_input == 1 && first + GROUP <= inputs) {
        std::memcpy(group.values, row + first, sizeof group.values);
        return group;
    }
    for (int64_t i = 0; i < GROUP; ++i)
        group.values[i] = row[std::min(first + i, inputs - 1) * weights.by_input];
    return group;
}

template <typename Block>
void quantize_panels(const Matrix& matrix, const Weights& weights, int64_t first, int64_t last) {
    Block* blocks = static_cast<Block*>(const_cast<void*>(matrix.weights)) + first * matrix.groups();
    for (int64_t panel = first; panel < last; ++panel)
        for (int64_t at = 0; at < matrix.groups(); ++at, ++blocks) {
            std::memset(static_cast<void*>(blocks), 0, sizeof(Block));
            int64_t outputs = std::min(PANEL, matrix.outputs - panel * PANEL);
            for (int64_t lane = 0; lane < outputs; ++lane) {
                const float* row = weights.first + (panel * PANEL + lane) * weights.by_output;
                set_group(*blocks, lane, read_group(weights, row, at * GROUP, matrix.inputs));
            }
        }
}

// Fill the blocks of a matrix, int8 or int4.
void quantize(const Matrix& matrix, const Weights& weights, int64_t threads) {
    run_together(threads, [&](const Worker& worker) {
        int64_t first = worker.first(matrix.panels()), last = worker.last(matrix.panels());
        if (matrix.kind == Kind::int8) quantize_panels<Int8Block>(matrix, weights, first, last);
        else quantize_panels<Int4Block>(matrix, weights, first, last);
    });
}

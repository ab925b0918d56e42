// Products of packed matrices and the step of a decoder, for one kind of CPU.
//
// The file is included once for each, inside a namespace of its own and after its instructions were
// allowed. No result depends on the number of rows or threads: a sum has one order, always.
//
// GENKIT_VNNI, GENKIT_AVX2: which instructions there are besides those of plain C++.

typedef float Floats __attribute__((vector_size(32), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(32), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(16), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(32), aligned(4)));
typedef int16_t Int16s __attribute__((vector_size(32), aligned(2)));
typedef uint16_t UInt16s __attribute__((vector_size(32), aligned(2)));
typedef int16_t HalfInt16s __attribute__((vector_size(16), aligned(2)));
typedef int8_t Int8s __attribute__((vector_size(8), aligned(1)));

constexpr int64_t LANES = 8;
constexpr int TILE = 4;  // rows that share what was read of a matrix

// ---- vectors

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }
inline Floats all(float value) { return value - Floats{}; }

inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(GENKIT_AVX2)
    return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
    return a * b + c;
#endif
}

inline float sum(Floats v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

inline int32_t sum(Ints v) { return v[0] + v[1] + v[2] + v[3] + v[4] + v[5] + v[6] + v[7]; }

inline float greatest(Floats v) {
    float half[LANES / 2];
    for (int64_t i = 0; i < LANES / 2; ++i) half[i] = std::max(v[i], v[i + LANES / 2]);
    return std::max(std::max(half[0], half[1]), std::max(half[2], half[3]));
}

inline Floats widen_bfloat16(const uint16_t* from) {
    Words wide = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16;
    return Floats(wide);
}

inline Floats widen_float16(const uint16_t* from) {
#if defined(GENKIT_AVX2)
    return Floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    // exponents have 112 more room in float32; scales are neither infinite nor NaN
    Words wide = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words);
    Floats size = Floats((wide & 0x7fff) << 13) * 0x1p112f;
    return Floats(Words(size) | ((wide & 0x8000) << 16));
#endif
}

// e to the power of each: 2^n times a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2].
inline Floats exponential(Floats x) {
    x = x > 88.0f ? all(88.0f) : x;
    x = x < -87.0f ? all(-87.0f) : x;
    Ints n = __builtin_convertvector(x * 1.44269504f + (x < 0.0f ? all(-0.5f) : all(0.5f)), Ints);
    Floats whole = __builtin_convertvector(n, Floats);
    Floats rest = multiply_add(whole, all(-0.693359375f), x);
    rest = multiply_add(whole, all(2.12194440e-4f), rest);
    Floats y = all(1.0f / 720);
    for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        y = multiply_add(y, rest, all(factor));
    return y * Floats((n + 127) << 23);
}

// ---- rows of inputs in 16 bits

// A row of inputs as levels of 16 bits, with a scale, and their sum, for each group.
struct QuantizedRow {
    const int16_t* levels;
    const float *scales, *sums;
};

// Rows of one width, quantised; a buffer that only grows.
class QuantizedRows {
  public:
    void resize(int64_t rows, int64_t width) {
        width_ = width, groups_ = (width + GROUP - 1) / GROUP;
        levels_.resize(std::max<size_t>(levels_.size(), rows * groups_ * GROUP));
        scales_.resize(std::max<size_t>(scales_.size(), rows * groups_));
        sums_.resize(scales_.size());
    }

    // Some of the rows at x.
    void quantize(const float* x, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row)
            for (int64_t group = 0; group < groups_; ++group) {
                int64_t width = std::min(GROUP, width_ - group * GROUP);
                const float* own = x + row * width_ + group * GROUP;
                float padded[GROUP] = {};
                if (width < GROUP) own = std::copy(own, own + width, padded) - width;
                quantize_group(own, row * groups_ + group);
            }
    }

    QuantizedRow operator[](int64_t row) const {
        int64_t first = row * groups_;
        return {&levels_[first * GROUP], &scales_[first], &sums_[first]};
    }

  private:
    void quantize_group(const float* x, int64_t group) {
        Floats largest = {}, finite = {};
        for (int64_t i = 0; i < GROUP; i += LANES) {
            Floats value = load(x + i), size = value < 0.0f ? -value : value;
            largest = size > largest ? size : largest;
            finite += value * 0.0f;  // NaN if a value is not
        }
        float most = greatest(largest), lost = sum(finite);
        float factor = most > 0 && lost == 0 ? 32767 / most : 0;
        scales_[group] = most / 32767 + lost;
        Ints total = {};
        for (int64_t i = 0; i < GROUP; i += LANES) {
            Floats value = factor > 0 ? load(x + i) * factor : Floats{};
            Ints level = __builtin_convertvector(
                value + (value < 0.0f ? all(-0.5f) : all(0.5f)), Ints);
            total += level;
            HalfInt16s narrow = __builtin_convertvector(level, HalfInt16s);
            std::memcpy(&levels_[group * GROUP + i], &narrow, sizeof narrow);
        }
        sums_[group] = scales_[group] * float(sum(total));
    }

    int64_t width_ = 0;
    int64_t groups_ = 0;
    std::vector<int16_t> levels_;
    std::vector<float> scales_, sums_;
};

// ---- products of integers

// Add to each lane the products of its pair of levels with a pair of inputs, which all lanes share.
inline Ints add_pair(Ints total, Int16s levels, const int16_t* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
#if defined(GENKIT_VNNI)
    return Ints(_mm256_dpwssd_epi32(__m256i(total), __m256i(levels), _mm256_set1_epi32(pair)));
#elif defined(GENKIT_AVX2)
    return total + Ints(_mm256_madd_epi16(__m256i(levels), _mm256_set1_epi32(pair)));
#else
    Ints low = (Ints(levels) << 16) >> 16, high = Ints(levels) >> 16;
    return total + low * x[0] + high * x[1];
#endif
}

// A group of a panel times the same group of some rows: exact, as 32 products of 8 and 16 bits are
// less than 32 bits hold.
template <int ROWS>
inline void add_group(Ints* totals, const Int8Block& block, const int16_t* const* x) {
    for (int64_t four = 0; four < GROUP / 4; ++four) {
        Int16s levels = *reinterpret_cast<const Int16s*>(block.levels[four]);
        Int16s first = (levels << 8) >> 8, second = levels >> 8;
        for (int row = 0; row < ROWS; ++row) {
            totals[row] = add_pair(totals[row], first, x[row] + four * 4);
            totals[row] = add_pair(totals[row], second, x[row] + four * 4 + 2);
        }
    }
}

template <int ROWS>
inline void add_group(Ints* totals, const Int4Block& block, const int16_t* const* x) {
    for (int64_t eight = 0; eight < GROUP / 8; ++eight) {
        UInt16s codes = *reinterpret_cast<const UInt16s*>(block.codes[eight]);
        for (int pair = 0; pair < 4; ++pair) {
            Int16s own = Int16s((codes >> (4 * pair)) & 15);
            for (int row = 0; row < ROWS; ++row)
                totals[row] = add_pair(totals[row], own, x[row] + eight * 8 + pair * 2);
        }
    }
}

// What a group adds besides its products: a code of 0 is no zero.
inline Floats add_minima(Floats sums, const Int8Block&, float) { return sums; }
inline Floats add_minima(Floats sums, const Int4Block& block, float inputs) {
    return multiply_add(widen_float16(block.minima), all(inputs), sums);
}

// A panel of outputs of some rows: integers are added up exactly in each group, then scaled.
template <int ROWS, typename Block>
void multiply_panel(const Block* blocks, int64_t groups, const QuantizedRow* rows, Floats* sums) {
    for (int row = 0; row < ROWS; ++row) sums[row] = Floats{};
    for (int64_t group = 0; group < groups; ++group) {
        const Block& block = blocks[group];
        const int16_t* x[ROWS];
        for (int row = 0; row < ROWS; ++row) x[row] = rows[row].levels + group * GROUP;
        Ints totals[ROWS] = {};
        add_group<ROWS>(totals, block, x);
        Floats scales = widen_float16(block.scales);
        for (int row = 0; row < ROWS; ++row) {
            Floats products = __builtin_convertvector(totals[row], Floats);
            sums[row] = multiply_add(products, scales * rows[row].scales[group], sums[row]);
            sums[row] = add_minima(sums[row], block, rows[row].sums[group]);
        }
    }
}

// Write the sums of a panel of some rows, with their biases.
inline void store_panel(const Matrix& matrix, int64_t panel, const Floats* sums, int64_t rows,
                        float* y, int64_t stride) {
    int64_t first = panel * PANEL, last = std::min(first + PANEL, matrix.outputs);
    if (last - first == PANEL) {
        Floats bias = matrix.bias ? load(matrix.bias + first) : Floats{};
        for (int64_t row = 0; row < rows; ++row) store(y + row * stride + first, sums[row] + bias);
        return;
    }
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t k = first; k < last; ++k)
            y[row * stride + k] = sums[row][k - first] + (matrix.bias ? matrix.bias[k] : 0);
}

template <typename Block>
void multiply_panels(const Matrix& matrix, const QuantizedRows& x, int64_t rows, float* y,
                     int64_t stride, int64_t first, int64_t last) {
    const Block* blocks = static_cast<const Block*>(matrix.weights);
    for (int64_t panel = first; panel < last; ++panel) {
        const Block* own = blocks + panel * matrix.groups();
        for (int64_t row = 0; row < rows; row += TILE) {
            QuantizedRow tile[TILE];
            Floats sums[TILE];
            int64_t height = std::min<int64_t>(TILE, rows - row);
            for (int64_t i = 0; i < height; ++i) tile[i] = x[row + i];
            auto function = height == 1   ? multiply_panel<1, Block>
                            : height == 2 ? multiply_panel<2, Block>
                            : height == 3 ? multiply_panel<3, Block>
                                          : multiply_panel<4, Block>;
            function(own, matrix.groups(), tile, sums);
            store_panel(matrix, panel, sums, height, y + row * stride, stride);
        }
    }
}

// ---- products of float32

constexpr int FEW = 4;      // outputs that share what was read of rows
constexpr int ABREAST = 3;  // rows that share what was read of a matrix; 12 sums fit into registers
constexpr int64_t CHUNK = 1 << 16;  // weights that stay in a core's cache while rows pass by,
constexpr int64_t BLOCK = 64;       // and rows that do

// Some outputs of some rows. Each sum has the order that it has alone.
template <int OUTPUTS, int ROWS>
void multiply_tile(const float* weights, int64_t inputs, const float* x, float* y,
                   int64_t stride) {
    Floats sums[OUTPUTS][ROWS] = {};
    int64_t i = 0;
    for (; i + LANES <= inputs; i += LANES)
        for (int k = 0; k < OUTPUTS; ++k) {
            Floats own = load(weights + k * inputs + i);
            for (int row = 0; row < ROWS; ++row)
                sums[k][row] = multiply_add(own, load(x + row * inputs + i), sums[k][row]);
        }
    for (int k = 0; k < OUTPUTS; ++k)
        for (int row = 0; row < ROWS; ++row) {
            float total = sum(sums[k][row]);
            for (int64_t j = i; j < inputs; ++j) total += weights[k * inputs + j] * x[row * inputs + j];
            y[row * stride + k] = total;
        }
}

template <int OUTPUTS>
void multiply_rows(const float* weights, int64_t inputs, const float* x, int64_t rows, float* y,
                   int64_t stride) {
    for (int64_t row = 0; row < rows; row += ABREAST) {
        auto function = rows - row == 1   ? multiply_tile<OUTPUTS, 1>
                        : rows - row == 2 ? multiply_tile<OUTPUTS, 2>
                                          : multiply_tile<OUTPUTS, 3>;
        function(weights, inputs, x + row * inputs, y + row * stride, stride);
    }
}

inline void multiply_float32(const Matrix& matrix, const float* x, int64_t rows, float* y,
                             int64_t stride, int64_t first, int64_t last) {
    const float* weights = static_cast<const float*>(matrix.weights);
    int64_t inputs = matrix.inputs, rest = first + (last - first) / FEW * FEW;
    int64_t many = std::max<int64_t>(FEW, CHUNK / inputs / FEW * FEW);
    for (int64_t from = first; from < rest; from += many)
        for (int64_t row = 0; row < rows; row += BLOCK)
            for (int64_t k = from; k < std::min(from + many, rest); k += FEW)
                multiply_rows<FEW>(weights + k * inputs, inputs, x + row * inputs,
                                   std::min(BLOCK, rows - row), y + row * stride + k, stride);
    for (int64_t k = rest; k < last; ++k)
        multiply_rows<1>(weights + k * inputs, inputs, x, rows, y + k, stride);
    if (!matrix.bias) return;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t k = first; k < last; ++k) y[row * stride + k] += matrix.bias[k];
}

// ---- products of bfloat16

// A panel of outputs of some rows; four sums, so that none waits for the one before.
template <int ROWS>
void multiply_wide(const uint16_t* weights, int64_t inputs, const float* x, Floats* sums) {
    constexpr int PARTS = 4;
    Floats parts[ROWS][PARTS] = {};
    int64_t i = 0;
    for (; i + PARTS <= inputs; i += PARTS)
        for (int part = 0; part < PARTS; ++part) {
            Floats own = widen_bfloat16(weights + (i + part) * PANEL);
            for (int row = 0; row < ROWS; ++row)
                parts[row][part] =
                    multiply_add(own, all(x[row * inputs + i + part]), parts[row][part]);
        }
    for (; i < inputs; ++i)
        for (int row = 0; row < ROWS; ++row)
            parts[row][0] = multiply_add(widen_bfloat16(weights + i * PANEL),
                                         all(x[row * inputs + i]), parts[row][0]);
    for (int row = 0; row < ROWS; ++row)
        sums[row] = (parts[row][0] + parts[row][1]) + (parts[row][2] + parts[row][3]);
}

inline void multiply_bfloat16(const Matrix& matrix, const float* x, int64_t rows, float* y,
                              int64_t stride, int64_t first, int64_t last) {
    const uint16_t* weights = static_cast<const uint16_t*>(matrix.weights);
    for (int64_t panel = first; panel < last; ++panel)
        for (int64_t row = 0; row < rows; row += ABREAST) {
            Floats sums[ABREAST];
            int64_t height = std::min<int64_t>(ABREAST, rows - row);
            auto function = height == 1   ? multiply_wide<1>
                            : height == 2 ? multiply_wide<2>
                                          : multiply_wide<3>;
            function(weights + panel * matrix.inputs * PANEL, matrix.inputs,
                     x + row * matrix.inputs, sums);
            store_panel(matrix, panel, sums, height, y + row * stride, stride);
        }
}

#include "many.h"

// ---- products of any kind

inline bool has_blocks(const Matrix& matrix) {
    return matrix.kind == Kind::int8 || matrix.kind == Kind::int4;
}

// A thread's share of rows times a matrix, (rows, outputs) at a stride; x8: the same rows,
// quantised, if the matrix has blocks.
inline void multiply_share(const Worker& worker, const Matrix& matrix, const float* x,
                           const QuantizedRows& x8, int64_t rows, float* y, int64_t stride) {
    int64_t first = worker.first(matrix.panels()), last = worker.last(matrix.panels());
    auto few8 = multiply_panels<Int8Block>, many8 = multiply_many<Int8Block>;
    auto few4 = multiply_panels<Int4Block>, many4 = multiply_many<Int4Block>;
    switch (matrix.kind) {
        case Kind::float32:
            return multiply_float32(matrix, x, rows, y, stride, first * PANEL,
                                    std::min(last * PANEL, matrix.outputs));
        case Kind::bfloat16:
            return multiply_bfloat16(matrix, x, rows, y, stride, first, last);
        case Kind::int8:
            return (rows < MANY ? few8 : many8)(matrix, x8, rows, y, stride, first, last);
        case Kind::int4:
            return (rows < MANY ? few4 : many4)(matrix, x8, rows, y, stride, first, last);
    }
}

// Rows of inputs, quantised at most once whatever they are multiplied by.
class Inputs {
  public:
    void set(const float* x, int64_t rows, int64_t width) {
        x_ = x, rows_ = rows, width_ = width, quantized_ = false;
    }

    // This thread's share of x times a matrix; see multiply_share.
    void multiply(const Worker& worker, const Matrix& matrix, float* y, int64_t stride) {
        if (has_blocks(matrix) && !quantized_) {
            x8_.resize(rows_, width_);
            x8_.quantize(x_, 0, rows_);
            quantized_ = true;
        }
        multiply_share(worker, matrix, x_, x8_, rows_, y, stride);
    }

  private:
    const float* x_ = nullptr;
    int64_t rows_ = 0, width_ = 0;
    bool quantized_ = false;
    QuantizedRows x8_;
};

void multiply(const Matrix& matrix, const float* x, int64_t rows, float* y, int64_t threads) {
    static thread_local QuantizedRows own;
    QuantizedRows& x8 = own;  // of this thread, for all that help it
    if (has_blocks(matrix)) x8.resize(rows, matrix.inputs);
    run_together(threads, [&](const Worker& worker) {
        if (has_blocks(matrix)) {
            x8.quantize(x, worker.first(rows), worker.last(rows));
            worker.meet();
        }
        multiply_share(worker, matrix, x, x8, rows, y, matrix.outputs);
    });
}

// ---- what surrounds products of 8-bit levels by others

// A row to levels of 8 bits; returns their scale, which is not finite if a value is not.
inline float round_row(const float* x, int64_t width, int8_t* levels) {
    Floats largest = {}, finite = {};
    int64_t whole = width / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        Floats value = load(x + i), size = value < 0.0f ? -value : value;
        largest = size > largest ? size : largest;
        finite += value * 0.0f;  // NaN if a value is not
    }
    float most = greatest(largest), lost = sum(finite);
    for (int64_t i = whole; i < width; ++i) {
        most = std::max(most, std::fabs(x[i]));
        lost += x[i] * 0.0f;
    }
    float factor = most > 0 && lost == 0 ? 127 / most : 0;
    for (int64_t i = 0; i < whole; i += LANES) {
        Floats value = factor > 0 ? load(x + i) * factor : Floats{};
        value += value < 0.0f ? all(-0.5f) : all(0.5f);
        Int8s narrow = __builtin_convertvector(__builtin_convertvector(value, Ints), Int8s);
        std::memcpy(levels + i, &narrow, sizeof narrow);
    }
    for (int64_t i = whole; i < width; ++i) {
        float level = factor > 0 ? x[i] * factor : 0;
        levels[i] = int8_t(level + (level < 0 ? -0.5f : 0.5f));
    }
    return most / 127 + lost;
}

void round_rows(const float* x, int64_t rows, int64_t width, int8_t* levels, float* scales,
                int64_t threads) {
    run_together(threads, [&](const Worker& worker) {
        for (int64_t row = worker.first(rows); row < worker.last(rows); ++row)
            scales[row] = round_row(x + row * width, width, levels + row * width);
    });
}

void scale_sums(const Sums& sums, float* y, int64_t threads) {
    run_together(threads, [&](const Worker& worker) {
        for (int64_t row = worker.first(sums.rows); row < worker.last(sums.rows); ++row)
            for (int64_t k = 0; k < sums.outputs; ++k)
                y[row * sums.outputs + k] =
                    float(sums.first[row * sums.outputs + k]) *
                        (sums.by_row[row] * sums.by_output[k]) +
                    (sums.bias ? sums.bias[k] : 0);
    });
}

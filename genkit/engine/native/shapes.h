// What kernels and the module agree on: packed matrices, a decoder, and one step of it.

#pragma once

#include <cstdint>
#include <vector>

namespace genkit {

constexpr int64_t GROUP = 32;  // inputs that share a scale
constexpr int64_t PANEL = 8;   // outputs that are computed together: the lanes of a vector

enum class Kind : int64_t { float32 = 0, bfloat16 = 1, int8 = 2, int4 = 3 };

// A group of inputs of a panel of outputs. Pairs of inputs lie where a vector has 16 bits for each:
// the levels of inputs 4 i, 4 i + 2, 4 i + 1 and 4 i + 3 of an output are levels[i][output].
struct Int8Block {
    uint16_t scales[PANEL];  // float16
    int8_t levels[GROUP / 4][PANEL][4];
};

// Codes of 4 bits stand for minimum + scale * code. Those of inputs 8 i + 2 k + {0, 1} of an output
// are bits 4 k to 4 k + 3 of codes[i][output][{0, 1}].
struct Int4Block {
    uint16_t scales[PANEL], minima[PANEL];  // float16
    uint16_t codes[GROUP / 8][PANEL][2];
};

// float32 is (outputs, inputs) as it comes, bfloat16 (panels, inputs, PANEL); int8 and int4 are
// blocks, (panels of outputs, groups of inputs). All but float32 are filled up with zeros.
struct Matrix {
    Kind kind;
    int64_t outputs, inputs;
    const void* weights;  // null: there is no such matrix
    const float* bias;    // (outputs,), or null

    int64_t groups() const { return (inputs + GROUP - 1) / GROUP; }
    int64_t panels() const { return (outputs + PANEL - 1) / PANEL; }
};

// Weights in float32: the one of an output and an input is first[output * by_output + input *
// by_input].
struct Weights {
    const float* first;
    int64_t by_output, by_input;
};

struct Norm {
    const float* weight;  // (width,)
    const float* bias;    // null: the root of the mean square alone (Zhang and Sennrich 2019)
};

struct Layer {
    Norm before_attention, before_mlp;
    Matrix query, key, value;  // or all three, one after the other, in `query`
    Matrix output;
    Matrix gate;  // none: GELU as of GPT-2 instead of a gated SiLU
    Matrix up, down;
};

struct Decoder {
    int64_t width, heads, key_heads, head_width, vocabulary, context;
    float epsilon, attention_scale;
    const float* positions;  // (context, width), added to embeddings; or null
    const float* rotations;  // (context, 2, head_width / 2): cosines, sines; or null
    Norm last;
    Matrix embedding;  // (vocabulary, width)
    Matrix head;
    std::vector<Layer> layers;
};

// New tokens of trees of earlier ones: see `StockStep` in decoder.py.
struct Step {
    int64_t texts, tokens, slots;  // tokens: new ones of each text
    int64_t kept;                  // of how many of the last new tokens logits are wanted
    const int64_t* ids;            // (texts, tokens)
    const int64_t* positions;      // (texts, tokens)
    const int64_t* places;         // (texts, tokens): the slot of each
    const uint8_t* seen;           // (texts, tokens, slots): which slots each attends to
    std::vector<float*> keys, values;  // of each layer, (texts, key heads, slots, head width)
    float* logits;                 // (texts, kept, vocabulary)
    float* states;                 // (texts, tokens, width): normalised, as the head reads them
};

// Sums of products of 8-bit levels, which the scales of their row and output make numbers.
struct Sums {
    const int32_t* first;  // (rows, outputs)
    int64_t rows, outputs;
    const float *by_row, *by_output;
    const float* bias;  // (outputs,), or null
};

// What is compiled once for each kind of CPU.
struct Kernels {
    void (*round_rows)(const float* x, int64_t rows, int64_t width, int8_t* levels, float* scales,
                       int64_t threads);
    void (*scale_sums)(const Sums&, float* y, int64_t threads);
    void (*multiply)(const Matrix&, const float* x, int64_t rows, float* y, int64_t threads);
    void (*quantize)(const Matrix&, const Weights&, int64_t threads);
    void (*embed)(const Matrix&, int64_t row, float* out);
    void (*run)(const Decoder&, const Step&, int64_t threads);
};

extern const Kernels generic_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels vnni_kernels;
#endif

}  // namespace genkit

// Many steps of a decoder, each with the token that the logits before it have chosen.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "shapes.h"

namespace genkit {

// How tokens are chosen: see `choose` in text/logits.py, whose words these are.
struct Choice {
    int64_t steps;       // at most so many
    float temperature;   // divides the logits
    float least;         // log min_p; -infinity leaves all tokens
    float near;          // how far rounding may move a logit
    const float* noise;  // (texts, steps, vocabulary), or null for the most likely token
    std::vector<int64_t> ends;  // tokens that end a text
};

// The token of a row, or -1 where rounding could decide.
inline int64_t choose(const float* logits, const float* noise, int64_t vocabulary,
                      const Choice& choice, std::vector<float>& scaled) {
    float near = choice.near / std::min(1.0f, choice.temperature), highest = -INFINITY;
    scaled.resize(vocabulary);
    for (int64_t i = 0; i < vocabulary; ++i) {
        scaled[i] = logits[i] / choice.temperature;
        highest = std::max(highest, scaled[i]);
    }
    float least = highest + choice.least;
    float best = -INFINITY, second = -INFINITY;  // of those that some rounding would keep
    int64_t token = -1;
    for (int64_t i = 0; i < vocabulary; ++i) {
        if (scaled[i] < least - near) continue;
        float score = noise ? scaled[i] + noise[i] : scaled[i];
        second = std::max(second, std::min(score, best));
        if (score > best) best = score, token = i;
    }
    bool sure = token >= 0 && best - second > 2 * near && !(scaled[token] < least + near);
    return sure ? token : -1;
}

// Write while every row's token is sure and ends no text; return the number of steps done.
//
// step.logits is (1 + steps, texts, vocabulary), of which the first ones are there; step.ids,
// positions and places are those of the next tokens, (texts,); ids of step n + 1 are kept in
// written, (steps, texts).
inline int64_t write(const Decoder& decoder, Step step, const Choice& choice, int64_t* written,
                     void (*run)(const Decoder&, const Step&, int64_t), int64_t threads) {
    int64_t texts = step.texts, vocabulary = decoder.vocabulary;
    std::vector<int64_t> positions(step.positions, step.positions + texts);
    std::vector<int64_t> places(step.places, step.places + texts);
    std::vector<uint8_t> seen(step.seen, step.seen + texts * step.slots);
    std::vector<float> scaled;
    step.positions = positions.data(), step.places = places.data(), step.seen = seen.data();
    for (int64_t done = 0; done < choice.steps; ++done) {
        step.ids = written + done * texts;
        for (int64_t row = 0; row < texts; ++row) {
            const float* noise =
                choice.noise ? choice.noise + (row * choice.steps + done) * vocabulary : nullptr;
            int64_t token =
                choose(step.logits + row * vocabulary, noise, vocabulary, choice, scaled);
            bool ends = std::find(choice.ends.begin(), choice.ends.end(), token) != choice.ends.end();
            if (token < 0 || ends) return done;
            written[done * texts + row] = token;
            seen[row * step.slots + places[row]] = 1;
        }
        step.logits += texts * vocabulary;
        run(decoder, step, threads);
        for (int64_t row = 0; row < texts; ++row) ++positions[row], ++places[row];
    }
    return choice.steps;
}

}  // namespace genkit

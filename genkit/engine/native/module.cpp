// genkit.engine._native: what Python sees of the kernels. Tensors come as addresses.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

#include "shapes.h"
#include "threads.h"
#include "writer.h"

namespace genkit {
namespace {

struct Target {
    const char* name;
    const Kernels* kernels;
    bool (*runs)();
};

// The fastest first.
const Target targets[] = {
#if defined(__x86_64__)
    {"vnni", &vnni_kernels,
     [] {
         return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
     }},
    {"avx2", &avx2_kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"generic", &generic_kernels, [] { return true; }},
};

const Target* chosen = nullptr;

// ---- reading arguments: a tuple or list of numbers, in order

struct Wrong : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class Numbers {
  public:
    explicit Numbers(PyObject* list) : list_(list) {
        if (!PyList_Check(list)) throw Wrong("a list of numbers was expected");
    }

    int64_t integer() {
        int64_t value = PyLong_AsLongLong(next());
        if (PyErr_Occurred()) throw Wrong("an integer was expected");
        return value;
    }

    double real() {
        double value = PyFloat_AsDouble(next());
        if (PyErr_Occurred()) throw Wrong("a number was expected");
        return value;
    }

    template <typename T>
    T* address() {
        return reinterpret_cast<T*>(integer());
    }

    bool ended() const { return at_ == PyList_Size(list_); }

  private:
    PyObject* next() {
        if (ended()) throw Wrong("more numbers were expected");
        return PyList_GetItem(list_, at_++);
    }

    PyObject* list_;
    Py_ssize_t at_ = 0;
};

// kind, outputs, inputs, weights, bias
Matrix read_matrix(Numbers& numbers) {
    Matrix matrix{};
    matrix.kind = Kind(numbers.integer());
    matrix.outputs = numbers.integer();
    matrix.inputs = numbers.integer();
    matrix.weights = numbers.address<const void>();
    matrix.bias = numbers.address<const float>();
    return matrix;
}

Norm read_norm(Numbers& numbers) {
    const float* weight = numbers.address<const float>();
    return {weight, numbers.address<const float>()};
}

Layer read_layer(Numbers& numbers) {
    Layer layer{};
    layer.before_attention = read_norm(numbers);
    for (Matrix* matrix : {&layer.query, &layer.key, &layer.value, &layer.output})
        *matrix = read_matrix(numbers);
    layer.before_mlp = read_norm(numbers);
    for (Matrix* matrix : {&layer.gate, &layer.up, &layer.down}) *matrix = read_matrix(numbers);
    return layer;
}

Decoder read_decoder(Numbers& numbers) {
    Decoder decoder{};
    for (int64_t* number : {&decoder.width, &decoder.heads, &decoder.key_heads,
                            &decoder.head_width, &decoder.vocabulary, &decoder.context})
        *number = numbers.integer();
    decoder.epsilon = float(numbers.real());
    decoder.attention_scale = float(numbers.real());
    decoder.positions = numbers.address<const float>();
    decoder.rotations = numbers.address<const float>();
    decoder.last = read_norm(numbers);
    decoder.embedding = read_matrix(numbers);
    decoder.head = read_matrix(numbers);
    while (!numbers.ended()) decoder.layers.push_back(read_layer(numbers));
    if (decoder.layers.empty()) throw Wrong("a decoder has layers");
    return decoder;
}

Step read_step(Numbers& numbers, size_t layers) {
    Step step{};
    step.texts = numbers.integer();
    step.tokens = numbers.integer();
    step.slots = numbers.integer();
    step.kept = numbers.integer();
    step.ids = numbers.address<const int64_t>();
    step.positions = numbers.address<const int64_t>();
    step.places = numbers.address<const int64_t>();
    step.seen = numbers.address<const uint8_t>();
    step.logits = numbers.address<float>();
    step.states = numbers.address<float>();
    for (size_t layer = 0; layer < layers; ++layer) step.keys.push_back(numbers.address<float>());
    for (size_t layer = 0; layer < layers; ++layer) step.values.push_back(numbers.address<float>());
    return step;
}

Choice read_choice(Numbers& numbers) {
    Choice choice{};
    choice.steps = numbers.integer();
    choice.temperature = float(numbers.real());
    choice.least = float(numbers.real());
    choice.near = float(numbers.real());
    choice.noise = numbers.address<const float>();
    while (!numbers.ended()) choice.ends.push_back(numbers.integer());
    return choice;
}

void check_range(const char* what, const int64_t* values, int64_t count, int64_t limit) {
    for (int64_t i = 0; i < count; ++i)
        if (values[i] < 0 || values[i] >= limit)
            throw std::out_of_range(std::string(what) + " " + std::to_string(values[i]) +
                                    " is not below " + std::to_string(limit));
}

// Nothing is read or written outside of what steps were given: this one and those that follow it.
void check_step(const Step& step, const Decoder& decoder, int64_t steps = 1) {
    int64_t tokens = step.texts * step.tokens;
    check_range("position", step.positions, tokens, decoder.context - steps + 1);
    check_range("slot", step.places, tokens, step.slots - steps + 1);
}

// ---- functions of the module

// Run a function without the interpreter's lock; C++ exceptions become Python's.
template <typename Function>
PyObject* without_lock(Function function) {
    std::string problem;
    PyObject* kind = nullptr;
    Py_BEGIN_ALLOW_THREADS
    try {
        function();
    } catch (const std::out_of_range& error) {
        kind = PyExc_IndexError, problem = error.what();
    } catch (const std::exception& error) {
        kind = PyExc_RuntimeError, problem = error.what();
    }
    Py_END_ALLOW_THREADS
    if (!kind) Py_RETURN_NONE;
    PyErr_SetString(kind, problem.c_str());
    return nullptr;
}

template <typename Function>
PyObject* with_arguments(Function function) {
    try {
        return function();
    } catch (const Wrong& error) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, error.what());
        return nullptr;
    }
}

constexpr const char* DECODER = "genkit.decoder";

void delete_decoder(PyObject* capsule) {
    delete static_cast<Decoder*>(PyCapsule_GetPointer(capsule, DECODER));
}

PyObject* make_decoder(PyObject*, PyObject* list) {
    return with_arguments([&] {
        Numbers numbers(list);
        auto decoder = std::make_unique<Decoder>(read_decoder(numbers));
        PyObject* capsule = PyCapsule_New(decoder.get(), DECODER, delete_decoder);
        if (capsule) decoder.release();
        return capsule;
    });
}

PyObject* run(PyObject*, PyObject* arguments) {
    PyObject *capsule, *list;
    int threads;
    if (!PyArg_ParseTuple(arguments, "OOi", &capsule, &list, &threads)) return nullptr;
    auto* decoder = static_cast<Decoder*>(PyCapsule_GetPointer(capsule, DECODER));
    if (!decoder) return nullptr;
    return with_arguments([&] {
        Numbers numbers(list);
        Step step = read_step(numbers, decoder->layers.size());
        return without_lock([&] {
            check_range("token", step.ids, step.texts * step.tokens, decoder->vocabulary);
            check_step(step, *decoder);
            chosen->kernels->run(*decoder, step, threads);
        });
    });
}

PyObject* write(PyObject*, PyObject* arguments) {
    PyObject *capsule, *of_step, *of_choice;
    int threads;
    if (!PyArg_ParseTuple(arguments, "OOOi", &capsule, &of_step, &of_choice, &threads))
        return nullptr;
    auto* decoder = static_cast<Decoder*>(PyCapsule_GetPointer(capsule, DECODER));
    if (!decoder) return nullptr;
    return with_arguments([&]() -> PyObject* {
        Numbers step_numbers(of_step), choice_numbers(of_choice);
        Step step = read_step(step_numbers, decoder->layers.size());
        int64_t* written = const_cast<int64_t*>(step.ids);
        Choice choice = read_choice(choice_numbers);
        int64_t done = 0;
        PyObject* nothing = without_lock([&] {
            check_step(step, *decoder, choice.steps);
            done = write(*decoder, step, choice, written, chosen->kernels->run, threads);
        });
        if (!nothing) return nullptr;
        Py_DECREF(nothing);
        return PyLong_FromLongLong(done);
    });
}

// matrix, x, rows, y, threads
PyObject* multiply(PyObject*, PyObject* list) {
    return with_arguments([&] {
        Numbers numbers(list);
        Matrix matrix = read_matrix(numbers);
        const float* x = numbers.address<const float>();
        int64_t rows = numbers.integer();
        float* y = numbers.address<float>();
        int64_t threads = numbers.integer();
        return without_lock([&] { chosen->kernels->multiply(matrix, x, rows, y, threads); });
    });
}

// matrix, whose blocks are filled, weights, stride by output, by input, threads
PyObject* quantize(PyObject*, PyObject* list) {
    return with_arguments([&] {
        Numbers numbers(list);
        Matrix matrix = read_matrix(numbers);
        Weights weights{numbers.address<const float>(), 0, 0};
        weights.by_output = numbers.integer();
        weights.by_input = numbers.integer();
        int64_t threads = numbers.integer();
        return without_lock([&] { chosen->kernels->quantize(matrix, weights, threads); });
    });
}

// x, rows, width, levels, scales, threads
PyObject* round_rows(PyObject*, PyObject* list) {
    return with_arguments([&] {
        Numbers numbers(list);
        const float* x = numbers.address<const float>();
        int64_t rows = numbers.integer(), width = numbers.integer();
        int8_t* levels = numbers.address<int8_t>();
        float* scales = numbers.address<float>();
        int64_t threads = numbers.integer();
        return without_lock(
            [&] { chosen->kernels->round_rows(x, rows, width, levels, scales, threads); });
    });
}

// sums, rows, outputs, scales by row, by output, bias, y, threads
PyObject* scale_sums(PyObject*, PyObject* list) {
    return with_arguments([&] {
        Numbers numbers(list);
        Sums sums{};
        sums.first = numbers.address<const int32_t>();
        sums.rows = numbers.integer();
        sums.outputs = numbers.integer();
        for (const float** scales : {&sums.by_row, &sums.by_output, &sums.bias})
            *scales = numbers.address<const float>();
        float* y = numbers.address<float>();
        int64_t threads = numbers.integer();
        return without_lock([&] { chosen->kernels->scale_sums(sums, y, threads); });
    });
}

// matrix, ids, rows, out
PyObject* embed(PyObject*, PyObject* list) {
    return with_arguments([&] {
        Numbers numbers(list);
        Matrix matrix = read_matrix(numbers);
        const int64_t* ids = numbers.address<const int64_t>();
        int64_t rows = numbers.integer();
        float* out = numbers.address<float>();
        return without_lock([&] {
            check_range("token", ids, rows, matrix.outputs);
            for (int64_t row = 0; row < rows; ++row)
                chosen->kernels->embed(matrix, ids[row], out + row * matrix.inputs);
        });
    });
}

// addresses of GOMP_parallel, omp_get_thread_num, omp_get_num_threads
PyObject* share_threads(PyObject*, PyObject* list) {
    return with_arguments([&]() -> PyObject* {
        Numbers numbers(list);
        OpenMP functions{};
        functions.parallel = reinterpret_cast<decltype(functions.parallel)>(numbers.integer());
        functions.thread = reinterpret_cast<decltype(functions.thread)>(numbers.integer());
        functions.threads = reinterpret_cast<decltype(functions.threads)>(numbers.integer());
        use_openmp(functions);
        Py_RETURN_NONE;
    });
}

PyObject* target(PyObject*, PyObject*) { return PyUnicode_FromString(chosen->name); }

PyObject* list_targets(PyObject*, PyObject*) {
    PyObject* names = PyList_New(0);
    for (const Target& target : targets) {
        if (!target.runs()) continue;
        PyObject* name = PyUnicode_FromString(target.name);
        PyList_Append(names, name);
        Py_DECREF(name);
    }
    return names;
}

PyObject* use_target(PyObject*, PyObject* name) {
    PyObject* bytes = PyUnicode_AsUTF8String(name);
    if (!bytes) return nullptr;
    std::string wanted = PyBytes_AsString(bytes);
    Py_DECREF(bytes);
    for (const Target& target : targets)
        if (wanted == target.name && target.runs()) {
            chosen = &target;
            Py_RETURN_NONE;
        }
    PyErr_Format(PyExc_ValueError, "this CPU does not run the kernels '%s'", wanted.c_str());
    return nullptr;
}

PyMethodDef methods[] = {
    {"make_decoder", make_decoder, METH_O, "Describe a decoder once, for many steps."},
    {"run", run, METH_VARARGS, "Do one step of a decoder."},
    {"write", write, METH_VARARGS, "Do steps for as long as their tokens are sure; count them."},
    {"multiply", multiply, METH_O, "Multiply rows by a packed matrix."},
    {"quantize", quantize, METH_O, "Fill the blocks of a matrix with its weights."},
    {"round_rows", round_rows, METH_O, "Round rows to 8 bits with one scale each."},
    {"scale_sums", scale_sums, METH_O, "Scale sums of levels, and add a bias."},
    {"embed", embed, METH_O, "Copy rows of a packed matrix."},
    {"share_threads", share_threads, METH_O, "Run on the threads of torch's OpenMP."},
    {"target", target, METH_NOARGS, "Return the name of the kernels in use."},
    {"list_targets", list_targets, METH_NOARGS, "List the kernels that this CPU runs, best first."},
    {"use_target", use_target, METH_O, "Use other kernels, for tests."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "Kernels for small decoders on a CPU.", -1, methods,
    nullptr, nullptr, nullptr, nullptr,
};

}  // namespace
}  // namespace genkit

PyMODINIT_FUNC PyInit__native() {
    for (const auto& target : genkit::targets)
        if (!genkit::chosen && target.runs()) genkit::chosen = &target;
    return PyModule_Create(&genkit::definition);
}

"""The compiled kernels of genkit.engine; without a C++ compiler genkit installs without them."""

from setuptools import Extension, setup

NATIVE = "genkit/engine/native/"
SOURCES = ("module", "threads", "kernels_generic", "kernels_avx2", "kernels_vnni")
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-Wno-psabi", "-pthread"]

setup(
    ext_modules=[
        Extension(
            "genkit.engine._native",
            [f"{NATIVE}{name}.cpp" for name in SOURCES],
            depends=[
                f"{NATIVE}{name}.h"
                for name in (
                    "decoder",
                    "includes",
                    "kernels",
                    "many",
                    "quantize",
                    "shapes",
                    "threads",
                )
            ],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

"""Build the Cython extension _knn: run-time choice of AVX2 and AVX-512 where the compiler has them.

    pip install .                       the portable build: runs on any x86-64 or arm64 machine
    python setup.py build_ext --inplace for working on the kernel itself
"""
import os
import subprocess
import tempfile

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# What the kernel asks of the compiler, tried before it is used.
X86 = """
#include <immintrin.h>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,popcnt,bmi,bmi2")))
int first(const void *p)
{
    return _mm512_movepi16_mask(_mm512_maskz_compress_epi16(_pdep_u64(1, 1), _mm512_loadu_si512(p)));
}
int main(void) { char bytes[64] = {0}; return __builtin_cpu_supports("avx512vbmi2") && first(bytes); }
"""


class BuildKnn(build_ext):
    def finalize_options(self):
        super().finalize_options()
        self.force = True  # an object file of other flags would be taken as up to date

    def works(self, source):
        """Does this C program compile and link?"""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "try.c")
            with open(path, "w") as file:
                file.write(source)
            compiler = list(getattr(self.compiler, "compiler_so", ["cc"]))
            command = [*compiler, path, "-o", os.path.join(folder, "try")]
            try:
                return subprocess.run(command, capture_output=True).returncode == 0
            except OSError:
                return False

    def build_extension(self, extension):
        if self.compiler.compiler_type == "msvc":
            extension.extra_compile_args += ["/O2", "/fp:precise"]
        else:
            # No contraction to fused multiply-add: float64 distances must be NumPy's to the last bit.
            extension.extra_compile_args += ["-O3", "-ffp-contract=off"]
            if self.works(X86):
                extension.define_macros.append(("KNN_X86", None))
        super().build_extension(extension)


setup(
    ext_modules=cythonize([Extension("_knn", ["_knn.pyx"])], annotate=bool(os.environ.get("KNN_ANNOTATE"))),
    cmdclass={"build_ext": BuildKnn},
)
